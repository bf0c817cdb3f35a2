"""Which way computes a layer: a rule on its shape, its bits and the number of output positions.

The rule adds up what each way does, in nanoseconds of the CPU that the figures were measured on
(docs/inference.md, one core with AVX-512); what counts is their ratio. It is a rule and no
measurement, so that the same network computes the same numbers in every run.
"""

import math

from ..method.structures import Grouping
from .rows import row_bytes

LANES = {"float32": 16, "int16": 32}  # positions a tile
# Of tables: a call; a table of four inputs; a look-up; a row beside its look-ups; an output.
CALL, TABLE, WRITE = 60e3, 9.5, 8.0
LOOK_UP, ROW = {"float32": 0.16, "int16": 0.19}, 0.7
UNUSED = 1.15  # tiles of a convolution, over those that its outputs would fill
# Of dots: a call; each position; a word of 64 signs.
DOTS_CALL, DOTS_POSITION, DOTS_WORD = 18e3, 9e3, 1.7
# Of decoding: a call; a weight to clear and lay out; a sign; then PyTorch's product, of which a
# weight is read, and multiplied once a position.
DECODE_CALL, CLEAR, SIGN = 30e3, 0.05, 0.12
READ = {True: 0.10, False: 0.45}  # of a linear layer, of a convolution
MULTIPLY = {True: 0.030, False: 0.0095}


def choose(grouping: Grouping, R: int, positions: int, kind: str, linear: bool) -> str:
    """Return "tables", "dots" or "decoded" for a layer of R rows, whichever costs least.

    `positions` are the batch's for a linear layer, batch x height x width for a convolution's
    output; `kind` is that of the tables.
    """
    found = costs(grouping, R, positions, kind, linear)
    return min(found, key=found.__getitem__)


def costs(grouping: Grouping, R: int, positions: int, kind: str, linear: bool) -> dict[str, float]:
    """Return what each way costs, in nanoseconds; arguments as for `choose`."""
    O = grouping.shape[0]
    size = grouping.numel
    signs = 8 * row_bytes(grouping.n)  # of a row, with those behind n
    inputs = grouping.G // O * signs  # of an output
    tiles = math.ceil(positions / LANES[kind]) * (1 if linear else UNUSED)
    a_row = signs / 4 * LOOK_UP[kind] + max(1, signs / 64) * ROW
    a_tile = inputs / 4 * TABLE + R * a_row + O * WRITE * LANES[kind] / 16
    product = size * (READ[linear] + MULTIPLY[linear] * positions)
    found = {
        "tables": CALL + tiles * a_tile,
        "decoded": DECODE_CALL + size * CLEAR + R * signs * SIGN + product,
    }
    if linear:
        words = R * max(1, signs / 64)
        found["dots"] = DOTS_CALL + positions * (DOTS_POSITION + words * DOTS_WORD)
    return found
