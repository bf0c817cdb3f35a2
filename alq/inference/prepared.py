"""What does not change from call to call: a `Job` for one layer's shape and one shape of its input.

The numbers come from `alq.inference.tiles`; the arrays whose addresses they are live as long.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..method.structures import Grouping
from .jobs import Job
from .plan import COUNTED, COUNTED_LANES, LANES, at_one_position
from .rows import row_bytes
from .tiles import REMEMBERED, Geometry, Tiling, overlap, taps, tiling

VECTOR = 64  # bytes
TABLES = 16 * 16 * VECTOR  # bytes of the tables of a word
CACHE = 2**20  # bytes of an input that stay near while the layer is computed


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job without what a call adds to it.

    Attributes:
        job: to be copied.
        arrays: of which the job holds addresses.
        shape: of the output, channels last.
        images, at_once: how many, and how many are laid out before the layer is computed of them:
            as many as the cache holds, or all, where they lie as one.
        input_bytes, output_bytes: of an image.
        pictures, parts, units: of an image; units of `measure`, of `lay_out` or `encode`, and of
            the layer's kernel.
        bytes: of memory that a call needs.
        offsets: where in this memory what lies, by the job's fields; `flat` is last.
    """

    job: Job
    arrays: Sequence[np.ndarray]
    shape: tuple[int, ...]
    images: int
    at_once: int
    input_bytes: int
    output_bytes: int
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
    counted, dots = way in COUNTED, way in ("dots", "popcount dots")
    job.bias = arrays[0].ctypes.data
    tell(job, threads=threads)
    tell_of_layer(job, grouping, geometry)
    shape = (geometry.positions, O) if linear else (geometry.batch, *geometry.output, O)
    item = 8 if counted else 2 if way == "int16" else 4
    order = grouping.G // O, grouping.n, grouping.structure == "pixelwise"
    if counted:  # its channels are words, of each plane
        words = row_bytes(grouping.n) // 8
        tell(job, planes=planes, words=words)
        geometry = replace(geometry, channels=job.channels // grouping.n * words * planes)
        order = grouping.G // O, words * planes, grouping.structure == "pixelwise"
    lanes = 1 if dots else COUNTED_LANES if counted else LANES[way]
    images, cut = 1, tiling(geometry, lanes)
    pictures = geometry.positions if linear else geometry.batch
    if not cut.joined:
        images, geometry = geometry.batch, replace(geometry, batch=1)
        pictures //= images
        cut = tiling(geometry, lanes)
    values = tell_of_input(job, arrays, geometry, cut.joined, item)
    tell_of_tiles(job, arrays, geometry, cut, linear)
    at_once = min(images, threads * max(1, CACHE // (item * values)))
    units = pictures if dots else len(cut.starts)
    edges, shifts = blocks_of_outputs(O, geometry, cut.channel_step, units * at_once, threads)
    tell(job, blocks=len(shifts), edges=keep(arrays, edges), shifts=keep(arrays, shifts))
    found = taps(geometry, order, cut.channel_step, item)
    found = found[:, 0] if counted else found
    tell(job, places=found.shape[-1], taps=keep(arrays, found))
    job.scratch_bytes = scratch_bytes(job, way, 4 * int(np.diff(edges).max()) * lanes)
    sizes = {"steps": 4 * pictures * at_once, "inverses": 4 * pictures * at_once}
    sizes |= {"scratch": threads * job.scratch_bytes}
    sizes |= {"flat": 0 if way == "dots" else item * (values * at_once + lanes)}
    ends = np.cumsum([whole(size) for size in sizes.values()]).tolist()
    offsets = tuple(zip(sizes, [0, *ends[:-1]], strict=True))
    outputs = 4 * math.prod(shape) // images
    return Prepared(
        job, arrays, shape, images, at_once, 4 * job.picture * pictures, outputs, pictures,
        job.parts * geometry.batch, units * len(shifts), ends[-1], offsets,
    )  # fmt: skip


def scratch_bytes(job: Job, way: str, tile: int) -> int:
    """Return the bytes of a thread's scratch, as the kernels divide it."""
    own = {"dots": 36 * job.row_bytes, "popcount dots": job.planes * job.row_bytes}
    own["popcounts"] = VECTOR + tile
    return whole(own.get(way, TABLES + 3 * VECTOR + tile))


def tell_of_layer(job: Job, grouping: Grouping, geometry: Geometry) -> None:
    """Tell the job of the layer's groups and of what they meet."""
    C, O, linear = geometry.channels, grouping.shape[0], len(grouping.shape) == 2
    picture = C if linear else C * geometry.size[0] * geometry.size[1]
    together = at_one_position(grouping)
    tell(
        job, segments=grouping.G // O, n=grouping.n, row_bytes=row_bytes(grouping.n), O=O,
        height=geometry.size[0], width=geometry.size[1], channels=C, picture=picture,
        inverse_step=4 * linear, together=together, inputs=grouping.n if together else picture,
    )  # fmt: skip


def tell_of_input(
    job: Job, arrays: list[np.ndarray], geometry: Geometry, joined: bool, item: int
) -> int:
    """Tell the job how its input is laid out; return of how many values."""
    rows, columns = geometry.phases
    plane = geometry.plane[0] * geometry.plane[1]
    phase = plane * (geometry.batch if joined else 1)
    channel = phase * len(rows) * len(columns)
    parts = [
        np.array([overlap(geometry, axis, r) for r in remainders], np.int64)
        for axis, remainders in enumerate((rows, columns))
    ]
    tell(
        job, item=item, channel_step=channel, phase_step=phase, plane=plane,
        image_step=plane if joined else channel * geometry.channels, plane_width=geometry.plane[1],
        rows=len(rows), columns=len(columns), row_parts=keep(arrays, parts[0]),
        column_parts=keep(arrays, parts[1]), parts=int(parts[0][:, 2].max()),
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
    within = np.arange(pieces, dtype=np.int64) * a_group // pieces
    groups = np.arange(geometry.groups, dtype=np.int64)
    edges = np.append((groups[:, None] * a_group + within).ravel(), O)
    channels = geometry.channels // geometry.groups
    return edges, np.repeat(groups * channels * channel_step, pieces)


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
