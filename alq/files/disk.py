"""Whole files on disk, for all that a run saves: read in one go, written in full or not at all.

What the system refuses becomes an InputError that names the file.
"""

import contextlib
import glob
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..machine.processes import gather_from_all, is_main, wait_for_all
from .paths import beside, packed, part

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]


def read_whole(path: str | Path) -> bytes:
    """Return the content of the file `path`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file `path` in full or not at all: temporary file, flush, rename.

    Of several processes the main one writes; the others wait for it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # no other writer's
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


@contextlib.contextmanager
def hold(checkpoints: Iterable[Path]) -> Iterator[None]:
    """Keep other runs from `checkpoints` within `with`; first clean up after killed ones.

    Of several processes the main one does; all raise InputError if another run is at work there.
    """
    locks = {beside(checkpoint, ending=".lock"): checkpoint for checkpoint in checkpoints}
    refusal = None
    with contextlib.ExitStack() as held:
        try:
            for lock, checkpoint in locks.items() if fcntl and is_main() else ():
                held.enter_context(locked(lock))
                point = beside(checkpoint, ending=".resume")
                for path in (checkpoint, part(checkpoint), packed(checkpoint), point):
                    for left in path.parent.glob(f"{glob.escape(path.name)}.????????.tmp"):
                        left.unlink(missing_ok=True)
        except InputError as error:
            refusal = str(error)
        if refusal := gather_from_all(refusal)[0]:
            raise InputError(refusal)
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, there within `with` only; InputError if another process does.

    A dead process holds none, nor do those that it has forked.
    """
    made = not path.parent.exists()
    with explain_failed_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (it is closed below)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, PermissionError, FileNotFoundError):  # or only just removed
            free = False
        except OSError:
            free = True  # as far as a file system that has no locks can tell
        if not free:
            raise InputError(
                f"{path} is held by another run, which writes these files; wait for its end, or "
                "name other files"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # it holds something by now
                    path.parent.rmdir()
