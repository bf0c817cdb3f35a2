"""A layer's product with its input from the rows of `alq.inference.rows`, in each of five ways.

    tables         many positions: `alq.inference.tables`
    dots           one or a few positions of a linear layer: `alq.inference.dots`
    popcounts      many positions, inputs in binary bases: `alq.inference.popcounts`
    popcount dots  one or a few positions of a linear layer, inputs in binary bases
    decoded        the weights of some outputs at a time in scratch memory, then PyTorch's product

All but decoding need numba, a CPU and float32. Decoding works everywhere, without numba too.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..method.structures import Grouping
from .jobs import Job, run
from .planes import Planes
from .prepared import Prepared, prepared, tell
from .rows import BLOCK, Rows, groups_of_rows, row_bytes
from .tiles import Geometry

PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are


@cache
def kernels_work() -> bool:
    """Return whether numba is installed, and compiles the kernels, which it does as they load."""
    if find_spec("numba") is None:
        return False
    try:
        load_kernels()
    except Exception as reason:  # numba's, LLVM's, or of a disk that is full
        warnings.warn(
            f"numba is installed, but does not work here ({type(reason).__name__}: {reason}); "
            "networks compute from decoded weights, which is slower",
            stacklevel=2,
        )
        return False
    return True


def load_kernels() -> None:
    from . import dots, moves, popcounts, tables  # noqa: F401


def by_tables(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry, kind: str
) -> Tensor:
    """Return the convolution (B, O, *output) of pictures x (B, C, H, W) of float32.

    Its layout is channels_last, in which PyTorch's pooling is faster. Of a linear layer x is (B, C)
    and `geometry` that of one picture with a row of B positions.
    """
    from .moves import lay_out, measure
    from .tables import tiles

    plan = prepared(grouping, geometry, kind, torch.get_num_threads())
    job, y = filled(plan, rows, bias, x)
    for share in turns(plan, job):
        if kind == "int16":
            run(measure, job, share(plan.pictures))
        run(lay_out, job, share(plan.parts))
        run(tiles, job, share(plan.units))
    return y


def by_popcounts(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry,
    planes: Planes, way: str,
) -> Tensor | None:  # fmt: skip
    """Return what `by_tables` does, of an input in binary bases, or None if it is not finite."""
    from .dots import count_dots
    from .inputs import encode
    from .popcounts import count_tiles

    plan = prepared(grouping, geometry, way, torch.get_num_threads(), len(planes.betas))
    job, y = filled(plan, rows, bias, x)
    tell(job, **planes.numbers)
    job.owners += (planes,)
    for share in turns(plan, job):
        run(encode, job, share(plan.parts))
        if job.odd:
            return None
        run(count_tiles if way == "popcounts" else count_dots, job, share(plan.units))
    return y


def by_dots(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry
) -> Tensor:
    """Return the linear layer's y (B, O) of x (B, C), one after the other."""
    from .dots import dots

    plan = prepared(grouping, geometry, "dots", torch.get_num_threads())
    job, y = filled(plan, rows, bias, x)
    run(dots, job, plan.units)
    return y


def filled(plan: Prepared, rows: Rows, bias: Tensor | None, x: Tensor) -> tuple[Job, Tensor]:
    """Return the job of one call, and what it will write."""
    last = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=last)
    y = torch.empty(plan.shape, **PLAIN)
    scratch = torch.empty(plan.bytes, dtype=torch.uint8, device="cpu")  # at 64 bytes
    job = Job.from_buffer_copy(plan.job)
    job.signs, job.alpha = rows.signs.data_ptr(), rows.alpha.data_ptr()
    job.outputs, job.first = rows.outputs.data_ptr(), rows.first.data_ptr()
    if bias is not None:
        job.bias = bias.data_ptr()
    job.x, job.y = x.data_ptr(), y.data_ptr()
    base = scratch.data_ptr()
    for name, offset in plan.offsets:
        setattr(job, name, base + offset)
    ctypes.memset(job.flat, 0, base + plan.bytes - job.flat)  # the zeros between the inputs
    job.owners = plan, rows, bias, x, y, scratch
    return job, y.permute(0, 3, 1, 2) if y.dim() == 4 else y


def turns(plan: Prepared, job: Job) -> Iterator[Callable[[int], int]]:
    """Move the job from images to images; yield what makes of a number for one that of these."""
    for start in range(0, plan.images, plan.at_once):
        count = min(plan.at_once, plan.images - start)
        yield partial(mul, count)
        job.x += count * plan.input_bytes
        job.y += count * plan.output_bytes


def decoded(rows: Rows, grouping: Grouping, start: int, stop: int, plainly: bool = False) -> Tensor:
    """Return the weights of outputs `start` to `stop` in the layer's shape.

    `plainly` leaves numba alone, which takes its time and memory to load.
    """
    on_cpu = rows.alpha.device.type == "cpu" and rows.alpha.dtype == torch.float32
    if on_cpu and not plainly and kernels_work():
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
    if weight.dim() != 4:
        return weight
    # By its strides PyTorch chooses the output's layout, also where they are all the same to it.
    return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)


def blocks_to_decode(rows: Rows, grouping: Grouping) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of outputs, with about BLOCK weights or signs each."""
    O = grouping.by_outputs[0]
    size = max(grouping.numel, rows.signs.numel() * 8)
    step = max(1, BLOCK * O // max(1, size))
    for start in range(0, O, step):
        yield start, min(O, start + step)
