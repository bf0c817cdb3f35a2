"""What does not change from call to call: a `Job` for one layer's shape and one shape of its input.

The numbers come from `alq.inference.tiles`; the arrays whose addresses they are live as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..method.structures import Grouping
from .jobs import Job
from .plan import COUNTED, COUNTED_LANES, LANES
from .rows import row_bytes
from .tiles import REMEMBERED, Geometry, Tiling, overlap, taps, tiling

VECTOR = 64  # bytes
TABLES = 16 * 16 * VECTOR  # bytes of the tables of a word


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job without what a call adds to it.

    Attributes:
        job: to be copied.
        arrays: of which the job holds addresses.
        shape: of the output, channels last.
        pictures, parts, units: of `measure`, of `lay_out` or `encode`, and of the layer's kernel.
        bytes: of memory that a call needs.
        offsets: where in this memory what lies, by the job's fields.
    """

    job: Job
    arrays: Sequence[np.ndarray]
    shape: tuple[int, ...]
    pictures: int
    parts: int
    units: int
    bytes: int
    offsets: tuple[tuple[str, int], ...]


@lru_cache(REMEMBERED)
def prepared(
    grouping: Grouping, geometry: Geometry, way: str, threads: int, planes: int = 0
) -> Prepared:
    """Return the job of one way, or kind of tables; `geometry` as `by_tables` explains."""
    job, arrays = Job(), [np.zeros(grouping.shape[0], np.float32)]
    linear, O = len(grouping.shape) == 2, grouping.shape[0]
    B, C = geometry.batch, geometry.channels
    pictures = geometry.positions if linear else B
    job.bias = arrays[0].ctypes.data
    tell(
        job, segments=grouping.G // O, n=grouping.n, row_bytes=row_bytes(grouping.n), O=O, images=B,
        height=geometry.size[0], width=geometry.size[1], channels=C, inverse_step=4 * linear,
        picture=C if linear else C * geometry.size[0] * geometry.size[1],
    )  # fmt: skip
    counted = way in COUNTED
    lanes = COUNTED_LANES if counted else LANES.get(way, 1)
    item = 8 if counted else 2 if way == "int16" else 4
    parts = B * -(-C // 16)
    if counted:  # its channels are words, of each plane
        inputs, words = grouping.n, row_bytes(grouping.n) // 8
        parts = B * C // inputs * words
        tell(job, planes=planes, words=words, inputs=inputs)
        geometry = replace(geometry, channels=C // inputs * words * planes)
    cut = tiling(geometry, lanes)
    values = tell_of_input(job, arrays, geometry, cut.joined, item) + lanes
    tell_of_tiles(job, arrays, geometry, cut, linear)
    dots = way in ("dots", "popcount dots")
    edges, shifts = blocks_of_outputs(
        O, geometry, cut.channel_step, pictures if dots else cut.images * len(cut.starts), threads
    )
    largest = int(np.diff(edges).max())
    job.blocks, job.edges, job.shifts = len(shifts), keep(arrays, edges), keep(arrays, shifts)
    order = grouping.G // O, grouping.n, grouping.structure == "pixelwise"
    if counted:
        order = grouping.G // O, words * planes, grouping.structure == "pixelwise"
    found = taps(geometry, order, cut.channel_step, item)
    job.places = found.shape[1]
    job.taps = keep(arrays, found[:, 0].copy() if counted else found)
    own = {"dots": 36 * job.row_bytes, "popcount dots": planes * job.row_bytes}
    own |= {"popcounts": VECTOR + 4 * largest * lanes}
    job.scratch_bytes = whole(own.get(way, TABLES + 3 * VECTOR + 4 * largest * lanes))
    sizes = {
        "steps": 4 * pictures,
        "inverses": 4 * pictures,
        "scratch": threads * job.scratch_bytes,
    }
    sizes["flat"] = 0 if way == "dots" else item * values
    ends = np.cumsum([whole(size) for size in sizes.values()]).tolist()
    shape = (pictures, O) if linear else (B, *geometry.output, O)
    units = (pictures if dots else cut.images * len(cut.starts)) * len(shifts)
    offsets = tuple(zip(sizes, [0, *ends[:-1]], strict=True))
    return Prepared(job, arrays, shape, pictures, parts, units, ends[-1], offsets)


def tell_of_input(
    job: Job, arrays: list[np.ndarray], geometry: Geometry, joined: bool, item: int
) -> int:
    """Tell the job how its input is laid out; return of how many values."""
    rows, columns = geometry.phases
    plane = geometry.plane[0] * geometry.plane[1]
    phase = plane * (geometry.batch if joined else 1)
    channel = phase * len(rows) * len(columns)
    parts = [
        keep(arrays, np.array([overlap(geometry, axis, r) for r in remainders], np.int64))
        for axis, remainders in enumerate((rows, columns))
    ]
    tell(
        job, item=item, channel_step=channel, phase_step=phase, plane=plane,
        image_step=plane if joined else channel * geometry.channels, plane_width=geometry.plane[1],
        rows=len(rows), columns=len(columns), row_parts=parts[0], column_parts=parts[1],
        stride_y=geometry.stride[0], stride_x=geometry.stride[1],
    )  # fmt: skip
    return channel * geometry.channels * (1 if joined else geometry.batch)


def tell_of_tiles(
    job: Job, arrays: list[np.ndarray], geometry: Geometry, cut: Tiling, linear: bool
) -> None:
    """Tell the job of its tiles."""
    area = geometry.output[0] * geometry.output[1]
    tell(
        job, tiles=len(cut.starts), lanes=cut.targets.shape[1], starts=keep(arrays, cut.starts),
        targets=keep(arrays, cut.targets), tile_step=cut.input_step, output_step=cut.output_step,
        output_area=1 if linear else area,
    )  # fmt: skip


def blocks_of_outputs(
    O: int, geometry: Geometry, channel_step: int, tiles: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (edges, shifts): where blocks of outputs end, and where each one's input begins.

    A group of the convolution is a block, or several where there are more threads than tiles.
    """
    pieces = -(-threads // max(1, tiles * geometry.groups))
    a_group = O // geometry.groups
    pieces = min(pieces, a_group)
    within = np.arange(pieces) * a_group // pieces
    groups = np.arange(geometry.groups)
    edges = np.append((groups[:, None] * a_group + within).ravel(), O)
    channels = geometry.channels // geometry.groups
    return edges, np.repeat(groups * channels * channel_step, pieces)


def tell(job: Job, **numbers: int) -> None:
    for name, number in numbers.items():
        setattr(job, name, number)


def keep(arrays: list[np.ndarray], array: np.ndarray) -> int:
    """Return the address of the array, and keep it."""
    arrays.append(np.ascontiguousarray(array))
    return arrays[-1].ctypes.data


def whole(size: int) -> int:
    """Return the bytes in whole vectors."""
    return -(-size // VECTOR) * VECTOR
