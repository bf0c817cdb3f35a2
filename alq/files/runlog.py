"""The log of a run, its evidence: one JSON line per event, in a file beside the checkpoint."""

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import torchvision

from ..errors import InputError
from ..machine.processes import is_main, process_count
from .disk import explain_failed_write, read_whole

# What `RunLog` writes: whole lines, then perhaps one that was torn when the process was killed.
LINE = rb'\{"event": "[^\n]*, "time": "[^"\n]*"\}\n'
LOG = re.compile(rb'(%b)+[^\n]*|(\{"event": "[^\n]*)?' % LINE)


class RunLog:
    """Appends events to `path`, one JSON object a line, each with its time of day.

    Of several processes the main one writes. InputError if the file there is no such log.

    Attributes:
        also: is called with each event as `write` is.
    """

    def __init__(self, path: Path, also: Callable[..., None] | None = None) -> None:
        self.path, self.also = path, also
        if path.is_file() and not LOG.fullmatch(read_whole(path)):
            raise InputError(f"{path} is no log of ALQ, and a run would add to it; name another")
        self._announced, self._opened = "", False

    def announce(self, event: str, **fields: object) -> None:
        """Write the event together with the next one: a run that is refused leaves no log."""
        self._announced = format_event(event, fields)

    def write(self, event: str, **fields: object) -> None:
        """Append the event, and before it the announced one."""
        if is_main():
            self._append(format_event(event, fields))
            if self.also:
                self.also(event, **fields)

    def size(self) -> int:
        """Return the bytes of the log, with all that was announced."""
        self._append("")
        return self.path.stat().st_size

    def truncate(self, size: int) -> None:
        """Go back to when the log had `size` bytes."""
        with contextlib.suppress(FileNotFoundError):  # moved away: there is nothing to drop
            if self.path.stat().st_size > size:
                os.truncate(self.path, size)

    def _append(self, text: str) -> None:
        text, self._announced = self._announced + text, ""
        with explain_failed_write(self.path):
            if not self._opened:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_file():  # cut off what a killed process left of a last line
                    self.truncate(self.path.read_bytes().rfind(b"\n") + 1)
                self._opened = True
            with open(self.path, "a") as file:
                file.write(text)


def format_event(event: str, fields: dict) -> str:
    """Return the event's line."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return json.dumps({"event": event, **fields, "time": when}) + "\n"


def describe_run(args: Namespace) -> dict:
    """Return what a reader needs to repeat the run: flags, versions, device, commit."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "flags": plain_flags(args),
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, torchvision, numpy)},
        },
        "device": describe_device(args.device),
        "processes": process_count(),
        "threads": torch.get_num_threads(),
        "commit": describe_commit(),
    }


def plain_flags(args: Namespace) -> dict:
    """Return the flags as JSON values."""
    plain = bool | int | float | str | list | None
    return {k: v if isinstance(v, plain) else str(v) for k, v in sorted(vars(args).items())}


def describe_device(device: torch.device) -> str:
    """Return the device and, where known, its name, for a reader of the log."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"


def describe_commit() -> str | None:
    """Return the commit that this code is of, "-dirty" if it was changed; None where git fails."""
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
