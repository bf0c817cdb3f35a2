"""One position at a time, and weights themselves, from the signs: masked sums over whole rows."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import (
    F32,
    FLAGS,
    FLOATS,
    I16,
    VECTOR,
    compiled,
    constant,
    f32,
    i64,
    load,
    ones,
    splat,
    store,
    types,
)  # fmt: skip


def chosen_lanes(b: Any, signs: Any, place: Any) -> Any:
    """Return the 16 signs that lie `place` vectors on, as flags."""
    return b.bitcast(load(b, b.add(signs, b.mul(place, constant(2))), I16), FLAGS)


@intrinsic
def positive_sum(typing: Any, signs: Any, x: Any, words: Any) -> Any:
    """Return the sum of the x whose sign is 1, of `words` times 32."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        signs, x, words = arguments
        zero = ir.Constant(FLOATS, None)
        sums = [cgutils.alloca_once_value(b, zero) for _ in range(2)]
        with cgutils.for_range(b, words) as loop:
            for half, part in enumerate(sums):
                place = b.add(b.mul(loop.index, constant(2)), constant(half))
                value = load(b, b.add(x, b.mul(place, constant(VECTOR))), FLOATS)
                value = b.select(chosen_lanes(b, signs, place), value, zero)
                b.store(b.fadd(b.load(part), value), part)
        both = b.fadd(b.load(sums[0]), b.load(sums[1]))
        kind = ir.FunctionType(F32, [F32, FLOATS])
        reduce = cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fadd.v16f32")
        return b.call(reduce, [ir.Constant(F32, 0.0), both], fastmath=("reassoc",))

    return f32(i64, i64, i64), generate


@intrinsic
def add_signed(typing: Any, signs: Any, alpha: Any, w: Any, words: Any) -> Any:
    """Add alpha with each sign to the floats at `w`, `words` times 32 of them."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        signs, alpha, w, words = arguments
        plus = splat(b, alpha)
        minus = b.fsub(ir.Constant(FLOATS, None), plus)
        with cgutils.for_range(b, b.mul(words, constant(2))) as loop:
            place = b.add(w, b.mul(loop.index, constant(VECTOR)))
            value = b.select(chosen_lanes(b, signs, loop.index), plus, minus)
            store(b, b.fadd(load(b, place, FLOATS), value), place)
        return context.get_dummy_value()

    return types.void(i64, f32, i64, i64), generate


@intrinsic
def ones_of_word(typing: Any, word: Any) -> Any:
    """Return how many ones a word of 64 bits has."""
    return i64(i64), lambda context, b, signature, arguments: ones(b, arguments[0])


@compiled
def dots(signs, stride, alpha, outputs, first, x, totals, y, begin, end):
    """Add rows `begin` to `end` of a linear layer at one input x (S, places) to y (O,).

    `totals` (S,) are the sums of x; a dot product with signs is twice the positive part less that.
    """
    S, places = x.shape
    for s in range(S):
        values = x.ctypes.data + 4 * places * s
        for r in range(max(begin, first[s]), min(end, first[s + 1])):
            part = positive_sum(signs + stride * r, values, places // 32)
            y[outputs[r]] += alpha[r] * (part + part - totals[s])


@compiled
def count_dots(signs, alpha, outputs, first, packed, totals, betas, y, begin, end):
    """Add rows `begin` to `end` (R, words) of a linear layer at one input to y (O,).

    The input is `packed` (S, planes, words); its `totals` (S,), `alq.inference.popcounts` explains.
    """
    S, planes, words = packed.shape
    for s in range(S):
        for r in range(max(begin, first[s]), min(end, first[s + 1])):
            value = -totals[s]
            for m in range(planes):
                count = 0
                for w in range(words):
                    count += ones_of_word(signs[r, w] & packed[s, m, w])
                value += np.float32(2) * betas[m] * np.float32(count)
            y[outputs[r]] += alpha[r] * value


@compiled
def decode(signs, stride, alpha, outputs, first, w, begin, end):
    """Add the rows of outputs `begin` to `end` to their weights w (end - begin, S, places)."""
    _, S, places = w.shape
    for s in range(S):
        for r in range(first[s], first[s + 1]):
            o = outputs[r] - begin
            if 0 <= o < end - begin:
                place = w.ctypes.data + 4 * places * (S * o + s)
                add_signed(signs + stride * r, alpha[r], place, places // 32)
