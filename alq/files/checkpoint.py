"""Checkpoints, from which the stages go on: tensors and plain values, never unpickled.

A file is the zip archive that `torch.save` makes; the archive's comment is the SHA-256 of all the
bytes before it. `torch.load(path, weights_only=True)` and any zip tool read it as it is.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .bits import check_form
from .disk import read_whole, write_atomically

FORMAT = "alq-checkpoint"
VERSION = 2  # 1 had no checksum
ZIP_END = b"PK\x05\x06"  # a zip archive ends in a record of 22 bytes, then the comment
CHECKSUM_LENGTH = 64  # hexadecimal digits
# The types of what every file holds, and of what it may hold.
FIELDS = {
    "net": str, "model": dict, "stage": str | None, "finished": bool | None,
    "val_indices": Tensor | None, "top1_fp": float | None, "dataset": str | None,
}  # fmt: skip


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write `content`, tensors and plain values, to `path` in full or not at all.

    Equal content in the same order gives equal bytes.
    """
    content = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: file.write(encode_checkpoint(content)))


def load_checkpoint(path: str | Path, net: str | None) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU; InputError says what is wrong with the file.

    A checkpoint of another network than `net` is refused; None takes any.
    """
    data = read_whole(path)
    check_archive(data, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file made to do harm can raise; nothing was executed
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{path} is not a readable checkpoint: {reason}") from error
    check_content(content, path)
    if net is not None and content["net"] != net:
        raise InputError(f"{path} holds network '{content['net']}', not '{net}'")
    return content


def read_checksum(path: Path) -> str:
    """Return the checksum that the checkpoint `path` ends in, which tells it from any other."""
    return read_whole(path)[-CHECKSUM_LENGTH:].decode("ascii", "replace")


def encode_checkpoint(content: dict) -> bytes:
    """Return the bytes of a checkpoint file that holds `content`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment: none so far
    buffer.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getvalue()


def check_archive(data: bytes, path: str | Path) -> None:
    """Raise InputError unless `data`, of file `path`, is a zip archive and its checksum fits."""
    archive, checksum = data[:-CHECKSUM_LENGTH], data[-CHECKSUM_LENGTH:]
    if archive[-22:-18] == ZIP_END:
        if hashlib.sha256(archive).hexdigest().encode() == checksum:
            return
        reason = "is damaged: its checksum does not fit; copy it again"
    elif not data.startswith(b"PK"):
        reason = "is not a checkpoint; the stages --PRETRAIN and --ALQ make them"
    elif data[-22:-18] == ZIP_END:
        reason = "is not an ALQ checkpoint, or one of format version 1; make it anew"
    else:
        reason = "is truncated; copy it again"
    raise InputError(f"{path} {reason}")


def check_content(content: Any, path: str | Path) -> None:
    """Raise InputError unless `content`, of file `path`, is a checkpoint's of this version."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not an ALQ checkpoint")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        version = " ".join(str(version).split())
        raise InputError(f"{path} has format version {version}; this code reads {VERSION}")
    for key, kind in FIELDS.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path} is damaged: its '{key}' is missing or of no use")
    held_out = content.get("val_indices")
    if held_out is not None and (held_out.dtype != torch.int64 or held_out.dim() != 1):
        raise InputError(f"{path} is damaged: its validation images are no list of numbers")
    model = content["model"].items()
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in model):
        raise InputError(f"{path} is damaged: its network is not made of tensors")


def weights_in(content: dict, source: str) -> list[dict]:
    """Return the multi-bit weights in the content of file `source`; InputError if it has none."""
    states = content.get("weights")
    if not isinstance(states, list):
        raise InputError(f"{source} holds no multi-bit weights; --ALQ makes such a checkpoint")
    for number, state in enumerate(states):
        try:
            check_form(state)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            message = f"{source} is damaged: its layer {number} is none ({error})"
            raise InputError(message) from error
    return states


def tensors_of(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the model's state dict; InputError names what in it no file can hold."""
    state = model.state_dict(keep_vars=keep_vars)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: is no tensor, and the files hold nothing else")
    return state


def load_model(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put a state dict from file `source` into `model`; InputError names the first difference.

    Where a file of an old release of torch lacks batch norm's count of batches, the model's stays.
    """
    saved = {name: tuple(tensor.shape) for name, tensor in state.items()}
    own = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    own = {k: v for k, v in own.items() if k in saved or not k.endswith("num_batches_tracked")}
    if difference := first_difference(saved, own):
        name, there, here = difference
        raise InputError(f"{source} holds another network: {name} is {there} there and {here} here")
    model.load_state_dict(dict(state))  # without the metadata that forbid it


def first_difference(saved: Mapping, own: Mapping) -> tuple[str, Any, Any] | None:
    """Return (name, value in `saved`, in `own`) where they first differ; "absent" for none."""
    for name in [*own, *saved]:
        there, here = saved.get(name, "absent"), own.get(name, "absent")
        if there != here:
            return name, there, here
    return None
