"""The evidence of a run: one JSON line per event in a log beside the checkpoint."""

from __future__ import annotations

import json
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

from .errors import InputError
from .parallel import is_main, world


class RunLog:
    """Appends events to `path`, one JSON object a line, each with its time of day.

    Of several processes the main one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise InputError(f"--model: {path} cannot be written: {error.strerror}") from error

    def write(self, event: str, **fields: object) -> None:
        if not is_main():
            return
        line = json.dumps({"event": event, **fields, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        with open(self.path, "a") as file:
            file.write(line + "\n")


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
