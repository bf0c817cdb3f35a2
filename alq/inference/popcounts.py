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

from .jobs import VECTOR
from .outputs import add_row, output_of_row, rows_of_block
from .plan import MOST_PLANES
from .vectors import (
    F32,
    FLOATS,
    FUSED,
    I32,
    I64,
    LONGS,
    as_longs,
    compiled,
    constant,
    element,
    instructions,
    load,
    ones,
    shuffled,
    splat,
    types,
)

FEW = (1, 2, 4, 8)  # words of a row that are written out, in registers as far as these go
INTS = ir.VectorType(I32, 8)
ALL = ir.Constant(LONGS, [-1] * LONGS.count)  # ones


def inputs_of_word(b: Any, x: Any, step: Any, planes: int, place: Any) -> list:
    """Return the words of all planes at 16 positions, two vectors a plane."""
    first = b.add(x, b.mul(b.mul(place, constant(planes)), step))
    places = [b.add(first, b.mul(step, constant(m))) for m in range(planes)]
    return [load(b, b.add(p, constant(k)), LONGS) for p in places for k in (0, VECTOR)]


def add_word(b: Any, word: Any, vectors: list, counts: list) -> list:
    """Return the counts with those of the inputs `vectors` where the word has ones."""
    found = [ones(b, b.and_(vector, word)) for vector in vectors]
    return [b.add(*pair) for pair in zip(counts, found, strict=True)]


def counter(b: Any, x: Any, step: Any, words: Any, planes: int, few: int) -> Callable:
    """Return what writes the counting of a row, given what writes the reading of its words.

    That returns the counts at 16 positions, two vectors a plane. Where rows have `few` words, the
    inputs are read here, once for all rows; where that is 0 they have any number, `words`.
    """
    zeros = [ir.Constant(LONGS, None)] * (2 * planes)
    kept = [inputs_of_word(b, x, step, planes, constant(w)) for w in range(few)]
    sums = [cgutils.alloca_once(b, LONGS) for _ in zeros]

    def count_few(word_at: Callable) -> list:
        counts = zeros
        for w, vectors in enumerate(kept):
            counts = add_word(b, word_at(constant(w)), vectors, counts)
        return counts

    def count_any(word_at: Callable) -> list:
        for total, zero in zip(sums, zeros, strict=True):
            b.store(zero, total)
        with cgutils.for_range(b, words) as loop:
            vectors = inputs_of_word(b, x, step, planes, loop.index)
            found = add_word(b, word_at(loop.index), vectors, [b.load(total) for total in sums])
            for total, value in zip(sums, found, strict=True):
                b.store(value, total)
        return [b.load(total) for total in sums]

    return count_few if few else count_any


def weighted(b: Any, counts: list, betas: list) -> Any:
    """Return the sum over the planes of beta times the counts, as floats."""
    value = ir.Constant(FLOATS, None)
    for m, beta in enumerate(betas):
        halves = [b.trunc(half, INTS) for half in counts[2 * m : 2 * m + 2]]
        count = b.sitofp(shuffled(b, *halves, list(range(16))), FLOATS)
        value = b.fadd(value, b.fmul(beta, count, flags=FUSED), flags=FUSED)
    return value


@instructions(types.void)
def add_rows(
    b: Any, planes: Any, few: Any, x: Any, step: Any, words: Any, betas: Any, signs: Any, rows: Any,
    alpha: Any, outputs: Any, sums: Any,
) -> None:  # fmt: skip
    """Add each row to its output's sums.

    The arguments are addresses, but for the numbers `planes`, `words`, of a row, `few`, the same if
    that is one of FEW, else 0, `rows`, and `step`, bytes from a plane's word of an input to the
    next plane's or word's.
    """

    def add_all(planes: int, few: int) -> None:
        beta = [splat(b, element(b, betas, m, F32)) for m in range(planes)]
        count = counter(b, x, step, words, planes, few)
        total = weighted(b, count(lambda place: ALL), beta)
        with cgutils.for_range(b, rows) as row:
            own = b.add(signs, b.mul(b.mul(row.index, words), constant(8)))

            def word_at(place: Any) -> Any:
                return splat(b, element(b, own, place, I64), LONGS)

            value = weighted(b, count(word_at), beta)
            value = b.fsub(b.fadd(value, value), total)
            add_row(b, *output_of_row(b, row.index, alpha, outputs, sums, VECTOR), [value])

    for number in range(1, MOST_PLANES + 1):
        with b.if_then(b.icmp_signed("==", planes, constant(number))):
            for count in (*FEW, 0):
                with b.if_then(b.icmp_signed("==", few, constant(count))):
                    add_all(number, count)


@compiled
def count_rows(job, inputs, block, sums):
    """Do what `alq.inference.tables.look_up_rows` does, for inputs in binary bases."""
    words = job.row_bytes // 8
    few = words if words in FEW else 0
    taps = carray(as_longs(job.taps), job.segments)
    for s in range(job.segments):
        row, end = rows_of_block(job, s, block)
        if row < end:
            add_rows(
                job.planes, few, inputs + taps[s], 8 * job.channel_step, words, job.betas,
                job.signs + row * job.row_bytes, end - row, job.alpha + 4 * row,
                job.outputs + 4 * row, sums,
            )  # fmt: skip
