"""A layer's product with its input from the rows of `alq.inference.rows`, in each of three ways.

    tables   many positions: `alq.inference.tables`
    dots     one or a few positions of a linear layer: `alq.inference.dots`
    decoded  the weights of some outputs at a time in scratch memory, then PyTorch's product

Tables and dots need numba, a CPU and float32. Decoding works everywhere, without numba too.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ..method.structures import Grouping
from .plan import LANES
from .rows import BLOCK, Rows, groups_of_rows, row_bytes
from .tiles import Geometry, lay_out, picture_steps, taps, tiling

SHORT_MOST = 511  # of the inputs in int16: 64 of them may add up


@cache
def kernels_work() -> bool:
    """Return whether numba is installed and fits."""
    if find_spec("numba") is None:
        return False
    try:
        from . import dots, tables  # noqa: F401
    except ImportError:
        return False
    return True


def by_tables(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry, kind: str
) -> Tensor:
    """Return the convolution (B, O, *output) of pictures x (B, C, H, W) of float32.

    Its layout is channels_last, in which PyTorch's pooling is faster.
    """
    from .tables import TABLES, VECTOR, tiles

    O, lanes = grouping.shape[0], LANES[kind]
    y = x.new_empty(geometry.batch, *geometry.output, O)
    cut = tiling(geometry, lanes)
    steps = x.new_ones(geometry.batch)
    if kind == "int16":
        steps = picture_steps(x, SHORT_MOST)
        x = (x / steps[:, None, None, None]).round_().to(torch.int16)
    flat = lay_out(x, geometry, cut.joined, lanes)
    segments = len(rows.first) - 1
    order = segments, grouping.n, grouping.structure == "pixelwise"
    count, area = cut.images * len(cut.starts), geometry.output[0] * geometry.output[1]
    edges, shifts = blocks_of_outputs(O, geometry, cut.channel_step, count)
    bounds = rows_of_blocks(rows, O, edges)
    offsets = biases(bias, O).numpy()
    values = rows.alpha.numpy(), rows.outputs.numpy(), bounds, edges, shifts
    item = flat.element_size()
    inputs = taps(geometry, order, cut.channel_step, item), flat.data_ptr(), cut.starts, cut.targets
    sizes = cut.input_step, cut.output_step, O, area, row_bytes(grouping.n)
    mode = 2 * (kind == "int16") + (row_bytes(grouping.n) == 4)

    def work(first: int, last: int) -> None:
        largest = int(np.diff(edges).max())
        size = (TABLES + VECTOR) // 4 + largest * lanes
        scratch = torch.empty(size, dtype=torch.float32, device="cpu").numpy()  # at 64 bytes
        tiles(
            mode, rows.signs.data_ptr(), *values, *inputs, steps.numpy(), offsets,
            y.view(-1).numpy(), sizes, scratch, first, last,
        )  # fmt: skip

    in_threads(count * len(shifts), work)
    return y.permute(0, 3, 1, 2)


def blocks_of_outputs(
    O: int, geometry: Geometry, channel_step: int, tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (edges, shifts): where blocks of outputs end, and where each one's input begins.

    A group of the convolution is a block, or several where there are more threads than tiles.
    """
    pieces = -(-torch.get_num_threads() // max(1, tiles * geometry.groups))
    a_group = O // geometry.groups
    pieces = min(pieces, a_group)
    within = np.arange(pieces) * a_group // pieces
    groups = np.arange(geometry.groups)
    edges = np.append((groups[:, None] * a_group + within).ravel(), O)
    channels = geometry.channels // geometry.groups
    return edges, np.repeat(groups * channels * channel_step, pieces)


def rows_of_blocks(rows: Rows, O: int, edges: np.ndarray) -> np.ndarray:
    """Return (S, blocks + 1): in each segment, the rows where the blocks of outputs end."""
    first = rows.first.numpy()
    if len(edges) == 2:
        return np.stack([first[:-1], first[1:]], axis=1)
    segments = np.arange(len(first) - 1)
    places = np.repeat(segments, np.diff(first)) * O + rows.outputs.numpy()
    return np.searchsorted(places, segments[:, None] * O + edges)


def by_dots(rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the linear layer's y (B, O) of x (B, C), one after the other."""
    from .dots import dots

    O, segments, stride = grouping.shape[0], len(rows.first) - 1, row_bytes(grouping.n)
    padded = x.new_zeros(len(x), segments, 8 * stride)
    padded[:, :, : grouping.n] = x.view(len(x), segments, grouping.n)
    totals = padded.sum(2)
    R, threads = len(rows.alpha), torch.get_num_threads()
    parts = x.new_zeros(threads, len(x), O)
    values = stride, rows.alpha.numpy(), rows.outputs.numpy(), rows.first.numpy()

    def work(first: int, last: int) -> None:
        for part in range(first, last):
            begin, end = R * part // threads, R * (part + 1) // threads
            for b in range(len(x)):
                dots(
                    rows.signs.data_ptr(), *values, padded[b].numpy(), totals[b].numpy(),
                    parts[part, b].numpy(), begin, end,
                )  # fmt: skip

    in_threads(threads, work)
    y = parts.sum(0) if threads > 1 else parts[0]
    return y if bias is None else y.add_(bias)


def decoded(rows: Rows, grouping: Grouping, start: int, stop: int) -> Tensor:
    """Return the weights of outputs `start` to `stop` in the layer's shape."""
    on_cpu = rows.alpha.device.type == "cpu" and rows.alpha.dtype == torch.float32
    if on_cpu and kernels_work():
        from .dots import decode

        stride = row_bytes(grouping.n)
        padded = rows.alpha.new_zeros(stop - start, len(rows.first) - 1, 8 * stride)
        decode(
            rows.signs.data_ptr(), stride, rows.alpha.numpy(), rows.outputs.numpy(),
            rows.first.numpy(), padded.numpy(), start, stop,
        )  # fmt: skip
        groups = padded[:, :, : grouping.n]
    else:
        groups = groups_of_rows(rows, grouping.n, start, stop)
    part = Grouping(grouping.structure, (stop - start, *grouping.shape[1:]), grouping.subc)
    weight = part.to_weight(groups)
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight


def blocks_to_decode(rows: Rows, grouping: Grouping) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of outputs, with about BLOCK weights or signs each."""
    O = grouping.by_outputs[0]
    size = max(grouping.numel, rows.signs.numel() * 8)
    step = max(1, BLOCK * O // max(1, size))
    for start in range(0, O, step):
        yield start, min(O, start + step)


def biases(bias: Tensor | None, O: int) -> Tensor:
    return torch.zeros(O, dtype=torch.float32, device="cpu") if bias is None else bias


def in_threads(units: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` for all units, in as many threads as torch computes in."""
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        return work(0, units)
    edges = [units * k // threads for k in range(threads + 1)]
    others = pool(os.getpid(), torch.get_num_threads() - 1)
    waiting = [others.submit(work, edges[k], edges[k + 1]) for k in range(1, threads)]
    work(0, edges[1])
    for future in waiting:
        future.result()


@cache
def pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Return the threads beside the caller's; a forked process has its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="alq")
