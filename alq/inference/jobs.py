"""What a kernel is told, and how threads share it.

A `Job` is a structure of plain numbers and addresses. A call fills a copy of one that was prepared
for the layer's shape, and all threads run the same function on it. It is cut into units; each
thread takes the next one until none is left.

The threads are those of PyTorch's own operations where these are libgomp's: threads beside them
would wait for a processor, as PyTorch's go on spinning for a while after each operation.
"""

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

FIELDS = (
    # Counters, and how many units there are.
    "next", "slot", "units",
    # How many threads its scratch and its blocks of outputs are for.
    "threads",
    # Addresses of the layer's rows (`alq.inference.rows`) and of its bias; what the rows are for.
    "signs", "alpha", "outputs", "first", "bias", "segments", "n", "row_bytes", "O",
    # Addresses of the input, of it laid out, of the output, of the pictures' steps and inverses.
    "x", "flat", "y", "steps", "inverses",
    # A thread's scratch: its address, and the bytes from one thread's to the next.
    "scratch", "scratch_bytes",
    # The input: its size, values of a picture, bytes from a position's inverse step to the next's;
    # how many inputs side by side are of one group, and whether these are all that a group meets.
    "height", "width", "channels", "picture", "inverse_step", "inputs", "together",
    # Laid out: bytes of a value; from a channel, a phase, an image to the next; values of a phase,
    # of a row; the phases, addresses of their parts of the input (`tiles.overlap`), rows of the
    # longest part, strides.
    "item", "channel_step", "phase_step", "image_step", "plane", "plane_width",
    "rows", "columns", "row_parts", "column_parts", "parts", "stride_y", "stride_x",
    # The tiles (`alq.inference.tiles`) of an image; where a segment's inputs lie.
    "tiles", "lanes", "starts", "targets", "tile_step", "output_step", "output_area",
    "places", "taps",
    # Blocks of outputs: how many, addresses of where they end and where their inputs begin.
    "blocks", "edges", "shifts",
    # Inputs in binary bases (`alq.inference.planes`): how many planes, words of 64 inputs of
    # a group; addresses and number of the midpoints; whether one is not finite.
    "planes", "words", "middle", "flips", "starting", "betas", "midpoints", "odd",
)  # fmt: skip


class Job(ctypes.Structure):
    """The numbers of one call; all are int64.

    Attributes:
        owners: of the memory whose addresses it holds.
    """

    owners: tuple[Any, ...] = ()
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def run(kernel: int, job: Job, units: int) -> None:
    """Call the kernel at the address `kernel` for all units, in the job's threads."""
    job.next, job.slot, job.units = 0, 0, units
    threads, address = job.threads, ctypes.addressof(job)
    if threads == 1 or units == 1:
        return callable_at(kernel)(address)
    if (parallel := team(os.getpid())) is not None:
        return parallel(kernel, address, threads, 0)
    others = pool(os.getpid(), threads - 1)
    waiting = [others.submit(work, kernel, job) for _ in range(threads - 1)]
    work(kernel, job)
    for future in waiting:
        future.result()


def work(kernel: int, job: Job) -> None:
    """Call the kernel; the memory that it works in lives till it is done."""
    callable_at(kernel)(ctypes.addressof(job))


@cache
def callable_at(kernel: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)


STARTED_IN = os.getpid()


@cache
def team(process: int) -> Callable | None:
    """Return libgomp's function that runs another in a team of threads; None where there is none.

    A forked process has lost libgomp's threads, and would wait for them for ever. One that imports
    this after `os.fork` is not seen to be forked.
    """
    paths = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if process != STARTED_IN or forked() or len(paths) != 1 or not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:  # only the one that is loaded, and torch uses
        parallel = ctypes.CDLL(str(paths[0]), os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def forked() -> bool:
    """Return whether `multiprocessing` made this process by forking its parent."""
    if multiprocessing.parent_process() is None:
        return False
    own = getattr(multiprocessing.current_process(), "_start_method", None)  # of its context
    own = own or multiprocessing.get_start_method(allow_none=True)
    return (own or multiprocessing.get_all_start_methods()[0]) == "fork"


@cache
def pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Return the threads beside the caller's; a forked process has its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="alq")
