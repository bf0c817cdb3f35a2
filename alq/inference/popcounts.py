"""Layers whose inputs are in binary bases, from the bits of both: by counting ones.

The inputs are x_hat = sum_m beta_m c_m with c_m in {0, 1} (`alq.inference.planes`), the weights of
a row alpha s with s = 2 b - 1 in {-1, +1}, b its bits. So a row adds to its output

    alpha sum_m beta_m sum_j s_j c_mj = alpha (sum_m 2 beta_m ones(b & c_m) - total)
    total = sum_m beta_m ones(c_m)                                   of the inputs, not of the row

The inputs of a position are words of 64 bits (`alq.inference.inputs`). A word of weights at 16
positions is for each m two vectors of words: each takes one `and`, one count and one addition.
What rounds is in float32.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import carray
from numba.core import cgutils
from numba.extending import intrinsic

from .outputs import rows_of_block, scale_lanes, write_tile
from .plan import MOST_PLANES
from .vectors import (
    F32,
    FLOATS,
    FUSED,
    I32,
    I64,
    LONGS,
    VECTOR,
    as_floats_at,
    as_longs,
    compiled,
    constant,
    i64,
    load,
    ones,
    shuffled,
    splat,
    store,
    types,
)  # fmt: skip

FEW = (1, 2, 4, 8)  # words of a row that are written out, in registers as far as these go
INTS = ir.VectorType(I32, 8)


def as_counts(b: Any, low: Any, high: Any) -> Any:
    """Return the counts of the first and the last eight positions as floats."""
    both = shuffled(b, b.trunc(low, INTS), b.trunc(high, INTS), list(range(16)))
    return b.sitofp(both, FLOATS)


def same(number: int) -> ir.Constant:
    """Return `number` in all lanes."""
    return ir.Constant(LONGS, [number] * LONGS.count)


def add_word(b: Any, bits: Any, vectors: list, counts: list) -> list:
    """Return the counts with those of the inputs `vectors`, in the word at the address `bits`."""
    word = splat(b, load(b, bits, I64), LONGS) if bits else same(-1)
    found = [ones(b, b.and_(vector, word)) for vector in vectors]
    return [b.add(*pair) for pair in zip(counts, found, strict=True)]


def rows_adder(b: Any, planes: int, x: Any, step: Any, words: Any, betas: Any) -> Callable:
    """Return what writes the addition of the rows, given the inputs of a tile.

    It takes `few`, whether a row has exactly so many words, which are then written out.
    """
    beta = [splat(b, load(b, b.add(betas, constant(4 * m)), F32)) for m in range(planes)]
    zeros = [ir.Constant(LONGS, None)] * (2 * planes)
    sums = [cgutils.alloca_once(b, LONGS) for _ in zeros]

    def inputs(word: Any) -> list:
        first = b.add(x, b.mul(b.mul(word, constant(planes)), step))
        places = [b.add(first, b.mul(step, constant(m))) for m in range(planes)]
        return [load(b, b.add(p, constant(k)), LONGS) for p in places for k in (0, VECTOR)]

    def counts_of_many(own: Any) -> list:
        for total, zero in zip(sums, zeros, strict=True):
            b.store(zero, total)
        with cgutils.for_range(b, words) as loop:
            bits = b.add(own, b.mul(loop.index, constant(8))) if own else None
            found = add_word(b, bits, inputs(loop.index), [b.load(x) for x in sums])
            for total, value in zip(sums, found, strict=True):
                b.store(value, total)
        return [b.load(total) for total in sums]

    def weighted(counts: list) -> Any:
        value = ir.Constant(FLOATS, None)
        for m in range(planes):
            count = as_counts(b, counts[2 * m], counts[2 * m + 1])
            value = b.fadd(value, b.fmul(beta[m], count, flags=FUSED), flags=FUSED)
        return value

    def add_all(number: int, signs: Any, rows: Any, alpha: Any, outputs: Any, tile: Any) -> None:
        few = [inputs(constant(w)) for w in range(number)]
        counts = zeros if few else counts_of_many(None)
        for vectors in few:
            counts = add_word(b, None, vectors, counts)
        total = weighted(counts)
        with cgutils.for_range(b, rows) as row:
            own = b.add(signs, b.mul(b.mul(row.index, words), constant(8)))
            counts = zeros if few else counts_of_many(own)
            for w, vectors in enumerate(few):
                counts = add_word(b, b.add(own, constant(8 * w)), vectors, counts)
            value = weighted(counts)
            value = b.fsub(b.fadd(value, value), total)
            place = b.mul(row.index, constant(4))
            output = b.zext(load(b, b.add(outputs, place), I32), I64)
            y = b.add(tile, b.mul(output, constant(VECTOR)))
            factor = splat(b, load(b, b.add(alpha, place), F32))
            value = b.fmul(factor, value, flags=FUSED)
            store(b, b.fadd(load(b, y, FLOATS, VECTOR), value, flags=FUSED), y, VECTOR)

    return add_all


@intrinsic
def add_rows(
    typing: Any, planes: Any, x: Any, step: Any, words: Any, betas: Any, signs: Any, rows: Any,
    alpha: Any, outputs: Any, tile: Any,
) -> Any:  # fmt: skip
    """Add each row to its output's vector in the tile.

    The arguments are addresses, but for the numbers `planes`, `words`, of a row, `step`, bytes from
    a plane's word of an input to the next plane's or word's, and `rows`.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        number, x, step, words, betas, *rows = arguments
        for planes in range(1, MOST_PLANES + 1):
            with b.if_then(b.icmp_signed("==", number, constant(planes))):
                add_all = rows_adder(b, planes, x, step, words, betas)
                many = ir.Constant(ir.IntType(1), 1)
                for few in FEW:
                    with b.if_then(b.icmp_signed("==", words, constant(few))):
                        add_all(few, *rows)
                    many = b.and_(many, b.icmp_signed("!=", words, constant(few)))
                with b.if_then(many):
                    add_all(0, *rows)
        return context.get_dummy_value()

    return types.void(*[i64] * 10), generate


@compiled
def count_tiles(job, memory, image, first, last, block):
    """Compute what `alq.inference.tables.tiles` does.

    The scratch holds the scales of the lanes and a tile.
    """
    scales, tile = memory, memory + VECTOR
    starts, taps = carray(as_longs(job.starts), job.tiles), carray(as_longs(job.taps), job.segments)
    edges = carray(as_longs(job.edges), job.blocks + 1)
    flat = memory + job.flat + carray(as_longs(job.shifts), job.blocks)[block] * job.item
    sums = tile - 4 * edges[block] * job.lanes
    for t in range(first, last):
        carray(as_floats_at(tile), (edges[block + 1] - edges[block]) * job.lanes)[:] = 0
        begin = flat + job.item * (starts[t] - starts[first])
        for s in range(job.segments):
            row, end = rows_of_block(job, s, block)
            if row < end:
                add_rows(
                    job.planes, begin + taps[s], 8 * job.channel_step, job.words, job.betas,
                    job.signs + job.row_bytes * row, end - row, job.alpha + 4 * row,
                    job.outputs + 4 * row, sums,
                )  # fmt: skip
        scale_lanes(job, memory, scales, t)
        write_tile(job, tile, scales, image, t, block)
