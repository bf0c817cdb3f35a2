"""Two ways to make a packed file smaller than the paper counts: float16, and entropy coding.

Both change the flat tensors of `alq.files.bits` on their way into the file and back:

    float16   coordinates and the float32 values of the rest take 2 bytes each
    coded     bitwidths, and the highest byte of each of these floats (sign and exponent), are
              entropy-coded; the lower bytes, as random as the signs, stay as they are

The entropy coder is a range coder of bits: those of a number, from the highest, each with the
probability that the bits before it and the numbers so far suggest.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice, repeat

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.weight import MultiBitWeight
from .bits import join_bytes, pack_bitwidths, unpack_bitwidths

DTYPES = {"float32": torch.float32, "float16": torch.float16}
COORDINATES, REST = "coordinates", "rest.float32"  # the tensors of floats


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


def compress(tensors: dict[str, Tensor], names: dict) -> dict[str, Tensor]:
    """Return `tensors` in the smaller form that `names["compact"]` asks for."""
    kind, coded = DTYPES[names["compact"]["floats"]], names["compact"]["coded"]
    small = dict(tensors)
    for key in (k for k in (COORDINATES, REST) if k in tensors):
        values = tensors[key].to(kind)
        if not torch.equal(values.float(), tensors[key]):
            raise InputError(f"{key}: not float16 values; alq.round_floats makes them so")
        small[key] = encode_floats(values) if coded else values
    if coded:
        bits = unpack_bitwidths(tensors["bitwidths"], names["layers"])
        data = encode([b.tolist() for b in bits], 4, follow=True)
        small["bitwidths"] = join_bytes([np.frombuffer(data, np.uint8)])
    return small


def expand(small: dict[str, Tensor], names: dict) -> dict[str, Tensor]:
    """Return the tensors that `compress` was given; raise what nonsense in `names` raises."""
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


def encode_floats(values: Tensor) -> Tensor:
    """Return (N,) floats as the lower bytes of all, byte by byte, then the coded highest bytes."""
    planes = values.numpy().view(np.uint8).reshape(-1, values.itemsize).T  # low bytes first
    highest = np.frombuffer(encode([planes[-1].tolist()], 8), np.uint8)
    return join_bytes([planes[:-1].reshape(-1), highest])


def decode_floats(coded: Tensor, count: int, floats: str) -> Tensor:
    """Return the (count,) values of type `floats` that `encode_floats` was given."""
    data, lower = coded.numpy(), DTYPES[floats].itemsize - 1  # bytes of each value
    planes = np.empty((lower + 1, count), np.uint8)
    planes[:-1] = data[: lower * count].reshape(lower, count)
    planes[-1] = decode(data[lower * count :].tobytes(), [count], 8)[0]
    return torch.from_numpy(np.ascontiguousarray(planes.T).view(floats).reshape(-1))


# ---------------------------------------------------------------------------- entropy coding

TOP, LEAST = 2**32, 2**24  # the interval's width at the start, and where it is widened again
PRIOR = 0.4  # of each count, before anything was seen
MOST_PER_BYTE = 2**14  # numbers that a byte of code can stand for: its bits are never certain


class Encoder:
    """Narrows an interval by every bit; its bytes spell a number in what is left."""

    def __init__(self) -> None:
        self.low, self.width = 0, TOP - 1  # of the interval, in units of the last digit
        self.digits: list[int] = []  # to base 256; above 255 where a carry is still to be made

    def code(self, zeros: int, bit: int) -> int:
        """Keep the part that stands for `bit`; of 65536 parts `zeros` stand for 0."""
        split = (self.width >> 16) * zeros
        if bit:
            self.low, self.width = self.low + split, self.width - split
        else:
            self.width = split
        while self.width < LEAST:
            self.digits.append(self.low >> 24)
            self.low, self.width = self.low % LEAST << 8, self.width << 8
        return bit

    def finish(self) -> bytes:
        """Return the fewest bytes that, with zeros behind them, spell a number in the interval."""
        kept = next(k for k in range(5) if -self.low % 256 ** (4 - k) < self.width)
        number = self.low + -self.low % 256 ** (4 - kept)
        digits = [*self.digits, number >> 24, *(number % LEAST).to_bytes(3, "big")]
        carry = 0
        for place in reversed(range(len(digits))):
            carry, digits[place] = divmod(digits[place] + carry, 256)
        return bytes(digits[: len(self.digits) + kept])


class Decoder:
    """Follows an `Encoder` through its intervals to the number that its bytes spell."""

    def __init__(self, data: bytes) -> None:
        self.bytes = chain(data, repeat(0))
        self.value = int.from_bytes(islice(self.bytes, 4), "big")  # from the interval's beginning
        self.width = TOP - 1

    def code(self, zeros: int, bit: int) -> int:
        """Return the bit that the encoder was given; the `bit` given here does not matter."""
        split = (self.width >> 16) * zeros
        bit = int(self.value >= split)
        if bit:
            self.value, self.width = self.value - split, self.width - split
        else:
            self.width = split
        while self.width < LEAST:
            self.value, self.width = self.value << 8 | next(self.bytes), self.width << 8
        return bit


def encode(sequences: Sequence[Sequence[int]], bits: int, follow: bool = False) -> bytes:
    """Return the code of numbers below 2^bits, sequence after sequence, each counted anew.

    `follow` lets the probabilities depend on the number before, too.
    """
    encoder = Encoder()
    for numbers in sequences:
        code_numbers(encoder, numbers, bits, follow)
    return encoder.finish()


def decode(data: bytes, lengths: Sequence[int], bits: int, follow: bool = False) -> list[list[int]]:
    """Return the numbers that `encode` was given; ValueError if `data` cannot hold so many."""
    if min(lengths, default=0) < 0 or sum(lengths) > MOST_PER_BYTE * (len(data) + 8):
        raise ValueError(f"{sum(lengths)} numbers in {len(data)} bytes")
    decoder = Decoder(data)
    return [code_numbers(decoder, repeat(0, length), bits, follow) for length in lengths]


def code_numbers(
    coder: Encoder | Decoder, numbers: Iterable[int], bits: int, follow: bool
) -> list[int]:
    """Encode `numbers`, or decode as many, whatever they are; return what was coded."""
    # How often a bit was 0 and 1, by the number before and the bits before, a 1 in front of them.
    counts: dict[tuple[int, int], list[float]] = defaultdict(lambda: [PRIOR, PRIOR])
    found, context = [], 0
    for number in numbers:
        prefix = 1
        for place in reversed(range(bits)):
            zeros, ones = seen = counts[context, prefix]
            share = int(65536 * zeros / (zeros + ones))
            bit = coder.code(min(max(share, 16), 65520), number >> place & 1)
            seen[bit] += 1
            prefix = 2 * prefix + bit
        found.append(prefix - 2**bits)
        context = found[-1] if follow else 0
    return found
