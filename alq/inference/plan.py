"""Which way computes a layer: a rule on its shape, its bits and the number of output positions.

The rule adds up what each way does, in nanoseconds of the CPU that the figures were measured on
(docs/inference.md, one core with AVX-512); what counts is their ratio. It is a rule and no
measurement, so that the same network computes the same numbers in every run.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

from ..method.structures import Grouping
from .rows import SHORT, outputs_at_a_time, row_bytes

KINDS = ("float32", "int16")  # of tables
# Positions a tile, of each kind of tables and other way that is a kernel.
LANES = {"float32": 16, "int16": 32, "dots": 1, "popcounts": 16, "popcount dots": 1}
MOST_PLANES = 4  # of bits that inputs in binary bases are counted in
COUNTED = ("popcounts", "popcount dots")  # the ways that count
OF_LINEAR = ("dots", "popcount dots")  # those that compute linear layers only
WAYS = ("tables", "dots", "popcounts", "popcount dots", "decoded", "held")
# Of tables: a call; a table of four inputs; a look-up; a row beside its look-ups; an output.
CALL, TABLE, WRITE = 12e3, 9.5, 2.5
LOOK_UP, ROW = {"float32": 0.165, "int16": 0.19}, 0.7
UNUSED = 1.15  # tiles of a convolution, over those that its outputs would fill, where not counted
# Of dots: a call; each position; a word of 64 signs.
DOTS_CALL, DOTS_POSITION, DOTS_WORD = 12e3, 0.2e3, 1.7
# Of popcounts: a call; an input; a word of the input in all planes; a row; of a plane, a word; an
# output of a tile.
COUNTED_CALL, ENCODE, MEET, COUNTED_ROW, COUNT, COUNTED_WRITE = 18e3, 0.3, 12.0, 0.8, 0.37, 1.0
# Of popcount dots: a call; each position; a row; of a plane, a row's sum; of a plane, a word.
ONE_CALL, ONE_POSITION, ONE_ROW, ONE_SUM, ONE_WORD = 17e3, 0.1e3, 1.1, 0.7, 0.12
# Of all ways but these two, where the input is in binary bases: a call; an input to put on a level.
FEED_CALL, FEED = 9e3, 0.15
# What layers may hold in float32, too; a call of one that does.
MOST_HELD, HELD_SHARE, HELD_CALL = 2**14, 1 / 64, 9e3
# Of decoding: a call; a weight to clear and lay out; a sign; then PyTorch's product, of which a
# call, a weight that is read, and multiplied once a position.
DECODE_CALL, CLEAR, SIGN = 30e3, 0.04, 0.08
JOIN = 0.5  # of each block decoded but the first, an output
PRODUCT_CALL = {True: 2e3, False: 26e3}  # of a linear layer, of a convolution
READ = {True: 0.10, False: 0.45}
PRODUCT_LANES = 16  # outputs at a time, of a convolution
MULTIPLY = {True: 0.030, False: 0.0075}


@lru_cache(512)
def choose(
    grouping: Grouping, R: int, positions: int, kind: str, planes: int = 0, held: bool = False,
    unused: float = UNUSED, unused_counted: float = UNUSED,
) -> str:  # fmt: skip
    """Return which way computes a layer of R rows (`alq.inference.compute`): what costs least.

    `positions` are the batch's for a linear layer, batch x height x width for a convolution's
    output; `kind` is that of the tables; `planes` those of an input in binary bases, if it is;
    `held` tells whether the float32 weights are there, too; `unused` how many tiles there are over
    those that the positions would fill, `unused_counted` likewise of popcounts.
    """
    if is_linear(grouping):
        unused = unused_counted = 1.0
    found = costs(grouping, R, positions, kind, unused)
    if held:
        found["held"] = HELD_CALL + product(grouping, positions)
    if planes:
        feed = FEED_CALL + positions * grouping.shape[1] * FEED
        found = {way: cost + feed for way, cost in found.items()}
    if can_count(grouping, planes):
        found |= costs_of_counting(grouping, R, positions, planes, unused_counted)
    return min(found, key=found.__getitem__)


@lru_cache(512)
def can_count(grouping: Grouping, planes: int) -> bool:
    """Return whether popcounts compute a layer.

    A row's weights must be of one kernel position, as a position's inputs are words; words of few
    signs would be mostly empty.
    """
    return 1 <= planes <= MOST_PLANES and grouping.n > SHORT and at_one_position(grouping)


def is_linear(grouping: Grouping) -> bool:
    return len(grouping.shape) == 2


def at_one_position(grouping: Grouping) -> bool:
    """Return whether each group's weights meet inputs of one position, side by side."""
    return grouping.structure == "pixelwise" or math.prod(grouping.shape[2:]) == 1


def costs_of_counting(
    grouping: Grouping, R: int, positions: int, planes: int, unused: float
) -> dict[str, float]:
    """Return what popcounts cost, in nanoseconds; arguments as for `choose`."""
    O, C = grouping.shape[:2]
    words = row_bytes(grouping.n) / 8  # of a row
    tiles = math.ceil(positions / LANES["popcounts"]) * unused
    a_row = COUNTED_ROW + planes * words * COUNT
    a_tile = grouping.G // O * words * MEET + R * a_row + O * COUNTED_WRITE
    found = {"popcounts": COUNTED_CALL + positions * C * ENCODE + tiles * a_tile}
    if is_linear(grouping):
        a_row = ONE_ROW + planes * (ONE_SUM + words * ONE_WORD)
        found["popcount dots"] = ONE_CALL + positions * (ONE_POSITION + R * a_row)
    return found


def product(grouping: Grouping, positions: int) -> float:
    """Return what PyTorch's product with the weights costs, in nanoseconds."""
    O, linear = grouping.shape[0], is_linear(grouping)
    at_once = 1 if linear else PRODUCT_LANES
    used = math.ceil(O / at_once) * at_once / O
    a_weight = READ[linear] + MULTIPLY[linear] * positions * used
    return PRODUCT_CALL[linear] + grouping.numel * a_weight


def held_layers(sizes: Mapping[str, int]) -> list[str]:
    """Return the names of layers that keep their float32 weights, by their numbers of weights.

    Those are the smallest, up to MOST_HELD weights each and HELD_SHARE of the network's together.
    """
    found, left = [], HELD_SHARE * sum(sizes.values())
    for name in sorted(sizes, key=sizes.__getitem__):
        left -= sizes[name]
        if left >= 0 and sizes[name] <= MOST_HELD:
            found.append(name)
    return found


def costs(grouping: Grouping, R: int, positions: int, kind: str, unused: float) -> dict[str, float]:
    """Return what each way costs, in nanoseconds; arguments as for `choose`."""
    O = grouping.shape[0]
    size = grouping.numel
    signs = 8 * row_bytes(grouping.n)  # of a row, with those behind n
    inputs = grouping.G // O * signs  # of an output
    tiles = math.ceil(positions / LANES[kind]) * unused
    a_row = signs / 4 * LOOK_UP[kind] + max(1, signs / 64) * ROW
    a_tile = inputs / 4 * TABLE + R * a_row + O * WRITE * LANES[kind] / 16
    blocks = math.ceil(O / outputs_at_a_time(O, size))
    found = {
        "tables": CALL + tiles * a_tile,
        "decoded": DECODE_CALL
        + size * CLEAR
        + R * signs * SIGN
        + (blocks - 1) * O * positions * JOIN
        + product(grouping, positions),
    }
    if is_linear(grouping):
        words = R * max(1, signs / 64)
        found["dots"] = DOTS_CALL + positions * (DOTS_POSITION + words * DOTS_WORD)
    return found
