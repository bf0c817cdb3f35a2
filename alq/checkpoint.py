"""Checkpoints: tensors and plain values, written atomically, loaded without unpickling code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from .errors import InputError
from .parallel import is_main, wait

FORMAT = "alq-checkpoint"
VERSION = 1


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write `content` to `path` in full or not at all: temporary file, flush, rename.

    Of several processes the main one writes; the others wait for it.
    """
    if is_main():
        _write(path, content)
    wait()


def _write(path: str | Path, content: dict) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, net: str) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU; InputError says what is wrong with the file.

    `net` is the network the caller has: a checkpoint of another one is refused.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not an ALQ checkpoint")
    if content["version"] != VERSION:
        raise InputError(
            f"{path} has format version {content['version']}; this code reads {VERSION}"
        )
    if content["net"] != net:
        raise InputError(f"{path} holds network '{content['net']}', not '{net}'")
    return content
