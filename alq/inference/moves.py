"""How an input comes to lie as the tables read it, and how large its pictures are.

An input's channels lie side by side (PyTorch's channels_last), the tables read positions side by
side (`alq.inference.tiles`). 16 channels of 16 positions at a time are transposed in registers.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic

from .vectors import (
    F32,
    FLAGS,
    FLOATS,
    I16,
    I32,
    as_bytes,
    as_floats_at,
    as_ints,
    as_longs,
    cgutils,
    compiled,
    constant,
    first_lanes,
    i64,
    job_at,
    kernel,
    load,
    load_lanes,
    next_unit,
    splat,
    store_lanes,
    transposed,
    types,
)  # fmt: skip

SHORT_MOST = 511  # of the inputs in int16: 64 of them may add up
LEAST = 1e-30  # a smaller step is this: its inverse is a number


def mover(shorts: bool) -> Any:
    """Return the intrinsic that moves up to 16 x 16 values, as shorts after a factor.

    Its arguments: the address of a position's channels, bytes to the next position's, positions,
    channels; the address of the first channel's result, bytes to the next channel's; the address of
    the positions' factors, bytes from one to the next.
    """

    @intrinsic
    def move(
        typing: Any, source: Any, step: Any, positions: Any, channels: Any, target: Any,
        channel_step: Any, inverses: Any, inverse_step: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            source, step, positions, channels, target, channel_step, inverses, each = arguments
            last, rows = b.sub(positions, constant(1)), []
            lanes, outside = first_lanes(b, positions), ir.Constant(FLAGS, None)
            some = first_lanes(b, channels)
            for k in range(16):
                place = constant(k)
                place = b.select(b.icmp_signed("<", place, last), place, last)
                row = load_lanes(b, b.add(source, b.mul(step, place)), some)
                if shorts:
                    inverse = load(b, b.add(inverses, b.mul(each, place)), F32)
                    row = b.fmul(row, splat(b, inverse))
                rows.append(row)
            for k, column in enumerate(transposed(b, rows)):
                column = rounded(b, column) if shorts else column
                inside = b.icmp_signed("<", constant(k), channels)
                flags = b.select(inside, lanes, outside)
                store_lanes(b, column, b.add(target, b.mul(channel_step, constant(k))), flags)
            return context.get_dummy_value()

        return types.void(*[i64] * 8), generate

    return move


def rounded(b: Any, floats: Any) -> Any:
    """Return the nearest shorts."""
    kind = ir.FunctionType(FLOATS, [FLOATS])
    rint = cgutils.get_or_insert_function(b.module, kind, "llvm.rint.v16f32")
    whole = b.fptosi(b.call(rint, [floats]), ir.VectorType(I32, 16))
    return b.trunc(whole, ir.VectorType(I16, 16))


move_floats, move_shorts = mover(False), mover(True)


@kernel
def measure(address):
    """Write the step of each picture, of which SHORT_MOST make its largest value, and its inverse.

    A unit is a picture. What is not finite in it shows in its step.
    """
    job = job_at(address)
    steps = carray(as_floats_at(job.steps), job.units)
    inverses = carray(as_floats_at(job.inverses), job.units)
    size = job.picture
    while True:
        unit = next_unit(address)
        if unit >= job.units:
            break
        bits = carray(as_ints(job.x + 4 * size * unit), size)
        largest = np.int32(0)  # of the bits without sign, which are in the order of the values
        for i in range(size):
            largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        carray(as_ints(job.steps), job.units)[unit] = largest
        step = steps[unit] / np.float32(SHORT_MOST)
        if step == 0:
            step = np.float32(1)
        elif step < LEAST:
            step = np.float32(LEAST)
        steps[unit], inverses[unit] = step, np.float32(1) / step


@compiled
def clear(job, image, first, last):
    """Write zeros where channels `first` to `last` of an image are to lie."""
    size = job.item * job.plane
    for channel in range(first, last):
        for phase in range(job.rows * job.columns):
            place = image * job.image_step + channel * job.channel_step + phase * job.phase_step
            carray(as_bytes(job.flat + job.item * place), size)[:] = 0


@kernel
def lay_out(address):
    """Lay out the input as a `Tiling` reads it; a unit is 16 channels of an image."""
    job = job_at(address)
    parts = (job.channels + 15) // 16
    rows = carray(as_longs(job.row_parts), (job.rows, 3))
    columns = carray(as_longs(job.column_parts), (job.columns, 3))
    position = 4 * job.channels
    each = job.inverse_step
    while True:
        unit = next_unit(address)
        if unit >= job.units:
            break
        image, part = divmod(unit, parts)
        some = min(16, job.channels - 16 * part)
        clear(job, image, 16 * part, 16 * part + some)
        inverses = job.inverses + 4 * image
        for i in range(job.rows):
            for j in range(job.columns):
                to_y, from_y, height = rows[i]
                to_x, from_x, width = columns[j]
                place = image * job.image_step + 16 * part * job.channel_step
                place += (i * job.columns + j) * job.phase_step + to_x
                for y in range(height):
                    target = job.flat + job.item * (place + (to_y + y) * job.plane_width)
                    row = (image * job.height + from_y + y * job.stride_y) * job.width + from_x
                    for x in range(0, width, 16):
                        source = job.x + position * (row + x * job.stride_x) + 64 * part
                        count = min(16, width - x)
                        to = target + job.item * x
                        step, inverse = position * job.stride_x, inverses + each * x
                        if job.item == 4:
                            move_floats(
                                source, step, count, some, to, job.channel_step * 4, inverse, each
                            )
                        else:
                            move_shorts(
                                source, step, count, some, to, job.channel_step * 2, inverse, each
                            )
