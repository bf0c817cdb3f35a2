"""A range coder of bits, for numbers that are not all equally likely.

The bits of a number, from the highest, are each coded with the probability that the bits before it
and the numbers so far suggest. Nothing is stored but the code: both sides learn the probabilities.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice, repeat

TOP, LEAST = 2**32, 2**24  # the interval's width at the start, and where it is widened again
PRIOR = 0.4  # of each count, before anything was seen
# Numbers that a byte of code can stand for: of 65536 parts each bit takes 16 at least, so that one
# number in 22 710 costs a byte. All of them may be zeros, which the end of a file leaves out.
MOST_PER_BYTE = 2**15
FREE_BYTES = 8  # that numbers may come without, as the code ends in the middle of some


class Encoder:
    """Narrows an interval by every bit; its bytes spell a number in what is left."""

    def __init__(self) -> None:
        self.low, self.width = 0, TOP - 1  # of the interval, in units of the last digit
        self.digits: list[int] = []  # to base 256; above 255 where a carry is still to be made
        self.count = 0  # of numbers

    @property
    def shifts(self) -> int:
        """Whole bytes so far; a decoder has as many at the same place."""
        return len(self.digits)

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

    def finish_shortest(self) -> bytes:
        """Return `finish` without the zeros at its end, but for what so many numbers need.

        A decoder reads zeros behind the end, and no more than MOST_PER_BYTE numbers a byte.
        """
        least = -(-self.count // MOST_PER_BYTE) - FREE_BYTES
        return self.finish().rstrip(b"\0").ljust(max(least, 0), b"\0")


class Decoder:
    """Follows an `Encoder` through its intervals to the number that its bytes spell."""

    def __init__(self, data: bytes) -> None:
        self.bytes, self.length = chain(data, repeat(0)), len(data)
        self.count = 0  # of numbers
        self.value = int.from_bytes(islice(self.bytes, 4), "big")  # from the interval's beginning
        self.width, self.shifts = TOP - 1, 0

    def expect(self, count: int) -> None:
        """Raise ValueError if the code cannot hold `count` more numbers, before memory is taken."""
        if not 0 <= count <= MOST_PER_BYTE * (self.length + FREE_BYTES) - self.count:
            raise ValueError(f"{count} numbers in {self.length} bytes")

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
            self.shifts += 1
        return bit


def decode(data: bytes, lengths: Sequence[int], bits: int, follow: bool = False) -> list[list[int]]:
    """Return the numbers below 2^bits that a code is of, sequence after sequence.

    Each sequence was counted anew; with `follow` the probabilities depend on the number before,
    too. Raises: ValueError if `data` cannot hold so many.
    """
    decoder = Decoder(data)
    return [list(decode_numbers(decoder, length, bits, follow)) for length in lengths]


def decode_numbers(
    decoder: Decoder, count: int, bits: int, follow: bool = False,
    contexts: Iterable[int] = repeat(0),
) -> bytearray:  # fmt: skip
    """Return the next `count` numbers; ValueError if the code cannot hold so many."""
    decoder.expect(count)
    return code_numbers(decoder, repeat(0, count), bits, follow, contexts)


def code_numbers(
    coder: Encoder | Decoder, numbers: Iterable[int], bits: int, follow: bool = False,
    contexts: Iterable[int] = repeat(0),
) -> bytearray:  # fmt: skip
    """Encode `numbers` of up to 8 bits, or decode as many, whatever they are; return the coded.

    Each of `contexts` is of one number, known to both sides; those of one context are counted
    together. With `follow` the number before takes its place.
    """
    # How often a bit was 0 and 1, by the context and the bits before, a 1 in front of them.
    counts: dict[tuple[int, int], list[float]] = defaultdict(lambda: [PRIOR, PRIOR])
    found, last = bytearray(), 0
    for number, given in zip(numbers, contexts):  # noqa: B905 (either may have no end)
        prefix, context = 1, last if follow else given
        for place in reversed(range(bits)):
            zeros, ones = seen = counts[context, prefix]
            share = int(65536 * zeros / (zeros + ones))
            bit = coder.code(min(max(share, 16), 65520), number >> place & 1)
            seen[bit] += 1
            prefix = 2 * prefix + bit
        last = prefix - 2**bits
        found.append(last)
    coder.count += len(found)
    return found
