"""Checkpoints: tensors and plain values, written atomically; checked when read, never unpickled.

A file is the zip archive that `torch.save` makes; the archive's comment is the SHA-256 of all the
bytes before it. `torch.load(path, weights_only=True)` and any zip tool read it as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from ..errors import InputError
from ..machine.processes import is_main, wait
from ..method.weight import check_form

FORMAT = "alq-checkpoint"
VERSION = 2  # 1 had no checksum
ZIP_END = b"PK\x05\x06"  # a zip archive ends in a record of 22 bytes, then the comment
# What every file holds, and what it may, by type.
NOTHING = type(None)
FORM = {
    "net": str, "model": dict, "stage": (str, NOTHING), "finished": (bool, NOTHING),
    "val_indices": (torch.Tensor, NOTHING), "top1_fp": (float, NOTHING),
}  # fmt: skip
DIGEST = 64  # characters of the checksum


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file `path` in full or not at all: temporary file, flush, rename.

    Of several processes the main one writes; the others wait for it. What a killed process left
    half written, `path`.tmp, is overwritten next time.
    """
    if is_main():
        _write(Path(path), write)
    wait()


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; make room or name another file"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write `content`, tensors and plain values, to `path` in full or not at all.

    Equal content in the same order gives equal bytes.
    """
    if is_main():
        sealed = seal({"format": FORMAT, "version": VERSION, **content})
        _write(Path(path), lambda file: file.write(sealed))
    wait()


def load_checkpoint(path: str | Path, net: str | None) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU; InputError says what is wrong with the file.

    `net` is the network the caller has: a checkpoint of another one is refused. None
    takes any.
    """
    try:
        content = unseal(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{path} {' '.join(str(error).split())}") from error
    if net is not None and content["net"] != net:
        raise InputError(f"{path} holds network '{content['net']}', not '{net}'")
    return content


def seal(content: dict) -> bytes:
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment: none so far
    buffer.write(DIGEST.to_bytes(2, "little"))
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    buffer.write(digest)
    return buffer.getvalue()


def unseal(data: bytes) -> dict:
    """The content of `data`, which is as `seal` made it; else InputError, on whatever bytes."""
    archive, digest = data[:-DIGEST], data[-DIGEST:]
    if archive[-22:-18] != ZIP_END:
        if not data.startswith(b"PK"):
            raise InputError("is not a checkpoint; the stages --PRETRAIN and --ALQ make them")
        if data[-22:-18] == ZIP_END:
            raise InputError("is not an ALQ checkpoint, or one of format version 1; make it anew")
        raise InputError("is truncated; copy it again")
    if hashlib.sha256(archive).hexdigest().encode() != digest:
        raise InputError("is damaged: its checksum does not fit; copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file made to do harm can raise; nothing was executed
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"is not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or not _same(content.get("format"), FORMAT):
        raise InputError("is not an ALQ checkpoint")
    if not _same(version := content.get("version"), VERSION):
        raise InputError(f"has format version {version}; this code reads {VERSION}")
    for key, kinds in FORM.items():
        if not isinstance(content.get(key), kinds):
            raise InputError(f"is damaged: its '{key}' is missing or of no use")
    held_out = content.get("val_indices")
    if held_out is not None and (held_out.dtype != torch.int64 or held_out.dim() != 1):
        raise InputError("is damaged: its validation images are no list of numbers")
    model = content["model"].items()
    if not all(isinstance(x, str) and isinstance(y, torch.Tensor) for x, y in model):
        raise InputError("is damaged: its network is not made of tensors")
    return content


def _same(found: object, value: object) -> bool:
    return type(found) is type(value) and found == value


def weights_in(content: dict, source: str) -> list[dict]:
    """The multi-bit weights' states in a checkpoint's content; InputError if they are none."""
    states = content.get("weights")
    if not isinstance(states, list):
        raise InputError(f"{source} holds no multi-bit weights; --ALQ makes such a checkpoint")
    for number, state in enumerate(states):
        try:
            check_form(state)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{source} is damaged: its layer {number} is none ({error})"
            ) from error
    return states


def load_model(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Put a checkpoint's state dict into `model`; InputError names the first difference.

    `source` says where it came from, for the message.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*own, *saved]:
        if own.get(name) != saved.get(name):
            raise InputError(
                f"{source} holds another network: {name} is {saved.get(name, 'absent')} there and "
                f"{own.get(name, 'absent')} here"
            )
    model.load_state_dict(state)
