"""Two ways to make a packed file smaller than the paper counts: float16, and entropy coding.

Both work on the flat tensors of `alq.files.bits`, on their way into the file and back:

    float16   coordinates and the float32 values of the rest in 2 bytes each
    coded     bitwidths, and the highest byte of each of these floats (sign and exponent), by
              `alq.files.coding`; the lower bytes, as random as the signs, stay as they are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.weight import MultiBitWeight
from .bits import cut, pack_numbers, packed_size, unpack_numbers

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


# ---------------------------------------------------------------------------- entropy coding

TOP, LEAST = 2**32, 2**24  # the interval's width at the start, and where it is widened again
PRIOR = 0.4  # of each count, before anything was seen
MOST_PER_BYTE = 2**14  # numbers that a byte of code can stand for: its bits are never certain


class Counts:
    """How often the bit at each (context, place) was 0 and 1."""

    def __init__(self) -> None:
        self.seen: dict[tuple, list[float]] = {}

    def share(self, key: tuple, width: int) -> int:
        """What part of an interval of `width` stands for 0: neither none nor all of it."""
        zeros, ones = self.seen.setdefault(key, [PRIOR, PRIOR])
        part = int(65536 * zeros / (zeros + ones))
        return (width >> 16) * min(max(part, 16), 65520)

    def add(self, key: tuple, bit: int) -> None:
        self.seen[key][bit] += 1


def encode(sequences: Sequence[Sequence[int]], bits: int, follow: bool = False) -> bytes:
    """Numbers below 2^bits, sequence after sequence, each with counts of its own.

    `follow` makes the number before a number its context.
    """
    low, width, out = 0, TOP - 1, bytearray()

    def put(counts: Counts, key: tuple, bit: int) -> int:
        nonlocal low, width
        zero = counts.share(key, width)
        if bit:
            low, width = low + zero, width - zero
        else:
            width = zero
        if low >= TOP:
            low -= TOP
            carry(out)
        while width < LEAST:
            out.append(low >> 24)
            low, width = (low << 8) % TOP, width << 8
        counts.add(key, bit)
        return bit

    for numbers in sequences:
        counts, context = Counts(), 0
        for number in numbers:
            _walk(bits, context, lambda key, at, n=number, c=counts: put(c, key, n >> at & 1))
            context = number if follow else 0
    end = _shortest(low, width, out)  # may carry into `out`
    return bytes(out) + end


def decode(data: bytes, lengths: Sequence[int], bits: int, follow: bool = False) -> list[list[int]]:
    """The inverse of `encode`. ValueError for more numbers than `data` can stand for."""
    if min(lengths, default=0) < 0 or sum(lengths) > MOST_PER_BYTE * (len(data) + 8):
        raise ValueError(f"{sum(lengths)} numbers in {len(data)} bytes")
    value, at, width = int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 4, TOP - 1

    def take(counts: Counts, key: tuple) -> int:
        nonlocal value, at, width
        zero = counts.share(key, width)
        bit = int(value >= zero)
        if bit:
            value, width = value - zero, width - zero
        else:
            width = zero
        while width < LEAST:
            value, width = (value << 8) + (data[at] if at < len(data) else 0), width << 8
            at += 1
        counts.add(key, bit)
        return bit

    sequences = []
    for length in lengths:
        counts, numbers, context = Counts(), [], 0
        for _ in range(length):
            number = _walk(bits, context, lambda key, at, c=counts: take(c, key))
            numbers.append(number)
            context = number if follow else 0
        sequences.append(numbers)
    return sequences


def _walk(bits: int, context: int, code: Callable[[tuple, int], int]) -> int:
    """One number, bit by bit from the highest; `code` codes the bit of a place and returns it."""
    number = 0
    for at in reversed(range(bits)):
        number = 2 * number + code((context, at, number), at)
    return number


def carry(out: bytearray) -> None:
    """Add 1 to the number that `out` spells."""
    at = len(out) - 1
    while out[at] == 255:
        out[at] = 0
        at -= 1
    out[at] += 1


def _shortest(low: int, width: int, out: bytearray) -> bytes:
    """The fewest bytes that end up in the interval; the decoder reads zeros behind the last one."""
    for kept in range(5):
        unit = 2 ** (8 * (4 - kept))
        value = -(-low // unit) * unit
        if value < low + width:
            if value >= TOP:
                value -= TOP
                carry(out)
            return value.to_bytes(4, "big")[:kept]
    raise AssertionError("four bytes always suffice")
