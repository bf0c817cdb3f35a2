"""Two ways to make a packed file smaller than the paper counts: float16, and entropy coding.

Both work on the flat tensors of `alq.packing`, on their way into the file and back:

    float16   coordinates and the float32 values of the rest in 2 bytes each
    coded     bitwidths, and the highest byte of each of these floats (sign and exponent), by
              `alq.entropy`; the lower bytes, as random as the signs, stay as they are
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .entropy import decode, encode
from .errors import InputError
from .multibit import MultiBitWeight
from .packing import cut, pack_numbers, packed_size, unpack_numbers

FLOATS = {"float32": torch.float32, "float16": torch.float16}
REST = "rest.float32"


@torch.no_grad()
def round_floats(model: nn.Module, weights: Sequence[MultiBitWeight]) -> None:
    """Round to float16 what a packed file of float16 keeps of `model`: alpha and the rest.

    Raises: InputError names what float16 cannot hold.
    """
    quantized = {weight.name for weight in weights}
    rest = {k: v for k, v in model.state_dict().items() if k not in quantized}
    for name, value in [*rest.items(), *((weight.name, weight.alpha) for weight in weights)]:
        if value.dtype == torch.float32:
            rounded = value.half()
            if not rounded.isfinite().all():
                raise InputError(f"{name}: has values too large for float16; pack it as float32")
            value.copy_(rounded)
    for weight in weights:
        weight.write()


def compress(
    tensors: dict[str, Tensor], names: dict, floats: str, coded: bool
) -> dict[str, Tensor]:
    """`tensors` of the layers and the rest in `names`, which is told how to get them back."""
    if floats == "float32" and not coded:
        return tensors
    names["compact"] = {"floats": floats, "coded": coded}
    small = dict(tensors)
    for key in ("coordinates", REST):
        if key in tensors:
            values = tensors[key].to(FLOATS[floats])
            if not torch.equal(values.float(), tensors[key]):
                raise InputError(f"{key}: not float16 values; alq.round_floats makes them so")
            small[key] = code_floats(values) if coded else values
    if coded:
        small["bitwidths"] = as_tensor(encode(group_bits(tensors["bitwidths"], names), 4, True))
    return small


def expand(small: dict[str, Tensor], names: dict) -> dict[str, Tensor]:
    """The inverse of `compress`; raises what nonsense in `names` raises."""
    if "compact" not in names:
        return small
    kind, coded = FLOATS[names["compact"]["floats"]], names["compact"]["coded"]
    tensors, layers = dict(small), names["layers"]
    if coded:
        lengths = [int(G) for G in layers["G"]]
        bits = decode(small["bitwidths"].numpy().tobytes(), lengths, 4, True)
        pairs = zip(bits, layers["L"], strict=True)
        packed = [pack_numbers(np.array(b, np.int64), L.bit_length()) for b, L in pairs]
        tensors["bitwidths"] = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *packed]))
        shapes = names["rest"].get("float32", {}).values()
        counts = {"coordinates": sum(map(sum, bits)), REST: sum(map(math.prod, shapes))}
    for key in ("coordinates", REST):
        if key in small:
            values = decode_floats(small[key], counts[key], kind) if coded else small[key]
            if values.dtype != kind:
                raise ValueError(f"{key} is {values.dtype}")
            tensors[key] = values.float()
    return tensors


def group_bits(bitwidths: Tensor, names: dict) -> list[list[int]]:
    """Each layer's I_g, from their packed form."""
    layers = list(zip(names["layers"].get("G", []), names["layers"].get("L", []), strict=True))
    parts = cut(bitwidths, [packed_size(G * L.bit_length()) for G, L in layers])
    return [
        unpack_numbers(part.numpy(), G, L.bit_length()).tolist()
        for part, (G, L) in zip(parts, layers, strict=True)
    ]


def code_floats(values: Tensor) -> Tensor:
    """(N,) -> the lower bytes of all values, byte by byte, then the coded highest bytes."""
    planes = values.numpy().view(np.uint8).reshape(len(values), -1).T  # low bytes first
    return as_tensor(planes[:-1].tobytes() + encode([planes[-1].tolist()], 8))


def decode_floats(coded: Tensor, count: int, kind: torch.dtype) -> Tensor:
    """The inverse of `code_floats` for `count` values of type `kind`."""
    data, low = coded.numpy().tobytes(), count * (kind.itemsize - 1)
    planes = np.empty((kind.itemsize, count), np.uint8)
    planes[:-1] = np.frombuffer(data[:low], np.uint8).reshape(-1, count)
    planes[-1] = decode(data[low:], [count], 8)[0]
    return torch.frombuffer(bytearray(planes.T.tobytes()), dtype=kind)


def as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
