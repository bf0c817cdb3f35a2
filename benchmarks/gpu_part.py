"""What `check_gpu.py` is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Where a check works.

    Attributes:
        output: the folder of results, all of them small.
        work: the folder of data and trainings.
        device: the device that is checked.
        small: whether it is only a rehearsal.
    """

    output: Path
    work: Path
    device: str
    small: bool


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name, title: what it is called, and what it tells.
        command: what Python runs, by places.
        read: the result, from what the command has left.
        lines: the result in a few lines.
        minutes: how long it may take.
        resumable: whether it goes on where it was stopped.
    """

    name: str
    title: str
    command: Callable[[Places], list]
    read: Callable[[Places], object]
    lines: Callable[[object], list[str]] = lambda result: [] if result is None else [str(result)]
    minutes: float = 9
    resumable: bool = False
