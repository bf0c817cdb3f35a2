"""Adaptive arithmetic coding of small numbers: what is frequent takes few bits.

A number is coded bit by bit, high bits first. Each bit's probability is estimated from how often
it was 0 and 1 before, at the same place (the bits above it) and in the same context, so that
nothing but the code itself is stored. The coder is the usual one: an interval that narrows by
each bit's probability, kept in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
