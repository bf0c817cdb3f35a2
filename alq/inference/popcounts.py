"""Layers whose inputs are in binary bases, from the bits of both: by counting ones.

The inputs are x_hat = sum_m beta_m c_m with c_m in {0, 1} (`alq.inference.planes`), the weights of
a row alpha s with s = 2 b - 1 in {-1, +1}, b its bits. So a row adds to its output

    alpha sum_m beta_m sum_j s_j c_mj = alpha (sum_m 2 beta_m ones(b & c_m) - total)
    total = sum_m beta_m ones(c_m)                                   of the inputs, not of the row

A word of 64 weights at 16 positions is for each m two vectors of 64-bit words, the even and the odd
positions': each takes one `and`, one count and one addition. What rounds is in float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

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

BYTES = ir.VectorType(ir.IntType(8), 16)
INTS = ir.VectorType(I32, 16)
BLOCK = 4096  # inputs that stay in the fastest cache


def same(number: int, kind: ir.VectorType) -> ir.Constant:
    """Return `number` in all lanes."""
    return ir.Constant(kind, [number] * kind.count)


def as_counts(b: Any, even: Any, odd: Any) -> Any:
    """Return the counts of even and odd positions as 16 floats in order."""
    both = b.or_(even, b.shl(odd, same(32, LONGS)))
    return b.sitofp(b.bitcast(both, INTS), FLOATS)


def factors(b: Any, betas: Any, planes: int) -> list:
    """Return the floats at `betas`, each in all lanes."""
    return [splat(b, load(b, b.add(betas, constant(4 * m)), F32)) for m in range(planes)]


def half_words(b: Any, x: Any, taps: Any, zeros: Any, planes: int) -> list:
    """Return for each plane the bits of 32 inputs at 16 positions, one position a lane.

    Arguments as for `tables_builder`; the inputs are bytes, whose bit m is that of plane m.
    """
    words = [cgutils.alloca_once_value(b, ir.Constant(INTS, None)) for _ in range(planes)]
    for word in words:
        b.store(ir.Constant(INTS, None), word)
    with cgutils.for_range(b, constant(4)) as loop:
        parts = [b.lshr(b.load(word), same(8, INTS)) for word in words]
        for j in range(24, 32):  # the upper eight bits; those before move down
            place = b.add(b.mul(loop.index, constant(8)), constant(j - 24))
            tap = load(b, b.add(taps, b.mul(place, constant(8))), I64)
            inside = b.icmp_signed(">=", tap, constant(0))
            code = b.zext(load(b, b.select(inside, b.add(x, tap), zeros), BYTES), INTS)
            for m in range(planes):
                bit = b.and_(b.shl(code, same(j - m, INTS)), same(1 << j, INTS))
                parts[m] = b.or_(parts[m], bit)
        for word, part in zip(words, parts, strict=True):
            b.store(part, word)
    return [b.load(word) for word in words]


def packer(planes: int) -> Callable:
    """Return the intrinsic (packed, words, x, taps, zeros, betas): write `words` words.

    A word is for each plane the vectors of the even and of the odd positions. Behind the last word
    come the totals.
    """

    @intrinsic
    def pack(
        typing: Any, packed: Any, words: Any, x: Any, taps: Any, zeros: Any, betas: Any
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            packed, words, x, taps, zeros, betas = arguments
            low, beta = same(2**32 - 1, LONGS), factors(b, betas, planes)
            total = cgutils.alloca_once_value(b, ir.Constant(FLOATS, None))
            b.store(ir.Constant(FLOATS, None), total)
            with cgutils.for_range(b, words) as loop:
                here = b.add(taps, b.mul(loop.index, constant(64 * 8)))
                place = b.add(packed, b.mul(loop.index, constant(2 * planes * VECTOR)))
                halves = [
                    half_words(b, x, b.add(here, constant(k)), zeros, planes) for k in (0, 32 * 8)
                ]
                for m, parts in enumerate(zip(*halves, strict=True)):
                    first, second = (b.bitcast(part, LONGS) for part in parts)
                    even = b.or_(b.and_(first, low), b.shl(second, same(32, LONGS)))
                    odd = b.or_(
                        b.lshr(first, same(32, LONGS)), b.and_(second, same(-(2**32), LONGS))
                    )
                    store(b, even, b.add(place, constant(2 * m * VECTOR)), VECTOR)
                    store(b, odd, b.add(place, constant((2 * m + 1) * VECTOR)), VECTOR)
                    product = b.fmul(beta[m], as_counts(b, ones(b, even), ones(b, odd)))
                    b.store(b.fadd(b.load(total), product), total)
            behind = b.add(packed, b.mul(words, constant(2 * planes * VECTOR)))
            store(b, b.load(total), behind, VECTOR)
            return context.get_dummy_value()

        return types.void(i64, i64, i64, i64, i64, i64), generate

    return pack


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
            zero = ir.Constant(LONGS, None)
            counts = [cgutils.alloca_once_value(b, zero) for _ in range(2 * planes)]
            with cgutils.for_range(b, rows) as row:
                for count in counts:
                    b.store(zero, count)
                own = b.add(signs, b.mul(b.mul(row.index, words), constant(8)))
                with cgutils.for_range(b, words) as loop:
                    bits = load(b, b.add(own, b.mul(loop.index, constant(8))), I64)
                    one = b.insert_element(ir.Constant(LONGS, ir.Undefined), bits, constant(0))
                    order = ir.Constant(ir.VectorType(I32, 8), [0] * 8)
                    bits = b.shuffle_vector(one, one, order)
                    place = b.add(packed, b.mul(loop.index, constant(2 * planes * VECTOR)))
                    for k, count in enumerate(counts):
                        plane = load(b, b.add(place, constant(k * VECTOR)), LONGS, VECTOR)
                        b.store(b.add(b.load(count), ones(b, b.and_(plane, bits))), count)
                value = minus
                for m in range(planes):
                    count = as_counts(b, b.load(counts[2 * m]), b.load(counts[2 * m + 1]))
                    value = b.fadd(value, b.fmul(twice[m], count, flags=FUSED), flags=FUSED)
                place = b.mul(row.index, constant(4))
                output = b.zext(load(b, b.add(outputs, place), I32), I64)
                y = b.add(tile, b.mul(output, constant(VECTOR)))
                product = b.fmul(splat(b, load(b, b.add(alpha, place), F32)), value, flags=FUSED)
                store(b, b.fadd(load(b, y, FLOATS, VECTOR), product, flags=FUSED), y, VECTOR)
            return context.get_dummy_value()

        return types.void(*[i64] * 8), generate

    return add_rows


assert MOST_PLANES == 4
pack_1, pack_2, pack_3, pack_4 = map(packer, range(1, 5))
add_1, add_2, add_3, add_4 = map(rows_adder, range(1, 5))


@compiled
def add_segment(planes, packed, words, x, taps, zeros, betas, signs, first, last, alpha, out, tile):
    """Pack a segment's inputs for a tile, and add the rows `first` to `last` to it."""
    signs += 8 * words * first
    a, o, count = alpha.ctypes.data + 4 * first, out.ctypes.data + 4 * first, last - first
    if planes == 1:
        pack_1(packed, words, x, taps, zeros, betas)
        add_1(packed, words, signs, count, a, o, tile, betas)
    elif planes == 2:
        pack_2(packed, words, x, taps, zeros, betas)
        add_2(packed, words, signs, count, a, o, tile, betas)
    elif planes == 3:
        pack_3(packed, words, x, taps, zeros, betas)
        add_3(packed, words, signs, count, a, o, tile, betas)
    else:
        pack_4(packed, words, x, taps, zeros, betas)
        add_4(packed, words, signs, count, a, o, tile, betas)


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
                add_segment(
                    planes, packed, words, begin, taps.ctypes.data + 8 * s * places, zeros,
                    betas.ctypes.data, signs, begin_row, end_row, alpha, outputs, sums,
                )  # fmt: skip
        own = y[image * steps[1] * steps[2] + edges[block] :]
        offsets = bias[edges[block] : edges[block + 1]]
        write_tile(
            scratch[used : used + O * lanes], lanes, scales, offsets, targets[t], own, steps[2]
        )


@compiled
def encode(x, middle, flips, start, codes):
    """Write the codes (N,) uint8 of x (N,): `start`, changed by `flips[k]` where x > middle[k]."""
    for begin in range(0, len(x), BLOCK):
        values, found = x[begin : begin + BLOCK], codes[begin : begin + BLOCK]
        found[:] = start
        for k in range(len(middle)):
            low, flip = middle[k], flips[k]
            for i in range(len(values)):  # which becomes vector instructions
                found[i] ^= np.uint8(values[i] > low) * flip
