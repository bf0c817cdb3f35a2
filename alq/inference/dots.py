"""One position at a time, and weights themselves, from the signs: masked sums over whole rows."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import cgutils
from numba.extending import intrinsic

from .outputs import rows_of_block
from .vectors import (
    F32,
    FLAGS,
    FLOATS,
    I16,
    VECTOR,
    as_bytes,
    as_floats_at,
    as_ints,
    as_longs,
    compiled,
    constant,
    f32,
    i64,
    job_at,
    kernel,
    load,
    next_unit,
    ones,
    own_scratch,
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
def start_outputs(job, picture, block):
    """Return the outputs of a picture, those of the block being the bias."""
    edges = carray(as_longs(job.edges), job.blocks + 1)
    y = carray(as_floats_at(job.y + 4 * picture * job.O), job.O)
    y[edges[block] : edges[block + 1]] = carray(as_floats_at(job.bias), job.O)[
        edges[block] : edges[block + 1]
    ]
    return y


@kernel
def dots(address):
    """Compute a linear layer; a unit is one input and a block of outputs.

    A dot product with signs is twice its positive part less the sum of all. A thread's scratch
    holds the inputs of a segment in whole words, and as many signs, all positive.
    """
    job, values = job_at(address), own_scratch(address)
    places, n = 8 * job.row_bytes, job.n
    positive = values + 4 * places
    padded = carray(as_floats_at(values), places)
    padded[:] = 0
    carray(as_bytes(positive), job.row_bytes)[:] = 255
    while True:
        unit = next_unit(address)
        if unit >= job.units:
            break
        picture, block = divmod(unit, job.blocks)
        y = start_outputs(job, picture, block)
        for s in range(job.segments):
            first, last = rows_of_block(job, s, block)
            if first == last:
                continue
            padded[:n] = carray(as_floats_at(job.x + 4 * (picture * job.channels + s * n)), n)
            total = positive_sum(positive, values, places // 32)
            alpha = carray(as_floats_at(job.alpha), last)
            outputs = carray(as_ints(job.outputs), last)
            for r in range(first, last):
                part = positive_sum(job.signs + job.row_bytes * r, values, places // 32)
                y[outputs[r]] += alpha[r] * (part + part - total)


@kernel
def count_dots(address):
    """Compute a linear layer from the bits of its inputs; units as in `dots`.

    A thread's scratch holds the words of a segment for each plane.
    """
    job, memory = job_at(address), own_scratch(address)
    planes, words = job.planes, job.words
    bits = carray(as_longs(memory), (planes, words))
    betas = carray(as_floats_at(job.betas), planes)
    while True:
        unit = next_unit(address)
        if unit >= job.units:
            break
        picture, block = divmod(unit, job.blocks)
        y = start_outputs(job, picture, block)
        for s in range(job.segments):
            first, last = rows_of_block(job, s, block)
            if first == last:
                continue
            total, place = np.float32(0), picture + s * words * planes * job.channel_step
            flat = carray(as_longs(job.flat), place + words * planes * job.channel_step)
            for w in range(words):
                for m in range(planes):
                    bits[m, w] = flat[place + (w * planes + m) * job.channel_step]
                    total += betas[m] * np.float32(ones_of_word(bits[m, w]))
            signs = carray(as_longs(job.signs), (last, words))
            alpha = carray(as_floats_at(job.alpha), last)
            outputs = carray(as_ints(job.outputs), last)
            for r in range(first, last):
                value = -total
                for m in range(planes):
                    count = 0
                    for w in range(words):
                        count += ones_of_word(signs[r, w] & bits[m, w])
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
