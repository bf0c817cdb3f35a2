"""Inputs in binary bases as words of bits, as `alq.inference.popcounts` counts them.

A position's inputs lie side by side, so that a comparison with a midpoint gives 16 bits of a word.
"""

from typing import Any

from numba.core import cgutils

from .jobs import CHUNK
from .plan import MOST_PLANES
from .vectors import (
    F32,
    I16,
    I64,
    compiled,
    constant,
    element,
    fetch_ahead,
    first_lanes,
    i64,
    instructions,
    load_lanes,
    splat,
    store,
    store_lanes,
    types,
)


@instructions(i64)
def encode_word(
    b: Any, planes: Any, source: Any, count: Any, target: Any, step: Any, middle: Any, flips: Any,
    starting: Any, midpoints: Any,
) -> Any:  # fmt: skip
    """Write the word of up to 64 inputs for each plane.

    Return which of the inputs are not finite, as the ones of a word.

    The arguments: how many planes; the address of the inputs, and how many they are; the address of
    the first plane's word, bytes to the next plane's; the addresses of the midpoints (K,), of words
    (K, planes) that are all ones where a plane's bit differs beside a midpoint, of the lowest
    level's words (planes,); K.
    """
    values, inside, odd = [], constant(0), constant(0)
    for k in range(4):
        lanes = first_lanes(b, b.sub(count, constant(16 * k)))
        place = b.add(source, constant(64 * k))
        fetch_ahead(b, place)
        values.append(load_lanes(b, place, lanes))
        inside = b.or_(inside, part_of_word(b, lanes, k))
        nothing = b.fsub(values[k], values[k])  # but of what is not finite
        odd = b.or_(odd, part_of_word(b, b.fcmp_unordered("uno", nothing, nothing), k))

    def encode(planes: int) -> None:
        words = [cgutils.alloca_once_value(b, element(b, starting, m, I64)) for m in range(planes)]
        with cgutils.for_range(b, midpoints) as loop:
            low = splat(b, element(b, middle, loop.index, F32))
            above = constant(0)
            for k, value in enumerate(values):
                above = b.or_(above, part_of_word(b, b.fcmp_ordered(">", value, low), k))
            place = b.add(flips, b.mul(loop.index, constant(8 * planes)))
            for m, word in enumerate(words):
                flip = element(b, place, m, I64)
                b.store(b.xor(b.load(word), b.and_(above, flip)), word)
        for m, word in enumerate(words):
            found = b.and_(b.load(word), inside)
            store(b, found, b.add(target, b.mul(step, constant(m))))

    for number in range(1, MOST_PLANES + 1):
        with b.if_then(b.icmp_signed("==", planes, constant(number))):
            encode(number)
    return odd


def part_of_word(b: Any, flags: Any, k: int) -> Any:
    """Return a word of 64 bits, of which `flags` are the 16 from 16 k on."""
    return b.shl(b.zext(b.bitcast(flags, I16), I64), constant(16 * k))


@compiled
def encode_run(job, source, step, count, target):
    """Write the words of positions, `step` bytes from one to the next.

    `inputs` of a position are of one group. Return which are not finite, as ones of a word.
    """
    odd, word_step = 0, 8 * job.channel_step * job.planes
    for x in range(count):
        here, to = source + step * x, target + 8 * x
        for first in range(0, job.channels, job.inputs):
            for own in range(0, job.inputs, 64):
                odd |= encode_word(
                    job.planes, here + 4 * (first + own), min(64, job.inputs - own), to,
                    8 * job.channel_step, job.middle, job.flips, job.starting, job.midpoints,
                )  # fmt: skip
                to += word_step
    return odd


@instructions(types.void)
def to_levels(
    b: Any, source: Any, count: Any, target: Any, middle: Any, levels: Any, midpoints: Any
) -> None:
    """Write the nearest level of up to 64 inputs; what is not a number stays that.

    The arguments: the address of the inputs, and how many they are; that of the results; those of
    the midpoints of the levels and of the levels, and how many midpoints there are.
    """
    flags = [first_lanes(b, b.sub(count, constant(16 * k))) for k in range(4)]
    places = [constant(64 * k) for k in range(4)]
    values = [load_lanes(b, b.add(source, p), f) for p, f in zip(places, flags, strict=True)]
    lowest = splat(b, element(b, levels, 0, F32))
    found = [
        cgutils.alloca_once_value(b, b.select(b.fcmp_unordered("uno", x, x), x, lowest))
        for x in values
    ]
    with cgutils.for_range(b, midpoints) as loop:
        low = splat(b, element(b, middle, loop.index, F32))
        level = splat(b, element(b, levels, b.add(loop.index, constant(1)), F32))
        for value, x in zip(found, values, strict=True):
            b.store(b.select(b.fcmp_ordered(">", x, low), level, b.load(value)), value)
    for value, p, f in zip(found, places, flags, strict=True):
        store_lanes(b, b.load(value), b.add(target, p), f)


@compiled
def put_on_levels(job, unit):
    """Put CHUNK of the job's values on the nearest levels."""
    for k in range(CHUNK * unit, min(job.values, CHUNK * (unit + 1)), 64):
        count, x, y = min(64, job.values - k), job.x + 4 * k, job.y + 4 * k
        to_levels(x, count, y, job.middle, job.levels, job.midpoints)
