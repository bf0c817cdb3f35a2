"""Convolutions and linear layers at many positions, from the signs, by tables.

Four inputs have 16 signed sums. A table holds them for a tile of output positions, and four signs
of a row name one of its vectors. A word of 64 signs is 16 such look-ups and additions in place of
64 multiplications; the tables, 16 KB, stay in the fastest cache while all rows pass by:

    for each segment and word of 64 inputs:
        table[j][c] = sum of +-x, signs of the bits of c        for j < 16, c < 16
        for each row r:  tile[output_r] += alpha_r sum_j table[j][c_rj]

A tile has 16 positions with float32 tables, 32 with int16.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .jobs import VECTOR
from .outputs import add_row, output_of_row, rows_of_block
from .prepared import TABLES
from .vectors import (
    FLOATS,
    I32,
    I64,
    SHORTS,
    as_floats,
    compiled,
    constant,
    element,
    instructions,
    load,
    store,
    types,
)


def signed_sums(b: Any, x: list, floats: bool) -> list:
    """Return the 16 sums of +-x[0] to +-x[3]; bit i of the place is x[i]'s sign."""
    add, sub = (b.fadd, b.fsub) if floats else (b.add, b.sub)
    zero = ir.Constant(x[0].type, None)

    def pair(u: Any, v: Any) -> list:
        both, first = add(u, v), sub(u, v)
        return [sub(zero, both), first, sub(zero, first), both]

    low, high = pair(*x[:2]), pair(*x[2:])
    return [add(low[c & 3], high[c >> 2]) for c in range(16)]


@instructions(types.void)
def build(b: Any, shorts: Any, tables: Any, count: Any, x: Any, taps: Any, zeros: Any) -> None:
    """Write `count` tables, of shorts or of floats.

    `taps` is the address of where the vectors lie behind x, four a table, in bytes; of one that is
    negative the vector at `zeros` is taken.
    """

    def vector(place: Any, kind: ir.VectorType) -> Any:
        tap = element(b, taps, place, I64)
        inside = b.icmp_signed(">=", tap, constant(0))
        return load(b, b.select(inside, b.add(x, tap), zeros), kind)

    for number, kind in enumerate((FLOATS, SHORTS)):
        with (
            b.if_then(b.icmp_signed("==", shorts, constant(number))),
            cgutils.for_range(b, count) as loop,
        ):
            places = [b.add(b.mul(loop.index, constant(4)), constant(k)) for k in range(4)]
            table = b.add(tables, b.mul(loop.index, constant(16 * VECTOR)))
            inputs = [vector(place, kind) for place in places]
            for c, value in enumerate(signed_sums(b, inputs, kind is FLOATS)):
                store(b, value, b.add(table, constant(VECTOR * c)), VECTOR)


def look_up(b: Any, tables: Any, word: Any, count: int, kind: ir.VectorType) -> Any:
    """Return the sum of the vectors of `count` tables that the word's groups of 4 bits name."""
    add = b.fadd if kind is FLOATS else b.add
    parts: list[Any] = [None, None]
    for j in range(count):
        shift = 4 * j - 6  # to the place of the vector in bytes
        bits = b.lshr(word, constant(shift)) if shift > 0 else b.shl(word, constant(-shift))
        place = b.add(b.add(tables, b.and_(bits, constant(0x3C0))), constant(16 * VECTOR * j))
        value = load(b, place, kind, VECTOR)
        parts[j & 1] = value if parts[j & 1] is None else add(parts[j & 1], value)
    return add(*parts)


@instructions(types.void)
def add_rows(
    b: Any, shorts: Any, tables: Any, signs: Any, stride: Any, rows: Any, alpha: Any, outputs: Any,
    sums: Any,
) -> None:  # fmt: skip
    """Add alpha times what `look_up` finds to the output's sums, row after row.

    `signs` is the address of the first row's word, `stride` the bytes to the next; a row of 4 bytes
    has half a word.
    """

    def add_all(kind: ir.VectorType, count: int) -> None:
        with cgutils.for_range(b, rows) as loop:
            word = load(b, b.add(signs, b.mul(loop.index, stride)), I64 if count == 16 else I32)
            word = word if count == 16 else b.zext(word, I64)
            size = VECTOR if kind is FLOATS else 2 * VECTOR
            y, factor = output_of_row(b, loop.index, alpha, outputs, sums, size)
            found = look_up(b, tables, word, count, kind)
            add_row(b, y, factor, [found] if kind is FLOATS else as_floats(b, found))

    half = b.icmp_signed("==", stride, constant(4))
    for number, kind in enumerate((FLOATS, SHORTS)):
        with b.if_then(b.icmp_signed("==", shorts, constant(number))):
            with b.if_then(half):
                add_all(kind, 8)
            with b.if_then(b.not_(half)):
                add_all(kind, 16)


@compiled
def look_up_rows(job, tables, inputs, block, sums):
    """Add all rows of a block to their outputs' sums, segment by segment.

    `inputs` is the address of those of the tile; `tables` that of the scratch.
    """
    shorts, step, zeros = int(job.item == 2), min(64, 8 * job.row_bytes), tables + TABLES
    for s in range(job.segments):
        row, end = rows_of_block(job, s, block)
        if row == end:
            continue
        alpha, outputs = job.alpha + 4 * row, job.outputs + 4 * row
        for w in range(job.places // step):
            taps = job.taps + 8 * (s * job.places + w * step)
            build(shorts, tables, step // 4, inputs, taps, zeros)
            word = job.signs + row * job.row_bytes + w * step // 8
            add_rows(shorts, tables, word, job.row_bytes, end - row, alpha, outputs, sums)
