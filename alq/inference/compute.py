"""A layer's product with its input from the rows of `alq.inference.rows`, in each of five ways.

    tables         many positions: `alq.inference.tables`
    dots           one or a few positions of a linear layer: `alq.inference.dots`
    popcounts      many positions, inputs in binary bases: `alq.inference.popcounts`
    popcount dots  one or a few positions of a linear layer, inputs in binary bases
    decoded        the weights of some outputs at a time in scratch memory, then PyTorch's product

All but decoding need numba, a CPU and float32. Decoding works everywhere, without numba too.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..method.structures import Grouping
from .plan import COUNTED_LANES, LANES
from .rows import BLOCK, Rows, groups_of_rows, row_bytes
from .tiles import Geometry, Tiling, lay_out, picture_steps, taps, tiling

PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
SHORT_MOST = 511  # of the inputs in int16: 64 of them may add up


@cache
def kernels_work() -> bool:
    """Return whether numba is installed and fits."""
    if find_spec("numba") is None:
        return False
    try:
        from . import dots, popcounts, tables  # noqa: F401
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

    lanes = LANES[kind]
    cut = tiling(geometry, lanes)
    steps = x.new_ones(geometry.batch)
    if kind == "int16":
        steps = picture_steps(x, SHORT_MOST)
        x = (x / steps[:, None, None, None]).round_().to(torch.int16)
    flat = lay_out(x, geometry, cut.joined, lanes)
    mode = 2 * (kind == "int16") + (row_bytes(grouping.n) == 4)
    return in_tiles(
        partial(tiles, mode), rows, grouping, bias, flat, geometry, cut, steps.numpy(),
        TABLES + VECTOR,
    )  # fmt: skip


def by_popcounts(
    rows: Rows, grouping: Grouping, bias: Tensor | None, codes: Tensor, geometry: Geometry,
    betas: np.ndarray,
) -> Tensor:  # fmt: skip
    """Return what `by_tables` does, of the codes (B, C, H, W) of `alq.inference.planes`."""
    from .popcounts import VECTOR, count_tiles

    P, cut = len(betas), tiling(geometry, COUNTED_LANES)
    flat = lay_out(codes, geometry, cut.joined, COUNTED_LANES)
    head = (2 * P * (row_bytes(grouping.n) // 8) + 2) * VECTOR
    return in_tiles(partial(count_tiles, P), rows, grouping, bias, flat, geometry, cut, betas, head)


def in_tiles(
    kernel: Callable, rows: Rows, grouping: Grouping, bias: Tensor | None, flat: Tensor,
    geometry: Geometry, cut: Tiling, scales: np.ndarray, head: int,
) -> Tensor:  # fmt: skip
    """Return the layer's output (B, O, *output), computed tile by tile by `kernel`.

    `flat` is the input as `cut` reads it; `head` the bytes of scratch that the kernel has before
    its tile.
    """
    O, lanes = grouping.shape[0], cut.targets.shape[1]
    y = torch.empty(geometry.batch, *geometry.output, O, **PLAIN)
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

    def work(first: int, last: int) -> None:
        largest = int(np.diff(edges).max())
        size = head // 4 + largest * lanes
        scratch = torch.empty(size, **PLAIN).numpy()  # at 64 bytes
        kernel(
            rows.signs.data_ptr(), *values, *inputs, scales, offsets, y.view(-1).numpy(), sizes,
            scratch, first, last,
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
    values = stride, rows.alpha.numpy(), rows.outputs.numpy(), rows.first.numpy()

    def work(b: int, y: np.ndarray, begin: int, end: int) -> None:
        inputs = padded[b].numpy(), totals[b].numpy()
        dots(rows.signs.data_ptr(), *values, *inputs, y, begin, end)

    return in_parts(work, rows, bias, len(x), O)


def by_popcount_dots(
    rows: Rows, grouping: Grouping, bias: Tensor | None, codes: Tensor, betas: np.ndarray
) -> Tensor:
    """Return what `by_dots` does, of the codes (B, C) of `alq.inference.planes`."""
    from .dots import count_dots

    O, segments, stride = grouping.shape[0], len(rows.first) - 1, row_bytes(grouping.n)
    flags = np.zeros((len(codes), segments, len(betas), 8 * stride), np.uint8)
    for m in range(len(betas)):
        flags[:, :, m, : grouping.n] = (codes >> m & 1).view(-1, segments, grouping.n).numpy()
    totals = flags.sum(3, dtype=np.float32) @ betas  # (B, S)
    packed = np.packbits(flags, axis=3, bitorder="little").view(np.int64)  # (B, S, P, words)
    signs = rows.signs.numpy().view(np.int64)
    values = signs, rows.alpha.numpy(), rows.outputs.numpy(), rows.first.numpy()

    def work(b: int, y: np.ndarray, begin: int, end: int) -> None:
        count_dots(*values, packed[b], totals[b], betas, y, begin, end)

    return in_parts(work, rows, bias, len(codes), O)


def in_parts(
    add: Callable[[int, np.ndarray, int, int], None],
    rows: Rows,
    bias: Tensor | None,
    B: int,
    O: int,
) -> Tensor:
    """Return y (B, O); `add(b, y, begin, end)` adds the rows from `begin` to `end` to y (O,)."""
    R, threads = len(rows.alpha), torch.get_num_threads()
    parts = torch.zeros(threads, B, O, **PLAIN)

    def work(first: int, last: int) -> None:
        for part in range(first, last):
            for b in range(B):
                add(b, parts[part, b].numpy(), R * part // threads, R * (part + 1) // threads)

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
    return torch.zeros(O, **PLAIN) if bias is None else bias


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
