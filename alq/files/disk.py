"""Whole files on disk, for all that a run saves: read in one go, written in full or not at all.

What the system refuses becomes an InputError that names the file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..machine.processes import is_main, wait_for_all


def read_whole(path: str | Path) -> bytes:
    """Return the content of the file `path`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file `path` in full or not at all: temporary file, flush, rename.

    Of several processes the main one writes; the others wait for it. What a killed process left
    half written, `path`.tmp, is overwritten next time.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    if is_main():
        try:
            with explain_failed_write(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    wait_for_all()


@contextlib.contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """Turn what the system says within `with` into an InputError about writing `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; make room or name another file"
        ) from error
