"""How the machine computes: full float32 in the quantizer's steps, and CPUs at their full speed."""

import ctypes
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor

from .interruption import delayed_interrupt

# glibc's mallopt (malloc.h): what is freed at the heap's top is given back above TRIM bytes, and
# what is larger than MMAP bytes is mapped anew each time.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRIM, MMAP = 2**31 - 1, 2**30
# The most that CUDA's kernels for many small systems take at once; they refuse more.
MOST_SYSTEMS = 65_535


def settle_cpu() -> None:
    """Let this process flush denormal numbers to 0 and keep freed memory for the next tensor.

    Moments of weights that get no gradient decay into denormals, which are 13 times slower on CPUs.
    Memory that is given back and asked for again at every operation costs a page fault for each
    4 KB: the search for the nearest level took 11 ns a weight instead of 1.2 at 2 bits, 20 instead
    of 6.4 at 8 bits (one thread, Linux). The process then holds on to its peak memory.
    """
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP)


def settle_sums(compiled: bool) -> None:
    """Let this process add in one order on CUDA wherever PyTorch leaves a choice to timing or luck.

    For runs that must come to the same bits each time, and for processes that must come to the same
    bits as each other. To be called before CUDA's first product, and before anything is `compiled`.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not compiled:  # to read the compiler's settings takes a second
        return
    config = importlib.import_module("torch._inductor.config")
    # By these the compiler tries out how to divide a sum, and takes what was fastest.
    for name, value in (("dynamic_scale_rblock", False), ("deterministic", True)):
        if hasattr(config, name):  # torch 2.9 has both; they are nobody's public interface
            setattr(config, name, value)


def solve(A: Tensor, b: Tensor) -> Tensor:
    """Return A^-1 b (G, L) of A (G, L, L) and b (G, L), however large G is.

    Nothing is raised where A is singular; the solution then need not be finite.
    """
    parts = zip(A.split(MOST_SYSTEMS), b.unsqueeze(2).split(MOST_SYSTEMS), strict=True)
    solved = [torch.linalg.solve_ex(*part)[0] for part in parts]
    return (solved[0] if len(solved) == 1 else torch.cat(solved)).squeeze(2)


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Compute without autocast, and float32 products without TensorFloat-32 or bfloat16.

    The caller's settings, by torch's older interface or its newer one, are put back.
    """
    backends = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface was used, so the older one does not answer
        older = None
    torch.set_float32_matmul_precision("highest")  # in both interfaces
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, newer, strict=True):
            backend.fp32_precision = precision


def optimizer_step(step: Callable) -> Callable:
    """Decorate a step of `ALQ`: no autograd, float32 products, and no Ctrl-C half way through."""

    @wraps(step)
    def guarded(self, *arguments: object, **named: object) -> None:
        device = self.weights[0].parameter.device
        with torch.no_grad(), delayed_interrupt(), float32_products(device):
            step(self, *arguments, **named)
        self._opt_called = True  # torch's schedulers look whether a step came before theirs

    return guarded
