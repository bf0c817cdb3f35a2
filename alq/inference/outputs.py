"""Which rows a block of outputs has, how they are added to a tile's sums, and these to outputs."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray

from .jobs import VECTOR
from .vectors import (
    F32,
    FLAGS,
    FLOATS,
    FUSED,
    I32,
    I64,
    as_floats_at,
    as_ints,
    as_longs,
    compiled,
    constant,
    element,
    first_lanes,
    instructions,
    load,
    splat,
    store,
    store_lanes,
    transposed,
    types,
)


@compiled
def rows_of_block(job, segment, block):
    """Return (begin, end): which rows of a segment are of a block of outputs."""
    first = carray(as_longs(job.first), job.segments + 1)
    begin, end = first[segment], first[segment + 1]
    outputs, edges = carray(as_ints(job.outputs), end), carray(as_longs(job.edges), job.blocks + 1)
    if edges[block] == 0 and edges[block + 1] == job.O:
        return begin, end
    own = outputs[begin:end]
    low, high = np.searchsorted(own, edges[block]), np.searchsorted(own, edges[block + 1])
    return begin + low, begin + high


def output_of_row(b: Any, row: Any, alpha: Any, outputs: Any, sums: Any, size: int) -> tuple:
    """Return where the sums of row number `row`'s output lie, of `size` bytes, and its alpha.

    It is asked before the row's own vectors are made. Asked after, VGG at batch 1 took 3% longer.
    """
    output = b.zext(element(b, outputs, row, I32), I64)
    y = b.add(sums, b.mul(output, constant(size)))
    return y, splat(b, element(b, alpha, row, F32))


def add_row(b: Any, y: Any, factor: Any, parts: list) -> None:
    """Add the factor times the vectors `parts` to those that lie side by side at y."""
    for part in parts:
        product = b.fmul(factor, part, flags=FUSED)
        store(b, b.fadd(load(b, y, FLOATS, VECTOR), product, flags=FUSED), y, VECTOR)
        y = b.add(y, constant(VECTOR))


@instructions(types.void)
def write_part(
    b: Any, tile: Any, row: Any, scales: Any, bias: Any, O: Any, targets: Any, y: Any, width: Any
) -> None:
    """Put up to 16 outputs at 16 positions, times their scales, and the bias at their targets.

    A row of the tile is an output, `row` bytes before the next. The outputs of a position lie side
    by side in y, from one position to the next `width` bytes apart.
    """
    scale, last, found = load(b, scales, FLOATS), b.sub(O, constant(1)), []
    for k in range(16):
        place = b.select(b.icmp_signed("<", constant(k), last), constant(k), last)
        offset = splat(b, element(b, bias, place, F32))
        value = load(b, b.add(tile, b.mul(row, place)), FLOATS, VECTOR)
        product = b.fmul(value, scale, flags=FUSED)
        found.append(b.fadd(product, offset, flags=FUSED))
    some, none = first_lanes(b, O), ir.Constant(FLAGS, None)
    for k, column in enumerate(transposed(b, found)):
        target = element(b, targets, k, I64)
        inside = b.icmp_signed(">=", target, constant(0))
        place = b.add(y, b.mul(b.select(inside, target, constant(0)), width))
        store_lanes(b, column, place, b.select(inside, some, none))


@compiled
def write_tile(job, tile, scales, image, t, block):
    """Write a tile's sums (O, lanes) of a block, times the lanes' scales, and the bias."""
    edges = carray(as_longs(job.edges), job.blocks + 1)
    targets = job.targets + 8 * t * job.lanes
    for o in range(edges[block], edges[block + 1], 16):
        count = min(16, edges[block + 1] - o)
        for q in range(0, job.lanes, 16):
            part = tile + 4 * ((o - edges[block]) * job.lanes + q)
            y = job.y + 4 * (image * job.output_step * job.O + o)
            write_part(
                part, 4 * job.lanes, scales + 4 * q, job.bias + 4 * o, count, targets + 8 * q, y,
                4 * job.O,
            )  # fmt: skip


@compiled
def scale_lanes(job, memory, scales, t):
    """Write the scale of each lane of a tile, its picture's step, to the address `scales`."""
    found = carray(as_floats_at(scales), job.lanes)
    targets = carray(as_longs(job.targets), (job.tiles, job.lanes))
    for q in range(job.lanes):
        found[q] = 1
        if job.item == 2:
            picture = max(targets[t, q], 0) // job.output_area
            found[q] = carray(as_floats_at(memory + job.steps), job.pictures)[picture]
