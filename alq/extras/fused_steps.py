"""The arithmetic of `alq.method.steps` as Triton kernels: what `--compile` runs on CUDA.

A program works on one group, alone: no two write to the same place, every sum has one order, and so
two runs give the same bits. It reads and writes each weight once and keeps what lies between in
registers; a group of more than `LARGEST_BLOCK` weights passes through them in blocks.

    basis_step             moments, search, sums, the solve in scalars, w_hat, codes     one kernel
    coordinate_gradients   moments and B g                                               one kernel
    basis_products         the same kernel without the moments
    rebuild                w_hat, as at the end of a basis step

Values equal those of the eager steps but for the rounding of sums. Triton comes with torch for
CUDA; this module imports it, and is imported when a weight on CUDA asks for it.
"""

import torch
import triton
from torch import Tensor

from ..method.codes import DEVICE_BLOCK
from ..method.loss_model import AMSGrad
from ..method.steps import RIDGE, Groups
from .fused_kernels import basis_kernel, products_kernel, rebuild_kernel

BLOCK = DEVICE_BLOCK
# Weights that one warp holds at a time, four a thread, and adds up without waiting for other warps.
# Twice as many take 168 to 255 registers a thread at 8 bits, which leaves room for half the warps.
LARGEST_BLOCK = 128
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def basis_step(
    groups: Groups, w0: Tensor, w_hat: Tensor, t: int, amsgrad: AMSGrad, move_base: bool,
    ridge: float | None = None,
) -> None:  # fmt: skip
    """Do what `steps.basis_step` does."""
    launch(
        basis_kernel, groups.codes, groups.g, groups.m, groups.v, groups.v_max, groups.codes,
        groups.alpha, groups.live, w0, w_hat, *decays(amsgrad.betas), *amsgrad.at(t),
        RIDGE if ridge is None else float(ridge),
        L=groups.live.shape[1], MOVE_BASE=move_base, RELATIVE_RIDGE=ridge is None,
    )  # fmt: skip


def coordinate_gradients(groups: Groups, betas: tuple[float, float]) -> Tensor:
    """Return what `steps.coordinate_gradients` does."""
    products = torch.empty_like(groups.alpha)
    launch(
        products_kernel, groups.codes, groups.g, groups.m, groups.v, groups.v_max, groups.codes,
        groups.live, products, *decays(betas), L=groups.live.shape[1], MOMENTS=True,
    )  # fmt: skip
    return products


def basis_products(x: Tensor, codes: Tensor, live: Tensor) -> Tensor:
    """Return B x (G, L) of x (G, n), as `codes.basis_products` does."""
    products = x.new_empty(live.shape)
    launch(
        products_kernel, codes, x, x, x, x, codes, live, products, *decays((0.0, 0.0)),
        L=live.shape[1], MOMENTS=False,
    )  # fmt: skip
    return products


def rebuild(codes: Tensor, alpha: Tensor, w_hat: Tensor) -> None:
    """Write w_hat = B^T alpha (G, n) of codes (G, n) and live coordinates (G, L)."""
    launch(rebuild_kernel, codes, codes, alpha, w_hat, L=alpha.shape[1])


def launch(kernel: triton.JITFunction, sizes: Tensor, *arguments: object, **constants: int) -> None:
    """Run a program of `kernel` for each of the G groups that `sizes` (G, n) has."""
    for tensor in arguments:
        assert not isinstance(tensor, Tensor) or tensor.is_contiguous()
    G, n = sizes.shape
    block = min(max(32, triton.next_power_of_2(n)), LARGEST_BLOCK)
    with torch.cuda.device_of(sizes):
        kernel[(G,)](*arguments, n, **constants, BLOCK=block, **OPTIONS)


def decays(betas: tuple[float, float]) -> tuple[float, float, float]:
    """Return 1 - beta1, beta2 and 1 - beta2: float32 has 0.001, but not its difference from 1."""
    beta1, beta2 = betas
    return 1 - beta1, beta2, 1 - beta2
