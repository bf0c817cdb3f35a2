"""What does not change from call to call: a `Job` for one layer's shape and one shape of its input.

The numbers come from `alq.inference.tiles`; the arrays whose addresses they are live as long.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..method.structures import Grouping
from .jobs import CHUNK, DECODE, LEVELS, LINE, VECTOR, Job
from .plan import COUNTED, LANES, at_one_position, is_linear
from .rows import row_bytes
from .tiles import REMEMBERED, Geometry, Tiling, overlap, strips, taps, tiling

# Bytes of an input as each way has it laid out; 0 where it is read as it is.
ITEM = {"float32": 4, "int16": 2, "dots": 0, "popcounts": 8, "popcount dots": 8}
TABLES = 16 * 16 * VECTOR  # bytes of the tables of a word
CACHE = 2**19  # bytes of a strip's inputs that stay near while it is computed
NEAR = 2**18  # bytes of weights that stay nearer, as all segments' rows are added to them


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job without what a call adds to it.

    Attributes:
        job: to be copied.
        arrays: of which the job holds addresses.
        shape, strides: of the output, the channels of a position side by side.
        bytes: of memory that a call needs: the counters, then each thread's.
    """

    job: Job
    arrays: Sequence[np.ndarray]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    bytes: int


@lru_cache(REMEMBERED)
def prepared(
    grouping: Grouping, geometry: Geometry, way: str, threads: int, planes: int = 0
) -> Prepared:
    """Return the job of one way, or kind of tables; `geometry` as `by_kernel` explains."""
    O, linear = grouping.shape[0], is_linear(grouping)
    counted, n = way in COUNTED, grouping.n
    job, arrays = Job(), [np.zeros(O, np.float32)]
    tell(job, threads=threads, bias=arrays[0].ctypes.data)
    tell_of_layer(job, grouping, geometry)
    if counted:  # its channels are words, of each plane
        job.planes, n = planes, row_bytes(n) // 8 * planes
        geometry = replace(geometry, channels=job.channels // grouping.n * n)
    cut, item = tiling(geometry, LANES[way]), ITEM[way]
    tell_of_tiles(job, arrays, geometry, cut, item, linear)
    tell_of_input(job, arrays, geometry, cut.joined, linear)
    order = grouping.G // O, n, grouping.structure == "pixelwise"
    found = taps(geometry, order, job.channel_step, item)
    found = found[:, 0] if counted else found
    tell(job, places=found.shape[-1], taps=keep(arrays, found))
    most = tell_of_blocks(job, arrays, geometry)
    tell_of_memory(job, way, item * job.channel_step * geometry.channels, 4 * most * job.lanes)
    shape: tuple[int, ...] = (geometry.positions, O)
    strides: tuple[int, ...] = (O, 1)
    if not linear:
        height, width = geometry.output
        shape, strides = (geometry.batch, O, height, width), (height * width * O, 1, width * O, O)
    return Prepared(job, arrays, shape, strides, threads * (job.memory_bytes + 2 * LINE))


@lru_cache(REMEMBERED)
def prepared_to_decode(grouping: Grouping, start: int, stop: int, threads: int) -> Prepared:
    """Return the job of decoding the weights of outputs `start` to `stop`.

    Its shape and strides are those of the weights (outputs, S, places) behind each other, or, where
    they lie there as PyTorch wants them, of the layer's.
    """
    job = Job()
    arrays: list[np.ndarray] = []
    S, stride = grouping.G // grouping.shape[0], row_bytes(grouping.n)
    blocks = max(threads, 4 * (stop - start) * S * 8 * stride // NEAR)
    edges = start + (stop - start) * np.arange(blocks + 1) // blocks
    tell(
        job, task=DECODE, threads=threads, units=blocks, blocks=blocks, segments=S,
        edges=keep(arrays, edges), row_bytes=stride, O=grouping.shape[0],
    )  # fmt: skip
    with torch.inference_mode(False):  # where no tensor knows what it is a view of
        found = groups = torch.empty(stop - start, S, 8 * stride, device="meta")
        if 8 * stride == grouping.n:
            weight = weight_of_groups(grouping, groups)
            found = weight if weight._base is groups else groups
    size = 2 * LINE * threads
    return Prepared(job, arrays, tuple(found.shape), found.stride(), size)


def weight_of_groups(grouping: Grouping, groups: Tensor) -> Tensor:
    """Return weights (outputs, S, n) of some outputs in the layer's shape, channels last."""
    part = Grouping(grouping.structure, (len(groups), *grouping.shape[1:]), grouping.subc)
    weight = part.to_weight(groups)
    if weight.dim() != 4:
        return weight
    if weight.shape[1] == 1:  # PyTorch's convolutions of other strides can be wrong
        return weight.clone(memory_format=torch.contiguous_format)
    # By its strides PyTorch chooses the output's layout, also where they are all the same to it.
    last = torch.empty_like(weight, memory_format=torch.channels_last)
    return weight if weight.stride() == last.stride() else last.copy_(weight)


@lru_cache(REMEMBERED)
def prepared_for_levels(values: int, threads: int) -> Prepared:
    """Return the job of putting so many values on their levels."""
    job = Job()
    tell(job, task=LEVELS, threads=threads, units=-(-values // CHUNK), values=values)
    return Prepared(job, [], (values,), (1,), 2 * LINE * threads)


def tell_of_layer(job: Job, grouping: Grouping, geometry: Geometry) -> None:
    """Tell the job of the layer's groups and of what they meet."""
    C, O, linear = geometry.channels, grouping.shape[0], is_linear(grouping)
    picture = C if linear else C * geometry.size[0] * geometry.size[1]
    together = at_one_position(grouping)
    tell(
        job, segments=grouping.G // O, n=grouping.n, row_bytes=row_bytes(grouping.n), O=O,
        height=geometry.size[0], width=geometry.size[1], channels=C, picture=picture,
        inverse_step=4 * linear, together=together, inputs=grouping.n if together else picture,
    )  # fmt: skip


def tell_of_tiles(
    job: Job, arrays: list[np.ndarray], geometry: Geometry, cut: Tiling, item: int, linear: bool
) -> None:
    """Tell the job of its tiles, and of the strips of them; `item` is the bytes of an input."""
    area, images = math.prod(geometry.output), 1 if cut.joined else geometry.batch
    phases, lanes = math.prod(map(len, geometry.phases)), cut.targets.shape[1]
    behind, most = lanes + geometry.reach, CACHE // max(1, item * phases * geometry.channels)
    ends = strips(cut.starts, behind, most, images, job.threads)
    length = behind + int((cut.starts[ends[1:] - 1] - cut.starts[ends[:-1]]).max())
    tell(
        job, tiles=len(cut.starts), lanes=lanes, starts=keep(arrays, cut.starts),
        targets=keep(arrays, cut.targets), output_step=0 if cut.joined else area,
        output_area=1 if linear else area, images=images, strips=len(ends) - 1,
        ends=keep(arrays, ends), item=item, length=length, channel_step=phases * length,
    )  # fmt: skip


def tell_of_input(
    job: Job, arrays: list[np.ndarray], geometry: Geometry, joined: bool, linear: bool
) -> None:
    """Tell the job where its input is laid out."""
    height, width = geometry.plane
    parts = [
        np.array([overlap(geometry, axis, r) for r in remainders], np.int64)
        for axis, remainders in enumerate(geometry.phases)
    ]
    pictures = geometry.positions if linear else geometry.batch if joined else 1
    tell(
        job, pictures=pictures, plane_rows=height * (1 if linear else pictures),
        plane_height=height, plane_width=width, picture_places=1 if linear else height * width,
        rows=len(parts[0]), columns=len(parts[1]), row_parts=keep(arrays, parts[0]),
        column_parts=keep(arrays, parts[1]), stride_y=geometry.stride[0],
        stride_x=geometry.stride[1],
    )  # fmt: skip


def tell_of_blocks(job: Job, arrays: list[np.ndarray], geometry: Geometry) -> int:
    """Tell the job of its blocks of outputs; return how many the largest has.

    A group of the convolution is a block, or several where there are more threads than tiles.
    """
    groups, a_group = geometry.groups, job.O // geometry.groups
    pieces = min(a_group, -(-job.threads // (job.images * job.tiles * groups)))
    within = np.arange(pieces, dtype=np.int64) * a_group // pieces
    first = np.arange(groups, dtype=np.int64)[:, None]
    edges = np.append((first * a_group + within).ravel(), job.O)
    shifts = np.repeat(first * (geometry.channels // groups * job.channel_step), pieces)
    blocks = len(shifts)
    tell(job, blocks=blocks, edges=keep(arrays, edges), shifts=keep(arrays, shifts))
    job.units = job.images * job.strips * blocks
    return int(np.diff(edges).max())


def tell_of_memory(job: Job, way: str, flat: int, tile: int) -> None:
    """Tell the job of a thread's memory, with so many bytes of inputs and of a tile."""
    # The dots' inputs are a float for each place of a row, and as many signs, which are bits.
    own = {"dots": (8 * 4 + 1) * job.row_bytes, "popcount dots": job.planes * job.row_bytes}
    scratch, steps = own.get(way, TABLES + 3 * VECTOR + tile), 4 * job.pictures
    ends = np.cumsum([whole(size) for size in (scratch, flat, steps, steps)]).tolist()
    tell(job, flat=ends[0], steps=ends[1], inverses=ends[2], memory_bytes=ends[3])


def tell(job: Job, **numbers: int) -> None:
    for name, number in numbers.items():
        setattr(job, name, number)


def keep(arrays: list[np.ndarray], array: np.ndarray) -> int:
    """Return the address of the array in int64, and keep it."""
    arrays.append(np.ascontiguousarray(array, np.int64))
    return arrays[-1].ctypes.data


def whole(size: int) -> int:
    """Return the bytes in whole vectors."""
    return -(-size // VECTOR) * VECTOR
