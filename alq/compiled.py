"""The optimizer's passes over the weights as kernels of `torch.compile`: what `--compile` runs.

A step of `ALQ` reads and writes a block of weights about 30 times, in cache. Here `torch.compile`
makes two passes of it, whose arithmetic stays in vector registers; so sums by code, which a CPU
adds one by one, are sums of +-x here, and the nearest level a chain of comparisons. Values equal
those of `ALQ` but for the rounding of sums.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from .codes import search_tables
from .errors import InputError
from .loss_model import scale_moments, update_moments
from .multibit import MultiBitWeight
from .optimizer import ALQ
from .steps import finite_or, solve_with_ridge

KERNELS = 64  # versions of one kernel that torch may compile: it makes one for each L and more


class CompiledALQ(ALQ):
    """`ALQ`, compiled. The first step with each number of live bases L takes seconds to compile."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)
        require_compiler(self.weights[0].parameter.device)
        torch._dynamo.config.recompile_limit = KERNELS

    def _optimise_block(
        self, g: Tensor, moments: list[Tensor], w0: Tensor, codes: Tensor, alpha: Tensor,
        live: Tensor, w_hat: Tensor, scales: tuple[float, float], move_base: bool,
    ) -> Tensor:  # fmt: skip
        L = live.shape[1]
        if L == 0:
            return super()._optimise_block(
                g, moments, w0, codes, alpha, live, w_hat, scales, move_base
            )
        group = self.param_groups[0]
        tables = search_tables(alpha, live)
        h_sums, b = search_and_sum(
            g, *moments, w0, codes, *tables, *group["betas"], *scales, group["eps"], move_base
        )
        A = h_sums[:, pair_places(L, live.device)]  # (G, L, L)
        A.mul_(live.unsqueeze(2) & live.unsqueeze(1))
        alpha = finite_or(alpha, solve_with_ridge(A, b * live, live))
        rebuild(codes, alpha, w_hat)
        return alpha.abs()

    def _products_block(
        self, g: Tensor, moments: list[Tensor], codes: Tensor, live: Tensor, derive: bool
    ) -> list[Tensor]:
        if live.shape[1] == 0:
            return super()._products_block(g, moments, codes, live, derive)
        sums = multiply(g, *moments, codes, live, *self.param_groups[0]["betas"], derive)
        return [torch.where(live, x, 0.0) for x in sums]

    def _write(self, weight: MultiBitWeight) -> None:
        if weight.L == 0:
            return super()._write(weight)
        w_hat = weight.grouping.to_groups(weight.parameter)
        rebuild(weight.codes, weight.live_first(weight.alpha), w_hat)
        weight.write(w_hat)


def require_compiler(device: torch.device) -> None:
    """InputError if `torch.compile` can make nothing for `device`."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing: torch has no one class for it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"--compile: torch.compile does not work for {device} here ({reason[0]}); "
            "install a C++ compiler such as g++ (for CUDA also triton), or leave it out"
        ) from error


@cache
def pair_places(L: int, device: torch.device) -> Tensor:
    """(L, L): in which column of `search_and_sum`'s sums of h the pair (i, j) of bases lies."""
    places = torch.zeros(L, L, dtype=torch.int64)  # the diagonal's are all column 0
    i, j = torch.tril_indices(L, L, offset=-1)
    places[i, j] = places[j, i] = torch.arange(1, len(i) + 1)
    return places.to(device)


def signs_of(code: Tensor, L: int) -> list[Tensor]:
    """Codes (G, n) int32 -> L times (G, n) of -1.0 and 1.0."""
    return [((code >> l) & 1).float() * 2 - 1 for l in range(L)]


@partial(torch.compile, dynamic=True)
def search_and_sum(
    g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, w0: Tensor, codes: Tensor, middle: Tensor,
    positive: Tensor, every: Tensor, beta1: float, beta2: float, p_scale: float, h_scale: float,
    eps: float, move_base: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Moments, t, nearest codes, and the sums that the coordinates are solved from, in one pass.

    `middle`, `positive`, `every` are `search_tables`. Writes to m, v, v_max, codes, and with
    `move_base` t to w0.
    Returns: sums of h over the signs of every two bases (G, 1 + L(L-1)/2; `pair_places`), and
    b = B (h*w0 - p) (G, L).
    """
    levels = positive.shape[1]
    L = levels.bit_length()
    update_moments(g, m, v, v_max, (beta1, beta2))
    p, h = scale_moments(m, v_max, p_scale, h_scale, eps)
    t = w0 - p / h
    distance = t.abs()
    code = positive[:, :1]
    for k in range(1, levels):
        code = torch.where(distance > middle[:, k - 1 : k], positive[:, k : k + 1], code)
    code = torch.where(t < 0, code ^ every, code)  # (G, n)
    signs = signs_of(code, L)
    h_sums = [h.sum(1)]
    for i in range(L):
        h_i = h * signs[i]
        h_sums += [(h_i * signs[j]).sum(1) for j in range(i)]
    x = h * w0 - p
    b = [(x * sign).sum(1) for sign in signs]
    codes.copy_(code)
    if move_base:
        w0.copy_(t)
    return torch.stack(h_sums, 1), torch.stack(b, 1)


@partial(torch.compile, dynamic=True)
def rebuild(codes: Tensor, alpha: Tensor, w_hat: Tensor) -> None:
    """w_hat = B^T alpha, summed in the order of `level_table`; then alpha < 0 flips bits of codes.

    codes, w_hat (G, n) are written to; alpha (G, L).
    """
    code, total, flipped = codes.int(), 0.0, 0
    for l, sign in enumerate(signs_of(code, alpha.shape[1])):
        a = alpha[:, l : l + 1]
        total = total + sign * a
        flipped = flipped | ((a < 0).int() << l)
    w_hat.copy_(total)
    codes.copy_(code ^ flipped)


@partial(torch.compile, dynamic=True)
def multiply(
    g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, codes: Tensor, live: Tensor,
    beta1: float, beta2: float, derive: bool,
) -> list[Tensor]:  # fmt: skip
    """Moments and B g in one pass; with `derive` also what `steps.alpha_moments` sums, before.

    Writes to m, v, v_max. Returns: B g, and with `derive` B m, sum v, sum v_max; each (G, L).
    """
    signs = signs_of(codes.int(), live.shape[1])
    results = [torch.stack([(g * sign).sum(1) for sign in signs], 1)]
    if derive:
        results.append(torch.stack([(m * sign).sum(1) for sign in signs], 1))
        results += [x.sum(1, keepdim=True).expand(live.shape) for x in (v, v_max)]
    update_moments(g, m, v, v_max, (beta1, beta2))
    return results
