"""What the threads of a call run: unit after unit, each from its inputs to its outputs.

A unit is a strip, as many tiles of an image as have inputs that fit into the cache, for a block of
outputs. The thread that computes it lays out its inputs, in memory that no other thread touches.
"""

from numba import carray

from .dots import decode, dots
from .inputs import put_on_levels
from .moves import lay_out, measure
from .popcounts import count_tiles
from .tables import tiles
from .vectors import as_bytes, as_longs, compiled, job_at, kernel, next_unit, own_number


@compiled
def feed(job, memory, number, before):
    """Lay out the inputs of strip `number` of all images, where those of strip `before` lie."""
    image, strip = divmod(number, job.strips)
    begin = carray(as_longs(job.starts), job.tiles)[strip_of(job, strip)[0]]
    if before < 0 or strip != before % job.strips:  # zeros are elsewhere
        carray(as_bytes(memory + job.flat), job.flat_bytes)[:] = 0
    if job.item == 2 and (job.pictures > 1 or before < 0 or image != before // job.strips):
        measure(job, memory, image, begin)
    if lay_out(job, memory, image, begin):
        job.odd = 1


@compiled
def strip_of(job, strip):
    """Return the first tile of a strip, and that behind its last."""
    ends = carray(as_longs(job.ends), job.strips + 1)
    return ends[strip], ends[strip + 1]


@kernel
def compute(address):
    """Compute a layer."""
    job = job_at(address)
    own, before = own_number(job), -1
    memory = job.memory + own * job.memory_bytes
    while True:
        unit = next_unit(job, own)
        if unit < 0:
            break
        number, block = divmod(unit, job.blocks)
        if job.item and number != before:
            feed(job, memory, number, before)
        before = number
        image, strip = divmod(number, job.strips)
        first, last = strip_of(job, strip)
        if job.lanes == 1:
            dots(job, memory, first, last, block)
        elif job.planes:
            count_tiles(job, memory, image, first, last, block)
        else:
            tiles(job, memory, image, first, last, block)


@kernel
def decode_blocks(address):
    """Decode a layer's weights; a unit is a block of outputs."""
    job = job_at(address)
    own = own_number(job)
    while True:
        unit = next_unit(job, own)
        if unit < 0:
            break
        decode(job, unit)


@kernel
def level(address):
    """Put values on the nearest levels; a unit is a chunk of them."""
    job = job_at(address)
    own = own_number(job)
    while True:
        unit = next_unit(job, own)
        if unit < 0:
            break
        put_on_levels(job, unit)
