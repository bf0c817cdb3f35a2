"""The optimizer's passes over the weights as kernels of `torch.compile`: what `--compile` runs.

A step of `ALQ` reads and writes a block of weights some 30 times, in cache. Here `torch.compile`
makes one or two passes of it, with the arithmetic in vector registers; therefore the nearest level
is searched for by selecting and not by looking up, and a sum by code the sums of +-x that it stands
for. Values equal those of `ALQ` but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

from ..errors import InputError
from ..method.codes import DEVICE_BLOCK, from_keys, midpoints, positive_levels, sort_rows, to_keys
from ..method.loss_model import scale_moments, scales, update_moments
from ..method.optimizer import ALQ
from ..method.steps import RIDGE, finite_or
from ..method.weight import MultiBitWeight

# All sums over a group belong into one loop; by default the compiler starts another after 16. Its
# loops that share a buffer also fail to compile in torch 2.14 ("KeyError: 'buf0'"). Nor may it
# write a long expression's parts to memory, of which it would make further loops. Multiplying and
# adding in one instruction takes up to a fifth off a basis step.
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "max_fusion_size": 1024,
    "cpp.max_horizontal_fusion_size": 1024,
    "realize_opcount_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
}
# With more live bases the search's tables are made by a kernel of their own: made anew for every 16
# weights they would cost more than its call.
MAX_INLINE_BASES = 6
KERNELS = 64  # versions of one kernel that torch may make: one for each L and kind of step


class CompiledALQ(ALQ):
    """`ALQ`, compiled. The first step with each number of live bases L takes seconds to compile."""

    block = DEVICE_BLOCK

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)
        if self.weights:
            require_compiler(self.weights[0].parameter.device)
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, KERNELS)

    def _optimise_block(
        self, g: Tensor, moments: list[Tensor], w0: Tensor, codes: Tensor, alpha: Tensor,
        live: Tensor, w_hat: Tensor, t: int, move_base: bool,
    ) -> Tensor:  # fmt: skip
        if not can_compile(live.shape[1], g.dtype):
            return super()._optimise_block(g, moments, w0, codes, alpha, live, w_hat, t, move_base)
        group = self.param_groups[0]
        tables = (sort_rows(level_keys(alpha, live)),)
        if live.shape[1] > MAX_INLINE_BASES:
            tables = search_tables(*tables)
        sums = optimise_bases(
            g, *moments, w0, codes, live, tables, torch.ones_like(alpha[:, :1]),
            *group["betas"], *scales(t, group["lr"], group["betas"]), group["eps"], move_base,
        )  # fmt: skip
        return optimise_coordinates(sums, alpha, live, codes, w_hat)

    def _products_block(
        self, g: Tensor, moments: list[Tensor], codes: Tensor, live: Tensor, derive: bool
    ) -> list[Tensor]:
        if not can_compile(live.shape[1], g.dtype):
            return super()._products_block(g, moments, codes, live, derive)
        one, L = torch.ones_like(g[:, :1]), live.shape[1]
        derived = inherit(*moments, codes, L) if derive else ()
        products = multiply(g, *moments, codes, one, L, *self.param_groups[0]["betas"])
        return [torch.where(live, x, 0.0) for x in (products, *derived)]

    def _write(self, weight: MultiBitWeight) -> None:
        if not can_compile(weight.L, weight.alpha.dtype):
            return super()._write(weight)
        w_hat = weight.grouping.to_groups(weight.parameter)
        rebuild(weight.codes, weight.live_first(weight.alpha), w_hat)
        weight.write(w_hat)


def quantizer_kind(compile: bool) -> type[ALQ]:
    """What `--compile` chooses."""
    return CompiledALQ if compile else ALQ


def can_compile(L: int, dtype: torch.dtype) -> bool:
    """All else is left to `ALQ`: `to_keys` takes no other type."""
    return L > 0 and dtype == torch.float32


@cache
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


def kernel(function: Callable) -> Callable:
    """`function` by `torch.compile`, for all sizes of groups at once.

    Compiled when first called: to prepare it at import would cost every script a second.
    """

    @cache
    def compiled() -> Callable:
        return torch.compile(function, dynamic=True, options=OPTIONS)

    @wraps(function)
    def run(*arguments: object) -> object:
        return compiled()(*arguments)

    return run


@kernel
def level_keys(alpha: Tensor, live: Tensor) -> Tensor:
    """The 2^(L-1) levels >= 0 with their codes, to sort: (G, L) twice -> (G, 2^(L-1)) int64."""
    L = alpha.shape[1]
    codes = torch.arange(1, 2**L, 2, device=alpha.device, dtype=torch.int32).unsqueeze(0)
    every = live_bits(live)
    return to_keys(*positive_levels(signed_sum(codes, alpha), codes, every))


@kernel
def search_tables(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted `level_keys` (G, K) -> midpoints (G, K - 1); codes (G, K/4), four to an int32."""
    levels, codes = from_keys(keys)
    return midpoints(levels), codes.to(torch.uint8).view(torch.int32)


def nearest_positive(x: Tensor, middle: Tensor, codes: Tensor) -> Tensor:
    """The code of the level >= 0 that x >= 0 is nearest to: (G, n), tables -> (G, n) int32.

    Bisection: each comparison selects, weight by weight, the half of both tables that remains. At
    8 bits it takes half the time of comparing with all midpoints in turn.
    """
    K = middle.shape[1] + 1
    middle = [middle[:, k : k + 1] for k in range(K - 1)]  # may be none to split
    codes = codes.split(1, dim=1)
    shift = 0  # to the code in an int32 of four
    while K > 1:
        K //= 2
        above = x > middle[K - 1]
        middle = [torch.where(above, middle[K + k], middle[k]) for k in range(K - 1)]
        half = len(codes) // 2
        if half:
            codes = [torch.where(above, codes[half + k], codes[k]) for k in range(half)]
        else:
            shift = shift + above.int() * (8 * K)
    return (codes[0] >> shift) & 255


@kernel
def optimise_bases(
    g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, w0: Tensor, codes: Tensor, live: Tensor,
    tables: tuple[Tensor, ...], one: Tensor, beta1: float, beta2: float, p_scale: float,
    h_scale: float, eps: float, move_base: bool,
) -> Tensor:  # fmt: skip
    """Moments, nearest codes, and the sums that the coordinates follow from, in one pass.

    `tables` are `search_tables`, or what these are made of; `one` is (G, 1) of ones.
    Writes to m, v, v_max, codes and, with `move_base`, t to w0.
    Returns: (G, L + 1 + L(L-1)/2): the sums of x = h*w0 - p times the signs of each basis; of h;
    of h times the signs of every two bases.
    """
    L = live.shape[1]
    # Keeps (G, n) two dimensions for the compiler, which otherwise updates in a pass of its own.
    g = g * one
    update_moments(g, m, v, v_max, (beta1, beta2))
    p, h = scale_moments(m, v_max, p_scale, h_scale, eps)
    t = w0 - p / h  # (G, n)

    if len(tables) == 1:
        levels, positive = from_keys(*tables)
        tables = midpoints(levels), positive
    code = nearest_positive(t.abs(), *tables)
    code = torch.where(t < 0, code ^ live_bits(live), code)  # (G, n)

    signs = signs_of(code, L)
    x = h * w0 - p
    sums = [(x * sign).sum(1) for sign in signs]
    sums.append(h.sum(1))
    for i in range(L):
        h_i = h * signs[i]
        sums += [(h_i * signs[j]).sum(1) for j in range(i)]
    codes.copy_(code)
    if move_base:
        w0.copy_(t)
    return torch.stack(sums, 1)


@kernel
def optimise_coordinates(
    sums: Tensor, alpha: Tensor, live: Tensor, codes: Tensor, w_hat: Tensor
) -> Tensor:
    """Solve for alpha (G, L) with `optimise_bases`' sums, as `steps.solve_coordinates` does.

    Writes to w_hat and, as alpha becomes positive, to codes.
    """
    L = alpha.shape[1]
    exists = live.unbind(1)  # L times (G,)
    b, total, pairs = sums[:, :L].unbind(1), sums[:, L], iter(sums[:, L + 1 :].unbind(1))
    b = [torch.where(e, x, 0.0) for e, x in zip(exists, b, strict=True)]
    A = {(i, i): torch.where(exists[i], total, 1.0) + RIDGE for i in range(L)}
    for i in range(L):
        for j in range(i):
            A[i, j] = torch.where(exists[i] & exists[j], next(pairs), 0.0)
    alpha = finite_or(alpha, torch.stack(solve(A, b), 1) * live)
    code = codes.int()
    w_hat.copy_(signed_sum(code, alpha))  # the flip does not change it
    for l, a in enumerate(alpha.split(1, dim=1)):
        code = code ^ ((a < 0).int() << l)
    codes.copy_(code)
    return alpha.abs()


def solve(A: dict[tuple[int, int], Tensor], b: list[Tensor]) -> list[Tensor]:
    """A^-1 b by A = C D C^T (Cholesky without roots), for all groups at once.

    `A` holds the elements (i, j), i >= j, of positive definite matrices, each (G,) as those of b.
    """
    C, D = {}, []
    for i in range(len(b)):
        for j in range(i):
            rest = A[i, j] - sum(C[i, k] * D[k] * C[j, k] for k in range(j))
            C[i, j] = rest / D[j]
        D.append(A[i, i] - sum(C[i, k] * C[i, k] * D[k] for k in range(i)))
    x = list(b)
    for i in range(len(b)):
        x[i] = x[i] - sum(C[i, k] * x[k] for k in range(i))
    x = [value / d for value, d in zip(x, D, strict=True)]
    for i in reversed(range(len(b))):
        x[i] = x[i] - sum(C[k, i] * x[k] for k in range(i + 1, len(b)))
    return x


@kernel
def rebuild(codes: Tensor, alpha: Tensor, w_hat: Tensor) -> None:
    """w_hat = B^T alpha, (G, n) from codes (G, n) and alpha (G, L)."""
    w_hat.copy_(signed_sum(codes.int(), alpha))


@kernel
def multiply(
    g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, codes: Tensor, one: Tensor, L: int,
    beta1: float, beta2: float,
) -> Tensor:  # fmt: skip
    """Moments and B g (G, L) in one pass. Writes to m, v, v_max; `one` is (G, 1) of ones."""
    g = g * one
    update_moments(g, m, v, v_max, (beta1, beta2))
    return torch.stack([(g * sign).sum(1) for sign in signs_of(codes.int(), L)], 1)


@kernel
def inherit(
    m: Tensor, v: Tensor, v_max: Tensor, codes: Tensor, L: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of `steps.alpha_moments`: B m (G, L); sum v, sum v_max (G, 1)."""
    m_a = torch.stack([(m * sign).sum(1) for sign in signs_of(codes.int(), L)], 1)
    return m_a, v.sum(1, keepdim=True), v_max.sum(1, keepdim=True)


def signs_of(code: Tensor, L: int) -> list[Tensor]:
    """Codes int32 -> L times -1.0 and 1.0, of their shape."""
    return [((code >> l) & 1).float() * 2 - 1 for l in range(L)]


def signed_sum(code: Tensor, alpha: Tensor) -> Tensor:
    """Levels by code, (G, n) or (1, n), of alpha (G, L), added in the order of `level_table`."""
    total = 0.0
    for a, sign in zip(alpha.split(1, dim=1), signs_of(code, alpha.shape[1]), strict=True):
        total = total + sign * a
    return total


def live_bits(live: Tensor) -> Tensor:
    """(G, L) bool -> (G, 1) int32, as `pack_bits`."""
    return sum(bit.int() << l for l, bit in enumerate(live.split(1, dim=1)))
