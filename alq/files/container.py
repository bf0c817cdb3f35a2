"""The container of packed files of versions 1 and 2: safetensors, names in JSON, a checksum."""

import hashlib
import json
import zlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import InputError

VERSION, COMPACT_VERSION = 1, 2
METADATA_KEY = "alq-packed"  # one entry only: safetensors keeps no order of several
MOST_NAMES = 2**24  # bytes of names that are inflated
NO_CHECKSUM = "0" * 64
# What decoding can raise where the content has the right form, but makes no sense.
DECODING_ERRORS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError,
    TypeError, ValueError, zlib.error,
)  # fmt: skip


def deflate_json(names: dict) -> Tensor:
    """Return `names` as deflated JSON, a tensor of bytes."""
    text = json.dumps(names, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def inflate_json(data: Tensor) -> dict:
    """Return what `deflate_json` was given, inflating no more than MOST_NAMES bytes of a bomb."""
    return json.loads(zlib.decompressobj().decompress(data.numpy().tobytes(), MOST_NAMES))


def encode_container(tensors: dict[str, Tensor], version: int = VERSION) -> bytes:
    """Return the bytes of a packed file that holds `tensors`."""
    content = safetensors.torch.save(tensors, {METADATA_KEY: f"{version} {NO_CHECKSUM}"})
    checksum = hashlib.sha256(content).hexdigest()
    return content.replace(NO_CHECKSUM.encode(), checksum.encode(), 1)


def decode_container(content: bytes, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors in `content` of the file `path`; InputError if it is no packed file."""
    if content[8:9] != b"{":
        kind = ", but a checkpoint or a resume point" if content.startswith(b"PK") else ""
        raise InputError(
            f"{path} is not an ALQ packed file{kind}; --POSTTRAIN writes one, ending .alq"
        )
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, *DECODING_ERRORS) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); copy it again") from error
    version, _, checksum = metadata.get(METADATA_KEY, "").partition(" ")
    if not version:
        raise InputError(f"{path} is a safetensors file, but not an ALQ packed file")
    blank = content.replace(checksum.encode(), NO_CHECKSUM.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != checksum:
        raise InputError(f"{path} is damaged: its checksum does not fit; copy it again")
    if version not in map(str, (VERSION, COMPACT_VERSION)):
        raise InputError(f"{path} has format version {version}; this code reads 1 to 3")
    return tensors
