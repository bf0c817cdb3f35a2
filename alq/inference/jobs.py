"""What a kernel is told, and how threads share it.

A `Job` is a structure of plain numbers and addresses. A call fills a copy of one that was prepared
for the layer's shape, and all threads run the same function on it. It is cut into units, and each
thread has its share of them.

The threads are those of PyTorch's own operations where these are libgomp's: threads beside them
would wait for a processor, as PyTorch's go on spinning for a while after each operation. There each
thread also has the same share of all layers, and of PyTorch's operations between them.
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

VECTOR = 64  # bytes of what the kernels compute with at a time
LINE = 64  # bytes of a cache line, in which no two threads write
CHUNK = 2**13  # values that are put on levels in a unit
DECODE, LEVELS = 1, 2  # tasks other than a layer's product
FIELDS = (
    # Which task: one of those above, or 0 for a layer's product.
    "task",
    # How many units, and threads that share them; address of the function that returns a thread's
    # number, 0 where they are to be counted; of the counters, one a thread and one for all.
    "units", "threads", "number", "counters",
    # Address of the first thread's memory, bytes from one thread's to the next; where in it what
    # lies that follows the scratch: the input laid out, then the pictures' steps and inverses.
    "memory", "memory_bytes", "flat", "steps", "inverses",
    # Addresses of the layer's rows (`alq.inference.rows`) and of its bias; what the rows are for.
    "signs", "alpha", "outputs", "first", "bias", "segments", "n", "row_bytes", "O",
    # Addresses of the input and of the output.
    "x", "y",
    # The input: its size, pictures of an image, values of a picture, bytes from a position's
    # inverse step to the next's; how many inputs side by side are of one group, and whether these
    # are all that a group meets.
    "height", "width", "channels", "pictures", "picture", "inverse_step", "inputs", "together",
    # Laid out: bytes of a value, 0 where nothing is; how many places of a phase at a time, from a
    # channel to the next; all rows, those of a picture, places of a row, of a picture; the phases,
    # addresses of their parts of the input (`tiles.overlap`), strides.
    "item", "length", "channel_step", "plane_rows", "plane_height", "plane_width", "picture_places",
    "rows", "columns", "row_parts", "column_parts", "stride_y", "stride_x",
    # How many images, tiles (`alq.inference.tiles`) of an image, and strips that these are cut
    # into, with the address of where they end; where a segment's inputs lie.
    "images", "tiles", "lanes", "starts", "targets", "output_step", "output_area", "strips", "ends",
    "places", "taps",
    # Blocks of outputs: how many, addresses of where they end and where their inputs begin.
    "blocks", "edges", "shifts",
    # Inputs in binary bases (`alq.inference.planes`): how many planes; addresses and number of the
    # midpoints; whether one is not finite; the levels, how many values are put on them.
    "planes", "middle", "flips", "starting", "betas", "midpoints", "odd", "levels", "values",
)  # fmt: skip


class Job(ctypes.Structure):
    """The numbers of one call; all are int64.

    Attributes:
        owners: of the memory whose addresses it holds.
    """

    owners: tuple[Any, ...] = ()
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def run(kernel: int, job: Job) -> None:
    """Call the kernel at the address `kernel` for all units, in the job's threads."""
    threads, address = job.threads, ctypes.addressof(job)
    ctypes.memset(job.counters, 0, LINE * (threads + 1))
    if threads == 1 or job.units == 1:
        return callable_at(kernel)(address)
    if (found := team(os.getpid())) is not None:
        parallel, job.number = found
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
def team(process: int) -> tuple[Callable, int] | None:
    """Return what runs a function in a team of threads, and the address of what numbers them.

    Both are libgomp's; None where there is none. A forked process has lost libgomp's threads, and
    would wait for them for ever. One that imports this after `os.fork` is not seen to be forked.
    """
    paths = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if process != STARTED_IN or forked() or len(paths) != 1 or not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:  # only the one that is loaded, and torch uses
        library = ctypes.CDLL(str(paths[0]), os.RTLD_NOLOAD)
        parallel, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel, ctypes.cast(number, ctypes.c_void_p).value or 0


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
