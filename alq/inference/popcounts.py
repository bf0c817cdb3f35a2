"""Layers whose inputs are in binary bases, from the bits of both: by counting ones.

The inputs are x_hat = sum_m beta_m c_m with c_m in {0, 1} (`alq.inference.planes`), the weights of
a row alpha s with s = 2 b - 1 in {-1, +1}, b its bits. So a row adds to its output

    alpha sum_m beta_m sum_j s_j c_mj = alpha (sum_m 2 beta_m ones(b & c_m) - total)
    total = sum_m beta_m ones(c_m)                                   of the inputs, not of the row

A word of 64 weights at 16 positions is for each m two vectors of 64-bit words, the even and the odd
positions': each takes one `and`, one count and one addition. `alq.inference.inputs` makes them.
What rounds is in float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .inputs import as_counts, factors, pack
from .plan import MOST_PLANES
from .tables import write_tile
from .vectors import (
    F32,
    FLOATS,
    FUSED,
    I32,
    I64,
    LONGS,
    VECTOR,
    compiled,
    constant,
    i64,
    load,
    ones,
    splat,
    store,
    types,
)  # fmt: skip

FEW = (1, 2, 4, 8)  # words of a row that are written out, in registers as far as these go


def add_word(b: Any, bits: Any, vectors: list, counts: list) -> list:
    """Return the counts with those of the word at the address `bits` and the inputs `vectors`."""
    one = b.insert_element(ir.Constant(LONGS, ir.Undefined), load(b, bits, I64), constant(0))
    word = b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, 8), [0] * 8))
    found = [ones(b, b.and_(vector, word)) for vector in vectors]
    return [b.add(*pair) for pair in zip(counts, found, strict=True)]


def rows_adder(planes: int) -> Callable:
    """Return the intrinsic (packed, words, signs, rows, alpha, outputs, tile, betas).

    It adds each row to its output's vector in the tile; `packed` is what `packer` wrote, the other
    arguments are addresses.
    """

    @intrinsic
    def add_rows(
        typing: Any, packed: Any, words: Any, signs: Any, rows: Any, alpha: Any, outputs: Any,
        tile: Any, betas: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            packed, words, signs, rows, alpha, outputs, tile, betas = arguments
            twice = [b.fadd(beta, beta) for beta in factors(b, betas, planes)]
            behind = b.add(packed, b.mul(words, constant(2 * planes * VECTOR)))
            minus = b.fsub(ir.Constant(FLOATS, None), load(b, behind, FLOATS, VECTOR))
            zeros = [ir.Constant(LONGS, None)] * (2 * planes)
            sums = [cgutils.alloca_once(b, LONGS) for _ in zeros]

            def inputs(word: Any) -> list:
                place = b.add(packed, b.mul(word, constant(2 * planes * VECTOR)))
                places = [b.add(place, constant(k * VECTOR)) for k in range(2 * planes)]
                return [load(b, place, LONGS, VECTOR) for place in places]

            def counts_of_many(own: Any) -> list:
                for total, zero in zip(sums, zeros, strict=True):
                    b.store(zero, total)
                with cgutils.for_range(b, words) as loop:
                    bits = b.add(own, b.mul(loop.index, constant(8)))
                    found = add_word(b, bits, inputs(loop.index), [b.load(x) for x in sums])
                    for total, value in zip(sums, found, strict=True):
                        b.store(value, total)
                return [b.load(total) for total in sums]

            def add_all(few: list) -> None:
                with cgutils.for_range(b, rows) as row:
                    own = b.add(signs, b.mul(b.mul(row.index, words), constant(8)))
                    counts = zeros if few else counts_of_many(own)
                    for w, vectors in enumerate(few):
                        counts = add_word(b, b.add(own, constant(8 * w)), vectors, counts)
                    value = minus
                    for m in range(planes):
                        count = as_counts(b, counts[2 * m], counts[2 * m + 1])
                        value = b.fadd(value, b.fmul(twice[m], count, flags=FUSED), flags=FUSED)
                    place = b.mul(row.index, constant(4))
                    output = b.zext(load(b, b.add(outputs, place), I32), I64)
                    y = b.add(tile, b.mul(output, constant(VECTOR)))
                    factor = splat(b, load(b, b.add(alpha, place), F32))
                    value = b.fmul(factor, value, flags=FUSED)
                    store(b, b.fadd(load(b, y, FLOATS, VECTOR), value, flags=FUSED), y, VECTOR)

            many = ir.Constant(ir.IntType(1), 1)
            for few in FEW:
                with b.if_then(b.icmp_signed("==", words, constant(few))):
                    add_all([inputs(constant(w)) for w in range(few)])
                many = b.and_(many, b.icmp_signed("!=", words, constant(few)))
            with b.if_then(many):
                add_all([])
            return context.get_dummy_value()

        return types.void(*[i64] * 8), generate

    return add_rows


assert MOST_PLANES == 4
add_1, add_2, add_3, add_4 = map(rows_adder, range(1, 5))


@compiled
def add_rows(planes, packed, words, signs, rows, alpha, outputs, tile, betas):
    """Add the rows for 1 to 4 planes, as `rows_adder` explains."""
    if planes == 1:
        add_1(packed, words, signs, rows, alpha, outputs, tile, betas)
    elif planes == 2:
        add_2(packed, words, signs, rows, alpha, outputs, tile, betas)
    elif planes == 3:
        add_3(packed, words, signs, rows, alpha, outputs, tile, betas)
    else:
        add_4(packed, words, signs, rows, alpha, outputs, tile, betas)


@compiled
def count_tiles(
    planes, signs, alpha, outputs, bounds, edges, shifts, taps, x, starts, targets, betas, bias, y,
    steps, scratch, first, last,
):  # fmt: skip
    """Compute the units `first` to `last`, as `alq.inference.tables.tiles` does.

    x is the address of bytes, whose bits are the inputs' in each of the planes; `betas` (planes,)
    are what these count. The scratch holds at least the packed inputs, totals and zeros of a
    segment, and a tile.
    """
    S, places = taps.shape
    lanes, words = targets.shape[1], places // 64
    blocks, count = len(shifts), len(starts)
    packed = scratch.ctypes.data
    used = (2 * planes * words + 2) * VECTOR // 4
    zeros = packed + 4 * used - VECTOR
    scratch[used - VECTOR // 4 : used] = 0
    scales = np.ones(lanes, np.float32)
    for unit in range(first, last):
        tile_number, block = divmod(unit, blocks)
        image, t = divmod(tile_number, count)
        O = edges[block + 1] - edges[block]
        scratch[used : used + O * lanes] = 0
        begin = x + image * steps[0] + starts[t] + shifts[block]
        sums = packed + 4 * (used - edges[block] * lanes)
        for s in range(S):
            begin_row, end_row = bounds[s, block], bounds[s, block + 1]
            if begin_row < end_row:
                here = taps.ctypes.data + 8 * s * places
                pack(planes, packed, words, begin, here, zeros, betas.ctypes.data)
                a, o = alpha.ctypes.data + 4 * begin_row, outputs.ctypes.data + 4 * begin_row
                own, rows = signs + 8 * words * begin_row, end_row - begin_row
                add_rows(planes, packed, words, own, rows, a, o, sums, betas.ctypes.data)
        own = y[image * steps[1] * steps[2] + edges[block] :]
        offsets = bias[edges[block] : edges[block + 1]]
        write_tile(
            scratch[used : used + O * lanes], lanes, scales, offsets, targets[t], own, steps[2]
        )
