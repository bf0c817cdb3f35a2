"""Several processes at one run, as `torchrun` starts them, and each one's share of the work.

Every process holds the whole network and quantizer. Of each batch it computes its share;
DistributedDataParallel averages the gradients; then all processes take the same step. Without
torchrun there is one process, and everything here computes as if alone.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError

PATIENCE = timedelta(seconds=10)  # with a store that does not answer


def claim_device() -> None:
    """Let "cuda" mean this process's own GPU, if there is one for it."""
    if launched() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())


@contextmanager
def join_processes(device: torch.device) -> Iterator[None]:
    """Work together with torchrun's other processes: by nccl on CUDA, by gloo elsewhere.

    Raises: InputError if they cannot have a GPU each, and `device` asks for that.
    """
    if not launched():
        yield
        return
    on_cuda = device.type == "cuda"
    if on_cuda and local_rank() >= (found := torch.cuda.device_count()):
        raise InputError(
            f"--nproc_per_node: more processes than the {found} GPUs here; give torchrun {found}, "
            "or add --device cpu"
        )
    if on_cuda and device.index not in (None, local_rank()):
        raise InputError(f"--device {device}: under torchrun give --device cuda, a GPU for each")
    # gloo for what is on the host: asking after each step whether to stop waits for no GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    yield
    # Not after an error: nccl's would wait for the others, which wait for this process.
    dist.destroy_process_group()


def launched() -> bool:
    """Return whether torchrun has started this process."""
    return dist.is_torchelastic_launched()


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_cores() -> int:
    """Return how many of the cores that may be used here fall to this process, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def first_to_say(text: str) -> bool:
    """Return whether no other process of this torchrun has asked the same with this `text`.

    So what all have to say is said once, and what only one has to say is said, too.
    """
    if not launched():
        return True
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        return store.add(text, 1) == 1
    except Exception:  # whatever is wrong with the store: the text must not be lost
        return True


def process_count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if process_count() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process through alone, then the others: for downloading and unpacking."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


@dataclass(frozen=True)
class Share:
    """A process's share of one batch.

    Attributes:
        part: its places in the epoch's order.
        weight: factor of its mean loss, with which the mean over processes is the batch's mean.
    """

    part: slice
    weight: float


def share_batches(
    count: int, batch_size: int, training: bool, number: int, processes: int
) -> list[Share]:
    """Return the shares that process `number` of `processes` has of `count` samples in batches.

    A last batch may be smaller than the number of processes. In training those without a sample
    then compute the whole of it with weight 0, as every process must take every step.
    """
    shares = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        low, high = (start + k * size // processes for k in (number, number + 1))
        if high > low:
            shares.append(Share(slice(low, high), (high - low) * processes / size))
        elif training:
            shares.append(Share(slice(start, start + size), 0.0))
    return shares


def check_batch_norm(model: nn.Module, count: int, batch_size: int) -> None:
    """Raise InputError if a process would train on one image, which BatchNorm1d refuses."""
    least = 2 * process_count()  # of a smaller batch somebody's share is one image

    def fits(size: int) -> bool:
        return size >= least and not 0 < count % size < least

    if fits(batch_size) or not any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
        return
    sizes = [*range(min(batch_size, count), 1, -1), *range(batch_size, count + 1)]
    advice = [f"--batch_size {size}" for size in sizes if fits(size)] or ["more images"]
    raise InputError(
        f"--batch_size {batch_size}: of {count} training images the last batch has "
        f"{count % batch_size or batch_size}; batch norm needs at least {least}, two for each "
        f"process; use {advice[0]}"
    )


def gather_from_all(value: object) -> list:
    """Return every process's `value`, by rank."""
    if process_count() == 1:
        return [value]
    gathered: list = [None] * process_count()
    dist.all_gather_object(gathered, value)
    return gathered


def combine_over_processes(combine: Callable[[Iterable], float], values: list) -> list:
    """Return each of `values` of all processes combined, as by `sum`, in the order of ranks."""
    return [combine(column) for column in zip(*gather_from_all(values), strict=True)]


def largest_over_processes(value: int) -> int:
    """Return the largest `value` of any process, cheaply enough to ask at each step."""
    if process_count() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the `values` of all processes, in their place and equal in each."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def average_gradients(model: nn.Module) -> nn.Module:
    """Return what computes training batches: `model`, its gradients averaged over the processes.

    Batch norm: each process normalises its share with that share's statistics; the running
    statistics are the main process's.
    """
    return DistributedDataParallel(model) if process_count() > 1 else model


def copy_buffers_from_main(model: nn.Module) -> None:
    """Give all processes the main process's running statistics."""
    if process_count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def check_same(state: object, when: str) -> None:
    """Raise RuntimeError if a tensor in `state`, nested as it may be, differs between processes.

    Compared are the sums of its bytes, which one changed bit changes.
    """
    if process_count() == 1:
        return
    flat = (tensor.detach().flatten().contiguous() for tensor in tensors_in(state))
    sums_of_bytes = [x.view(torch.uint8).sum(dtype=torch.int64).cpu() for x in flat]
    own = torch.stack(sums_of_bytes).tolist()
    for other, sums in enumerate(gather_from_all(own)):
        if sums != own:
            different = sum(a != b for a, b in zip(own, sums, strict=True))
            raise RuntimeError(
                f"{when}: processes {rank()} and {other} differ in {different} of {len(own)} "
                "tensors, though all take the same steps; start again from the last checkpoint"
            )


def tensors_in(state: object) -> Iterator[Tensor]:
    """Yield all tensors in nested mappings, lists, tuples and data classes."""
    if is_dataclass(state) and not isinstance(state, type):
        state = [getattr(state, field.name, None) for field in fields(state)]
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (Mapping, list, tuple)):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from tensors_in(value)
