"""What the threads of a call run: unit after unit, each from its inputs to its outputs.

A unit of a layer is a strip, as many tiles of an image as have inputs that fit into the cache, for
a block of outputs. The thread that computes it lays out its inputs, in memory that no other thread
touches. Units of decoding are blocks of outputs, those of putting values on levels are chunks.

It reads from its end: `compute` is compiled as this loads, and so comes after what it calls.
"""

from typing import Any

from llvmlite import ir
from numba import carray

from .dots import decode, dots
from .inputs import put_on_levels
from .jobs import DECODE, LEVELS, LINE, VECTOR
from .moves import lay_out, measure
from .outputs import scale_lanes, write_tile
from .popcounts import count_rows
from .prepared import TABLES
from .tables import look_up_rows
from .vectors import (
    I32,
    I64,
    as_bytes,
    as_floats_at,
    as_longs,
    compiled,
    constant,
    i64,
    instructions,
    kernel,
)


@instructions(i64)
def count_up(b: Any, address: Any) -> Any:
    """Add 1 to the integer at the address, as if no other thread was there; return what it was."""
    place = b.inttoptr(address, I64.as_pointer())
    return b.atomic_rmw("add", place, constant(1), "monotonic")


@instructions(i64)
def called(b: Any, address: Any) -> Any:
    """Return what the C function `int f(void)` at the address returns."""
    kind = ir.FunctionType(I32, [])
    return b.sext(b.call(b.inttoptr(address, kind.as_pointer()), []), I64)


@compiled
def own_number(job):
    """Return the number of this thread among those of the job."""
    return called(job.number) if job.number else count_up(job.counters + LINE * job.threads)


@compiled
def next_unit(job, own):
    """Return a unit that no thread has taken; -1 if there is none.

    A thread takes those of its own share, and what is then left of others'. Layer after layer it so
    has the same pictures, which lie in its own cache.
    """
    for k in range(job.threads):
        share = (own + k) % job.threads
        unit = job.units * share // job.threads + count_up(job.counters + LINE * share)
        if unit < job.units * (share + 1) // job.threads:
            return unit
    return -1


@compiled
def feed(job, memory, number, before):
    """Lay out the inputs of strip `number` of all images, where those of strip `before` lie."""
    image, strip = divmod(number, job.strips)
    begin = carray(as_longs(job.starts), job.tiles)[strip_of(job, strip)[0]]
    if before < 0 or strip != before % job.strips:  # zeros are elsewhere
        carray(as_bytes(memory + job.flat), job.steps - job.flat)[:] = 0
    if job.item == 2 and (job.pictures > 1 or before < 0 or image != before // job.strips):
        measure(job, memory, image, begin)
    if lay_out(job, memory, image, begin):
        job.odd = 1


@compiled
def strip_of(job, strip):
    """Return the first tile of a strip, and that behind its last."""
    ends = carray(as_longs(job.ends), job.strips + 1)
    return ends[strip], ends[strip + 1]


@compiled
def tiles(job, memory, image, first, last, block):
    """Compute the tiles `first` to `last` of an image for a block of outputs.

    The scratch holds the tables, zeros, the scales of the lanes, and a tile's sums (O, lanes).
    """
    zeros, scales = memory + TABLES, memory + TABLES + VECTOR
    tile = scales + 2 * VECTOR
    carray(as_floats_at(zeros), VECTOR // 4)[:] = 0
    starts = carray(as_longs(job.starts), job.tiles)
    edges = carray(as_longs(job.edges), job.blocks + 1)
    flat = memory + job.flat + carray(as_longs(job.shifts), job.blocks)[block] * job.item
    sums = tile - 4 * edges[block] * job.lanes  # of output 0, had it a place
    for t in range(first, last):
        carray(as_floats_at(tile), (edges[block + 1] - edges[block]) * job.lanes)[:] = 0
        inputs = flat + job.item * (starts[t] - starts[first])
        if job.planes:
            count_rows(job, inputs, block, sums)
        else:
            look_up_rows(job, memory, inputs, block, sums)
        scale_lanes(job, memory, scales, t)
        write_tile(job, tile, scales, image, t, block)


@compiled
def compute_strip(job, memory, unit, before):
    """Compute a unit of a layer; the thread's unit before it was `before`, or -1."""
    number, block = divmod(unit, job.blocks)
    before = before // job.blocks
    if job.item and number != before:
        feed(job, memory, number, before)
    image, strip = divmod(number, job.strips)
    first, last = strip_of(job, strip)
    if job.lanes == 1:
        dots(job, memory, first, last, block)
    else:
        tiles(job, memory, image, first, last, block)


@kernel
def compute(address):
    """Compute those units of a job that no other thread takes."""
    job = carray(address, 1)[0]
    own, before = own_number(job), -1
    memory = job.memory + own * job.memory_bytes
    while True:
        unit = next_unit(job, own)
        if unit < 0:
            break
        if job.task == DECODE:
            decode(job, unit)
        elif job.task == LEVELS:
            put_on_levels(job, unit)
        else:
            compute_strip(job, memory, unit, before)
            before = unit
