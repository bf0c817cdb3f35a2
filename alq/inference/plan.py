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
MOST_HELD, HELD_SHARE = 2**14, 1 / 64  # of what is held in float32, too: see `held_layers`
UNUSED = 1.15  # tiles of a convolution, over those that its outputs would fill, where not counted
PRODUCT_LANES = 16  # outputs of a convolution at a time, in PyTorch's product

# What follows is time in nanoseconds. Of tables:
CALL = 12e3
TABLE = 9.5  # a table of four inputs
LOOK_UP = {"float32": 0.165, "int16": 0.19}  # one, of each kind
ROW = 0.7  # a row, beside its look-ups
WRITE = 2.5  # an output
# Of dots:
DOTS_CALL = 12e3
DOTS_POSITION = 0.2e3  # a position
DOTS_WORD = 1.7  # a word of 64 signs
# Of popcounts:
COUNTED_CALL = 18e3
ENCODE = 0.3  # an input
MEET = 12.0  # a word of the input in all planes
COUNTED_ROW = 0.8  # a row
COUNT = 0.37  # a word of a plane
COUNTED_WRITE = 1.0  # an output of a tile
# Of popcount dots:
ONE_CALL = 17e3
ONE_POSITION = 0.1e3  # a position
ONE_ROW = 1.1  # a row
ONE_SUM = 0.7  # the sum of a row, of a plane
ONE_WORD = 0.12  # a word of a plane
# Of all ways but these two, where the input is in binary bases:
FEED_CALL = 9e3
FEED = 0.15  # an input to put on a level
# Of what is held:
HELD_CALL = 9e3
# Of decoding, beside the product:
DECODE_CALL = 30e3
CLEAR = 0.04  # a weight to clear and lay out
SIGN = 0.08  # a sign
JOIN = 0.5  # an output, of each block decoded but the first
# Of PyTorch's product, by whether the layer is linear or a convolution:
PRODUCT_CALL = {True: 2e3, False: 26e3}
READ = {True: 0.10, False: 0.45}  # a weight to read
MULTIPLY = {True: 0.030, False: 0.0075}  # a weight to multiply, at each position


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
