"""A layer's product with its input from the rows of `alq.inference.rows`, in each of six ways.

    tables         many positions: `alq.inference.tables`
    dots           one or a few positions of a linear layer: `alq.inference.dots`
    popcounts      many positions, inputs in binary bases: `alq.inference.popcounts`
    popcount dots  one or a few positions of a linear layer, inputs in binary bases
    decoded        the weights of some outputs at a time in scratch memory, then PyTorch's product
    held           the weights that the layer keeps in float32, too, then PyTorch's product

All but the last two need numba, a CPU and float32; these work everywhere, without numba too.
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
    CACHE,
    Prepared,
    prepared,
    prepared_for_levels,
    prepared_to_decode,
    tell,
    weight_of_groups,
)
from .rows import Rows, groups_of_rows, outputs_at_a_time
from .tiles import Geometry

LAST = threading.local()
KEPT = 2 * CACHE  # bytes a thread at most that a calling thread keeps from call to call


@cache
def kernels_work() -> bool:
    """Return whether numba is installed, and compiles the kernels, which it does as they load."""
    if find_spec("numba") is None:
        return False
    try:
        kernel()
    except Exception as reason:  # numba's, LLVM's, or of a disk that is full
        warnings.warn(
            f"numba is installed, but does not work here ({type(reason).__name__}: {reason}); "
            "networks compute from decoded weights, which is slower",
            stacklevel=2,
        )
        return False
    return True


def kernels_take(x: Tensor) -> bool:
    """Return whether the kernels compute with a tensor such as x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and kernels_work()


@cache
def kernel() -> int:
    """Return the address of what all threads run; compile it first where that was not done."""
    from . import kernels

    return kernels.compute.address


def by_kernel(
    rows: Rows, grouping: Grouping, bias: Tensor | None, x: Tensor, geometry: Geometry, way: str,
    planes: Planes | None = None,
) -> Tensor | None:  # fmt: skip
    """Return the convolution (B, O, *output) of pictures x (B, C, H, W) of float32.

    Its layout is channels_last, in which PyTorch's pooling is faster. Of a linear layer x is (B, C)
    and `geometry` that of one picture with a row of B positions.

    Arguments:
        way: the kind of tables, or one of the other ways that are kernels.
        planes: of an input in binary bases, for the ways that count. The result is then None if the
            input is not finite.
    """
    betas = 0 if planes is None else len(planes.betas)
    plan = prepared(grouping, geometry, way, torch.get_num_threads(), betas)
    x = in_order(x)
    y = x.new_empty_strided(plan.shape, plan.strides)
    job = filled(plan)
    tell_of_rows(job, rows)
    if bias is not None:
        job.bias = bias.data_ptr()
    if planes is not None:
        tell(job, **planes.numbers)
    job.x = x.data_ptr()
    run_kernel(job, y, x, rows, bias, planes)
    return None if job.odd else y


def on_levels(x: Tensor, planes: Planes) -> Tensor:
    """Return the nearest level to each x of float32."""
    x = in_order(x)
    y = torch.empty_like(x)
    job = filled(prepared_for_levels(x.numel(), torch.get_num_threads()))
    tell(job, **planes.numbers)
    job.x = x.data_ptr()
    run_kernel(job, y, x, planes)
    return y


def in_order(x: Tensor) -> Tensor:
    """Return x with the channels of a position of pictures side by side."""
    last = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.contiguous(memory_format=last)


def filled(plan: Prepared) -> Job:
    """Return the job of one call, with memory.

    That is what the calling thread's last job had, if it is large enough. So each thread of a team
    works where it did before: what another core has written takes long to come over.
    """
    memory = vars(LAST).pop("memory", None)  # nobody else's until all is done
    if memory is None or len(memory) < plan.bytes:
        memory = torch.empty(plan.bytes, dtype=torch.uint8, device="cpu")  # at 64 bytes
    job = Job.from_buffer_copy(plan.job)
    job.counters = address = memory.data_ptr()
    job.memory = address + LINE * (job.threads + 1)
    job.memory_bytes = len(memory) // LINE // job.threads * LINE - 2 * LINE
    job.owners = plan, memory
    return job


def run_kernel(job: Job, y: Tensor, *owners: Any) -> None:
    """Compute y of what is the owners'; leave the job's memory to the next one, if it is small."""
    job.y = y.data_ptr()
    job.owners += y, *owners
    run(kernel(), job)
    memory = job.owners[1]
    if len(memory) <= KEPT * job.threads:
        LAST.memory = memory


def tell_of_rows(job: Job, rows: Rows) -> None:
    job.signs, job.alpha = rows.signs.data_ptr(), rows.alpha.data_ptr()
    job.outputs, job.first = rows.outputs.data_ptr(), rows.first.data_ptr()


def decoded(rows: Rows, grouping: Grouping, start: int, stop: int) -> Tensor:
    """Return the weights of outputs `start` to `stop` in the layer's shape."""
    if kernels_take(rows.alpha):
        plan = prepared_to_decode(grouping, start, stop, torch.get_num_threads())
        found, job = rows.alpha.new_empty_strided(plan.shape, plan.strides), filled(plan)
        tell_of_rows(job, rows)
        run_kernel(job, found, rows)
        if found.shape[1:] == grouping.shape[1:]:
            return found
        groups = found[:, :, : grouping.n]
    else:
        groups = groups_of_rows(rows, grouping.n, start, stop)
    return weight_of_groups(grouping, groups)


def blocks_to_decode(rows: Rows, grouping: Grouping) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of outputs that are decoded at a time."""
    O = grouping.by_outputs[0]
    size = grouping.numel
    if not kernels_take(rows.alpha):  # PyTorch expands the signs
        size = max(size, rows.signs.numel() * 8)
    step = outputs_at_a_time(O, size)
    for start in range(0, O, step):
        yield start, min(O, start + step)
