"""Processes that die: forked from this one, which has torch and the data loaded already.

A child runs a script's `main` with one thread and may be killed at a step, at a byte of a write, or
after some time of computing.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], None], output: Path) -> int:
    """Start a process that does `work` and exits with its code; the process's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 70
    try:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (pytest has replaced both)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for it: its exit code, negative for the signal that killed it."""
    return finish_and_time(child)[0]


def finish_and_time(child: int) -> tuple[int, float]:
    """As `finish`; also the seconds that it has computed."""
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def die_in(seconds: float) -> None:
    """Let this process be killed when it has computed for so long, however busy the machine is."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


class DeadlyFile:
    """A file in which this process is killed when `left[0]` more bytes have been written."""

    def __init__(self, file: object, left: list[int]) -> None:
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        size = len(memoryview(data).cast("B"))
        if size > self.left[0]:
            self.file.write(memoryview(data).cast("B")[: self.left[0]])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left[0] -= size
        return self.file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> DeadlyFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
