"""The evidence of a run: one JSON line per event in a log beside the checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy
import torch
import torchvision

from ..errors import InputError
from ..machine.processes import is_main, world


class RunLog:
    """Appends events to `path`, one JSON object a line, each with its time of day.

    Of several processes the main one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._announced, self._opened = "", False

    def announce(self, event: str, **fields: object) -> None:
        """Write the event together with the next one: a run that is refused leaves no log."""
        self._announced = _line(event, fields)

    def write(self, event: str, **fields: object) -> None:
        if is_main():
            self._append(_line(event, fields))

    def size(self) -> int:
        """Bytes of the log, with all that was announced."""
        self._append("")
        return self.path.stat().st_size

    def cut(self, size: int) -> None:
        """Go back to when the log had `size` bytes."""
        with contextlib.suppress(FileNotFoundError):  # moved away: there is nothing to drop
            if self.path.stat().st_size > size:
                os.truncate(self.path, size)

    def _open(self) -> None:
        """Make the folder; cut off what a killed process left of a last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.cut(self.path.read_bytes().rfind(b"\n") + 1)
        self._opened = True

    def _append(self, line: str) -> None:
        text, self._announced = self._announced + line, ""
        try:
            if not self._opened:
                self._open()
            with open(self.path, "a") as file:
                file.write(text)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror or error}; make room or name "
                "another file"
            ) from error


def _line(event: str, fields: dict) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return json.dumps({"event": event, **fields, "time": when}) + "\n"


def describe_run(args: Namespace) -> dict:
    """Resolved flags, versions, device and commit: what a reader needs to repeat the run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "flags": plain_flags(args),
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
        },
        "device": describe_device(args.device),
        "processes": world(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def read_log(path: Path) -> list[dict]:
    """The events in a log; a torn last line, of a killed process, is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def plain_flags(args: Namespace) -> dict:
    """The flags as JSON values."""
    plain = (bool, int, float, str, list, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in sorted(vars(args).items())}


def describe_device(device: torch.device) -> str:
    """For a reader of the log: the device and, where known, its name."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
