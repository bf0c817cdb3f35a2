"""One position at a time, and weights themselves, from the signs: masked sums over whole rows."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import cgutils

from .jobs import VECTOR
from .outputs import rows_of_block
from .vectors import (
    F32,
    FLAGS,
    FLOATS,
    I16,
    as_bytes,
    as_floats_at,
    as_ints,
    as_longs,
    compiled,
    constant,
    element,
    f32,
    i64,
    instructions,
    load,
    ones,
    splat,
    store,
    sum_of_lanes,
    types,
)


def chosen_lanes(b: Any, signs: Any, place: Any) -> Any:
    """Return the 16 signs that lie `place` vectors on, as flags."""
    return b.bitcast(element(b, signs, place, I16), FLAGS)


@instructions(f32)
def positive_sum(b: Any, signs: Any, x: Any, words: Any) -> Any:
    """Return the sum of the x whose sign is 1, of `words` times 32."""
    zero = ir.Constant(FLOATS, None)
    sums = [cgutils.alloca_once_value(b, zero) for _ in range(2)]
    with cgutils.for_range(b, words) as loop:
        for half, part in enumerate(sums):
            place = b.add(b.mul(loop.index, constant(2)), constant(half))
            value = load(b, b.add(x, b.mul(place, constant(VECTOR))), FLOATS)
            value = b.select(chosen_lanes(b, signs, place), value, zero)
            b.store(b.fadd(b.load(part), value), part)
    return sum_of_lanes(b, b.fadd(b.load(sums[0]), b.load(sums[1])))


@instructions(types.void)
def add_signed(b: Any, signs: Any, alpha: Any, w: Any, words: Any) -> None:
    """Add the float at `alpha` with each sign to those at `w`, `words` times 32 of them."""
    plus = splat(b, element(b, alpha, 0, F32))
    minus = b.fsub(ir.Constant(FLOATS, None), plus)
    with cgutils.for_range(b, b.mul(words, constant(2))) as loop:
        place = b.add(w, b.mul(loop.index, constant(VECTOR)))
        value = b.select(chosen_lanes(b, signs, loop.index), plus, minus)
        store(b, b.fadd(load(b, place, FLOATS), value), place)


ones_of_word = instructions(i64)(ones)


@compiled
def fetch_inputs(job, memory, position, s):
    """Put the inputs of segment s into the scratch, and return their sum."""
    n, places = job.n, 8 * job.row_bytes
    padded, positive = carray(as_floats_at(memory), places), memory + 4 * places
    padded[:n] = carray(as_floats_at(job.x + 4 * (position * job.channels + s * n)), n)
    padded[n:] = 0
    carray(as_bytes(positive), job.row_bytes)[:] = 255
    return positive_sum(positive, memory, places // 32)


@compiled
def fetch_words(job, memory, place, s):
    """Put the words of segment s, for each plane, into the scratch, and return their sum."""
    words = job.row_bytes // 8
    bits = carray(as_longs(memory), (job.planes, words))
    flat = carray(as_longs(memory + job.flat), (job.steps - job.flat) // 8)
    betas = carray(as_floats_at(job.betas), job.planes)
    total, place = np.float32(0), place + s * words * job.planes * job.channel_step
    for w in range(words):
        for m in range(job.planes):
            bits[m, w] = flat[place + (w * job.planes + m) * job.channel_step]
            total += betas[m] * np.float32(ones_of_word(bits[m, w]))
    return total


@compiled
def count_positive(job, memory, r):
    """Return the sum of those inputs in binary bases whose sign in row r is 1."""
    words = job.row_bytes // 8
    bits = carray(as_longs(memory), (job.planes, words))
    signs = carray(as_longs(job.signs + job.row_bytes * r), words)
    betas = carray(as_floats_at(job.betas), job.planes)
    found = np.float32(0)
    for m in range(job.planes):
        count = 0
        for w in range(words):
            count += ones_of_word(signs[w] & bits[m, w])
        found += betas[m] * np.float32(count)
    return found


@compiled
def dots(job, memory, first, last, block):
    """Compute a linear layer's positions `first` to `last` for a block of outputs.

    A dot product with signs is twice its positive part less the sum of all. The scratch holds the
    inputs of a segment: in whole words, and as many signs, all positive; or bits.
    """
    edges = carray(as_longs(job.edges), job.blocks + 1)
    own, bias = slice(edges[block], edges[block + 1]), carray(as_floats_at(job.bias), job.O)
    for position in range(first, last):
        y = carray(as_floats_at(job.y + 4 * position * job.O), job.O)
        y[own] = bias[own]
        for s in range(job.segments):
            row, end = rows_of_block(job, s, block)
            if row == end:
                continue
            if job.planes:
                total = fetch_words(job, memory, position - first, s)
            else:
                total = fetch_inputs(job, memory, position, s)
            alpha, outputs = carray(as_floats_at(job.alpha), end), carray(as_ints(job.outputs), end)
            for r in range(row, end):
                if job.planes:
                    part = count_positive(job, memory, r)
                else:
                    part = positive_sum(job.signs + job.row_bytes * r, memory, job.row_bytes // 4)
                y[outputs[r]] += alpha[r] * (part + part - total)


@compiled
def decode(job, block):
    """Write the weights (outputs, S, places) of a block of outputs to their place in y."""
    places, S = 8 * job.row_bytes, job.segments
    edges = carray(as_longs(job.edges), job.blocks + 1)
    size = places * S  # of an output
    own, count = edges[block] - edges[0], edges[block + 1] - edges[block]
    carray(as_floats_at(job.y + 4 * size * own), size * count)[:] = 0
    for s in range(S):
        row, end = rows_of_block(job, s, block)
        outputs = carray(as_ints(job.outputs), end)
        for r in range(row, end):
            weight = job.y + 4 * (size * (outputs[r] - edges[0]) + places * s)
            add_signed(job.signs + job.row_bytes * r, job.alpha + 4 * r, weight, places // 32)
