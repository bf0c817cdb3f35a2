"""Packed files of version 2: a safetensors file with float16, and in older ones entropy coding.

Both are changes of the flat tensors of `alq.files.bits` on their way into the file and back:

    float16   coordinates and the float32 values of the rest take 2 bytes each
    coded     bitwidths, and the highest byte of each of these floats (sign and exponent), are
              entropy-coded; the lower bytes stay as they are. Only read: `alq.files.small` is what
              such files are now
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .bits import pack_bitwidths
from .entropy import decode

DTYPES = {"float32": torch.float32, "float16": torch.float16}
COORDINATES, REST = "coordinates", "rest.float32"  # the tensors of floats


def compress(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with float16 in place of float32."""
    small = dict(tensors)
    for key in (k for k in (COORDINATES, REST) if k in tensors):
        small[key] = tensors[key].half()
        if not torch.equal(small[key].float(), tensors[key]):
            raise InputError(f"{key}: not float16 values; alq.round_floats makes them so")
    return small


def expand(small: dict[str, Tensor], names: dict) -> dict[str, Tensor]:
    """Return the tensors in float32 and uncoded; raise what nonsense in `names` raises."""
    floats, coded = names["compact"]["floats"], names["compact"]["coded"]
    tensors, layers, counts = dict(small), names["layers"], {}
    if coded:
        bits = decode(small["bitwidths"].numpy().tobytes(), layers.get("G", ()), 4, follow=True)
        tensors["bitwidths"] = pack_bitwidths([np.array(b, np.int64) for b in bits], layers)
        shapes = names["rest"].get("float32", {}).values()
        counts = {COORDINATES: sum(map(sum, bits)), REST: sum(map(math.prod, shapes))}
    for key in (k for k in (COORDINATES, REST) if k in small):
        values = decode_floats(small[key], counts[key], floats) if coded else small[key]
        if values.dtype != DTYPES[floats]:
            raise ValueError(f"{key} is {values.dtype}")
        tensors[key] = values.float()
    return tensors


def decode_floats(coded: Tensor, count: int, floats: str) -> Tensor:
    """Return the (count,) values of type `floats`, stored as all lower bytes, then the highest."""
    data, lower = coded.numpy(), DTYPES[floats].itemsize - 1  # bytes of each value
    planes = np.empty((lower + 1, count), np.uint8)
    planes[:-1] = data[: lower * count].reshape(lower, count)
    planes[-1] = decode(data[lower * count :].tobytes(), [count], 8)[0]
    return torch.from_numpy(np.ascontiguousarray(planes.T).view(floats).reshape(-1))
