"""Inputs in binary bases as words of bits, as `alq.inference.popcounts` counts them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import (
    F32,
    FLOATS,
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


pack_1, pack_2, pack_3, pack_4 = map(packer, range(1, 5))


@compiled
def pack(planes, packed, words, x, taps, zeros, betas):
    """Write the words of 1 to 4 planes, as `packer` explains."""
    if planes == 1:
        pack_1(packed, words, x, taps, zeros, betas)
    elif planes == 2:
        pack_2(packed, words, x, taps, zeros, betas)
    elif planes == 3:
        pack_3(packed, words, x, taps, zeros, betas)
    else:
        pack_4(packed, words, x, taps, zeros, betas)
