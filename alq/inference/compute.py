"""A layer's product with its input from the rows of `alq.inference.rows`, in each of five ways.

    tables         many positions: `alq.inference.tables`
    dots           one or a few positions of a linear layer: `alq.inference.dots`
    popcounts      many positions, inputs in binary bases: `alq.inference.popcounts`
    popcount dots  one or a few positions of a linear layer, inputs in binary bases
    decoded        the weights of some outputs at a time in scratch memory, then PyTorch's product

All but decoding need numba, a CPU and float32. Decoding works everywhere, without numba too.
"""

import threading
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..method.structures import Grouping
from .jobs import LINE, Job, run
from .planes import Planes
from .prepared import (
    Prepared,
    prepared,
    prepared_for_levels,
    prepared_to_decode,
    tell,
    weight_of_groups,
)
from .rows import BLOCK, Rows, groups_of_rows
from .tiles import Geometry

LAST = threading.local()
WHOLE = 64  # outputs, of whose multiples PyTorch's product is fast


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
    from . import kernels  # noqa: F401


def by_tables(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry, way: str
) -> Tensor:
    """Return the convolution (B, O, *output) of pictures x (B, C, H, W) of float32.

    Its layout is channels_last, in which PyTorch's pooling is faster. Of a linear layer x is (B, C)
    and `geometry` that of one picture with a row of B positions. `way` is the kind of tables, or
    "dots" for a linear layer's positions one after the other.
    """
    plan = prepared(grouping, geometry, way, torch.get_num_threads())
    return computed(plan, rows, bias, x, {})[0]


def by_popcounts(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry,
    planes: Planes, way: str,
) -> Tensor | None:  # fmt: skip
    """Return what `by_tables` does, of an input in binary bases, or None if it is not finite."""
    plan = prepared(grouping, geometry, way, torch.get_num_threads(), len(planes.betas))
    y, job = computed(plan, rows, bias, x, planes.numbers, planes)
    return None if job.odd else y


def computed(
    plan: Prepared, rows: Rows, bias: Tensor | None, x: Tensor, numbers: dict, *owners: Any
) -> tuple[Tensor, Job]:
    """Return what the kernel writes, and its job; it is told `numbers`, too, of `owners`."""
    x = in_order(x)
    y = x.new_empty_strided(plan.shape, plan.strides)
    job = filled(plan)
    tell_of_rows(job, rows)
    if bias is not None:
        job.bias = bias.data_ptr()
    job.x, job.y = x.data_ptr(), y.data_ptr()
    tell(job, **numbers)
    job.owners += rows, bias, x, y, *owners
    run(kernel("compute"), job)
    done(job)
    return y, job


def on_levels(x: Tensor, planes: Planes) -> Tensor:
    """Return the nearest level to each x of float32."""
    x = in_order(x)
    y = torch.empty_like(x)
    job = filled(prepared_for_levels(x.numel(), torch.get_num_threads()))
    job.x, job.y = x.data_ptr(), y.data_ptr()
    tell(job, **planes.numbers)
    job.owners += x, y, planes
    run(kernel("level"), job)
    done(job)
    return y


def in_order(x: Tensor) -> Tensor:
    """Return x with the channels of a position of pictures side by side."""
    last = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.contiguous(memory_format=last)


@cache
def kernel(name: str) -> int:
    """Return the address of a kernel."""
    from . import kernels

    return getattr(kernels, name)


def filled(plan: Prepared) -> Job:
    """Return the job of one call, with memory.

    That is what the calling thread's last job had, if it is large enough. So each thread of a team
    works where it did before: what another core has written takes long to come over.
    """
    memory = vars(LAST).pop("memory", None)  # nobody else's, until `done`
    if memory is None or len(memory) < plan.bytes:
        memory = torch.empty(plan.bytes, dtype=torch.uint8, device="cpu")  # at 64 bytes
    job = Job.from_buffer_copy(plan.job)
    job.counters = address = memory.data_ptr()
    job.memory = address + LINE * (job.threads + 1)
    job.memory_bytes = len(memory) // LINE // job.threads * LINE - 2 * LINE
    job.owners = plan, memory
    return job


def done(job: Job) -> None:
    """Leave the memory of a job, which no thread works at any more, to the next one."""
    LAST.memory = job.owners[1]


def tell_of_rows(job: Job, rows: Rows) -> None:
    job.signs, job.alpha = rows.signs.data_ptr(), rows.alpha.data_ptr()
    job.outputs, job.first = rows.outputs.data_ptr(), rows.first.data_ptr()


def decoded(rows: Rows, grouping: Grouping, start: int, stop: int, plainly: bool = False) -> Tensor:
    """Return the weights of outputs `start` to `stop` in the layer's shape.

    `plainly` leaves numba alone, which takes its time and memory to load.
    """
    on_cpu = rows.alpha.device.type == "cpu" and rows.alpha.dtype == torch.float32
    if on_cpu and not plainly and kernels_work():
        plan = prepared_to_decode(grouping, start, stop, torch.get_num_threads())
        found, job = rows.alpha.new_empty_strided(plan.shape, plan.strides), filled(plan)
        tell_of_rows(job, rows)
        job.y = found.data_ptr() - 4 * start * (found.numel() // max(1, stop - start))
        job.owners += rows, found
        run(kernel("decode_blocks"), job)
        done(job)
        if found.shape[1:] == grouping.shape[1:]:
            return found
        groups = found[:, :, : grouping.n]
    else:
        groups = groups_of_rows(rows, grouping.n, start, stop)
    return weight_of_groups(grouping, groups)


def blocks_to_decode(rows: Rows, grouping: Grouping) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of outputs, with about BLOCK weights or signs each."""
    O = grouping.by_outputs[0]
    # PyTorch expands the signs, the kernel does not.
    size = grouping.numel if kernels_work() else max(grouping.numel, rows.signs.numel() * 8)
    step = -(-O // -(-size // BLOCK)) if size else O
    step = -(-step // WHOLE) * WHOLE
    for start in range(0, O, step):
        yield start, min(O, start + step)
