"""How an input comes to lie as the tables read it, and how large its pictures are.

An input's channels lie side by side (PyTorch's channels_last), the tables read positions side by
side (`alq.inference.tiles`). 16 channels of 16 positions at a time are transposed in registers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray

from .inputs import encode_run
from .vectors import (
    F32,
    FLAGS,
    FLOATS,
    I16,
    I32,
    I64,
    as_floats_at,
    as_ints,
    as_longs,
    compiled,
    constant,
    fetch_ahead,
    first_lanes,
    i64,
    instructions,
    llvm,
    load,
    load_lanes,
    splat,
    store_lanes,
    sum_of_lanes,
    transposed,
    types,
)

INTS = ir.VectorType(I32, 16)
# The largest int16, less what the rounding of 64 inputs may add to their sum.
MOST_OF_SUM = 2**15 - 1 - 32
SCALED = 2**-7  # a power of two, with which the sum of 64 inputs is finite where they are
LEAST = 1e-30  # a smaller step is this: its inverse is a number


@instructions(types.void)
def move(
    b: Any, shorts: Any, source: Any, step: Any, positions: Any, channels: Any, target: Any,
    channel_step: Any, inverses: Any, inverse_step: Any,
) -> None:  # fmt: skip
    """Move up to 16 x 16 values, as shorts after a factor or as they are.

    The arguments: whether it is shorts; the address of a position's channels, bytes to the next
    position's, positions, channels; the address of the first channel's result, bytes to the next
    channel's; the address of the positions' factors, bytes from one to the next.
    """
    last, rows = b.sub(positions, constant(1)), []
    lanes, outside = first_lanes(b, positions), ir.Constant(FLAGS, None)
    some = first_lanes(b, channels)
    places = [b.select(b.icmp_signed("<", k, last), k, last) for k in map(constant, range(16))]
    for place in places:
        position = b.add(source, b.mul(step, place))
        fetch_ahead(b, position)
        rows.append(load_lanes(b, position, some))

    def write(kind: Callable, rows: list) -> None:
        for k, column in enumerate(transposed(b, rows)):
            inside = b.icmp_signed("<", constant(k), channels)
            flags = b.select(inside, lanes, outside)
            to = b.add(target, b.mul(channel_step, constant(k)))
            store_lanes(b, kind(b, column), to, flags)

    with b.if_else(b.icmp_signed("!=", shorts, constant(0))) as (then, otherwise):
        with then:
            each = [b.add(inverses, b.mul(inverse_step, place)) for place in places]
            factors = [splat(b, load(b, place, F32)) for place in each]
            write(rounded, [b.fmul(*pair) for pair in zip(rows, factors, strict=True)])
        with otherwise:
            write(lambda b, column: column, rows)


def rounded(b: Any, floats: Any) -> Any:
    """Return the nearest shorts."""
    whole = b.fptosi(llvm(b, "llvm.rint.v16f32", FLOATS, floats), INTS)
    return b.trunc(whole, ir.VectorType(I16, 16))


@compiled
def move_run(job, source, step, count, target, inverses):
    """Move all channels of up to 16 positions, `step` bytes from one to the next."""
    channel_step, shorts = job.item * job.channel_step, int(job.item == 2)
    for c in range(0, job.channels, 16):
        own, some, to = source + 4 * c, min(16, job.channels - c), target + channel_step * c
        move(shorts, own, step, count, some, to, channel_step, inverses, job.inverse_step)


@instructions(i64)
def largest_sum(b: Any, source: Any, count: Any, together: Any) -> Any:
    """Return the bits of the most that up to 64 floats add up to with any signs, times SCALED.

    If they do not meet `together`, but with others, it is 64 times the largest of them. As whole
    numbers, bits are in the order of the values; what is not finite comes last.
    """
    total, most = ir.Constant(FLOATS, None), ir.Constant(INTS, None)
    for k in range(4):
        lanes = first_lanes(b, b.sub(count, constant(16 * k)))
        value = b.bitcast(load_lanes(b, b.add(source, constant(64 * k)), lanes), INTS)
        value = b.and_(value, ir.Constant(INTS, [0x7FFFFFFF] * 16))
        most = b.select(b.icmp_signed(">", value, most), value, most)
        part = b.fmul(b.bitcast(value, FLOATS), ir.Constant(FLOATS, [SCALED] * 16))
        total = b.fadd(total, part)
    largest = b.bitcast(llvm(b, "llvm.vector.reduce.smax.v16i32", I32, most), F32)
    largest = b.fmul(largest, ir.Constant(F32, 64 * SCALED))
    chosen = b.select(b.icmp_signed("!=", together, constant(0)), sum_of_lanes(b, total), largest)
    return b.zext(b.and_(b.bitcast(chosen, I32), ir.Constant(I32, 0x7FFFFFFF)), I64)


@compiled
def measure(job, memory, image, begin):
    """Write the steps, and their inverses, of the pictures that have places from `begin` on.

    In its step no sum of a table's word is too large. What is not finite in it shows there.
    """
    bits = carray(as_ints(memory + job.steps), job.pictures)
    steps = carray(as_floats_at(memory + job.steps), job.pictures)
    inverses = carray(as_floats_at(memory + job.inverses), job.pictures)
    end = (begin + job.length - 1) // job.picture_places + 1
    for picture in range(begin // job.picture_places, min(job.pictures, end)):
        largest = 0
        for first in range(0, job.picture, job.inputs):
            source = job.x + 4 * (job.picture * (image * job.pictures + picture) + first)
            for own in range(0, job.inputs, 64):
                count = min(64, job.inputs - own)
                largest = max(largest, largest_sum(source + 4 * own, count, job.together))
        bits[picture] = largest
        step = steps[picture] / np.float32(MOST_OF_SUM * SCALED)
        if step == 0:
            step = np.float32(1)
        elif step < LEAST:
            step = np.float32(LEAST)
        steps[picture], inverses[picture] = step, np.float32(1) / step


@compiled
def lay_out(job, memory, image, begin):
    """Lay out an image's inputs at the places from `begin` on, as a `Tiling` reads them.

    Between them is what was there, zeros. Inputs in binary bases become words; return whether one
    is not finite.
    """
    rows = carray(as_longs(job.row_parts), (job.rows, 3))
    columns = carray(as_longs(job.column_parts), (job.columns, 3))
    step, flat, odd = 4 * job.channels * job.stride_x, memory + job.flat, 0
    end = (begin + job.length - 1) // job.plane_width + 1
    for row in range(begin // job.plane_width, min(job.plane_rows, end)):
        picture, y = divmod(row, job.plane_height)
        inverses = memory + job.inverses + 4 * picture
        for i in range(job.rows):
            to_y, from_y, height = rows[i]
            if y < to_y or y >= to_y + height:
                continue
            line = (image * job.pictures + picture) * job.height + from_y
            line = (line + (y - to_y) * job.stride_y) * job.width
            for j in range(job.columns):
                to_x, from_x, width = columns[j]
                place = row * job.plane_width + to_x - begin
                target = flat + job.item * ((i * job.columns + j) * job.length + place)
                source = job.x + 4 * job.channels * (line + from_x)
                last = min(width, job.length - place)
                for x in range(max(0, -place), last, 16):
                    own, count, to = source + step * x, min(16, last - x), target + job.item * x
                    if job.planes:
                        odd |= encode_run(job, own, step, count, to)
                    else:
                        move_run(job, own, step, count, to, inverses + job.inverse_step * x)
    return odd != 0
