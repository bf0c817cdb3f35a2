"""Checkpoints: tensors and plain values, written atomically, loaded without unpickling code."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from .errors import InputError
from .parallel import is_main, wait

FORMAT = "alq-checkpoint"
VERSION = 1


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file `path` in full or not at all: temporary file, flush, rename.

    Of several processes the main one writes; the others wait for it.
    """
    if is_main():
        _write(Path(path), write)
    wait()


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write `content`, tensors and plain values, to `path` in full or not at all."""
    content = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: str | Path, net: str | None) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU; InputError says what is wrong with the file.

    `net` is the network the caller has: a checkpoint of another one is refused. None
    takes any.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not an ALQ checkpoint")
    if content["version"] != VERSION:
        raise InputError(
            f"{path} has format version {content['version']}; this code reads {VERSION}"
        )
    if net is not None and content["net"] != net:
        raise InputError(f"{path} holds network '{content['net']}', not '{net}'")
    return content
