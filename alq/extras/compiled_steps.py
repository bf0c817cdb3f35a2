"""The arithmetic of `alq.method.steps` by `torch.compile`: what `--compile` runs on a CPU.

An eager step reads and writes a block of weights some 30 times, in cache. Here `torch.compile`
makes one or two passes of it, with the arithmetic in vector registers; therefore the nearest level
is searched for by selecting and not by looking up, and a sum by code the sums of +-x that it stands
for. Values equal those of the eager steps but for the rounding of sums.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from ..method.codes import DEVICE_BLOCK
from ..method.loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from ..method.nearest import from_keys, midpoints, positive_levels, sort_rows, to_keys
from ..method.steps import RIDGE, Groups, finite_or

BLOCK = DEVICE_BLOCK
# All sums over a group belong into one loop; by default the compiler starts another after 16. Its
# loops that share a buffer also fail to compile in torch 2.14 ("KeyError: 'buf0'"). Nor may it
# write a long expression's parts to memory, of which it would make further loops. Multiplying and
# adding in one instruction takes up to a fifth off a basis step.
OPTIONS: dict[str, str | int | bool | Callable] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "max_fusion_size": 1024,
    "cpp.max_horizontal_fusion_size": 1024,
    "realize_opcount_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
}
# With more live bases the search's tables are made by a kernel of their own: made anew for every 16
# weights they would cost more than its call.
MAX_INLINE_BASES = 6
VERSIONS = 64  # of one kernel that torch may make: one for each L and kind of step


def basis_step(
    groups: Groups, w0: Tensor, w_hat: Tensor, t: int, amsgrad: AMSGrad, move_base: bool,
    ridge: float | None = None,
) -> None:  # fmt: skip
    """Do what `steps.basis_step` does."""
    tables: tuple[Tensor, ...] = (sort_rows(level_keys(groups.alpha, groups.live)),)
    if groups.live.shape[1] > MAX_INLINE_BASES:
        tables = search_tables(*tables)
    sums = nearest_and_sums(
        groups.g, torch.ones_like(groups.g[:, :1]), groups.m, groups.v, groups.v_max, groups.codes,
        groups.live, w0, tables, *amsgrad.betas, *amsgrad.at(t), move_base,
    )  # fmt: skip
    solve_and_rebuild(sums, groups.alpha, groups.live, groups.codes, w_hat, ridge)


def coordinate_gradients(groups: Groups, betas: tuple[float, float]) -> Tensor:
    """Return what `steps.coordinate_gradients` does."""
    return moments_and_products(
        groups.g, torch.ones_like(groups.g[:, :1]), groups.m, groups.v, groups.v_max, groups.codes,
        groups.live, *betas,
    )  # fmt: skip


# ---------------------------------------------------------------------------- kernels
# Those that sum over n multiply g by `ones`, (G, 1): it keeps (G, n) two dimensions for the
# compiler, which otherwise updates the moments in a pass of its own.


def kernel(function: Callable) -> Callable:
    """Return `function` by `torch.compile`, for all sizes of groups at once.

    Compiled when first called: to prepare it at import would cost every script a second.
    """

    @cache
    def prepared() -> tuple[Callable, Any]:
        more_versions = torch._dynamo.config.patch(recompile_limit=VERSIONS)
        return torch.compile(function, dynamic=True, options=OPTIONS), more_versions

    @wraps(function)
    def run(*arguments: object) -> object:
        compiled, more_versions = prepared()
        with more_versions:
            return compiled(*arguments)

    return run


@kernel
def level_keys(alpha: Tensor, live: Tensor) -> Tensor:
    """Return the levels >= 0 with their codes as keys to sort (G, 2^(L-1)); both inputs (G, L)."""
    codes = torch.arange(1, 2 ** alpha.shape[1], 2, device=alpha.device, dtype=torch.int32)
    return to_keys(*positive_levels(signed_sum(codes, alpha), codes, bits(live)))


@kernel
def search_tables(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return midpoints (G, K - 1) and codes (G, K/4), four to an int32, of sorted keys (G, K)."""
    levels, codes = from_keys(keys)
    return midpoints(levels), codes.to(torch.uint8).view(torch.int32)


def nearest_positive(x: Tensor, middle: Tensor, codes: Tensor) -> Tensor:
    """Return the code of the level >= 0 that x >= 0 (G, n) is nearest to, (G, n) int32.

    Bisection: each comparison selects, weight by weight, the half of both tables that remains. At
    8 bits it takes half the time of comparing with all midpoints in turn.
    """
    K = middle.shape[1] + 1
    middles = [middle[:, k : k + 1] for k in range(K - 1)]  # may be none to split
    packed = codes.split(1, dim=1)
    shift: int | Tensor = 0  # to the code in an int32 of four
    while K > 1:
        K //= 2
        above = x > middles[K - 1]
        middles = [torch.where(above, middles[K + k], middles[k]) for k in range(K - 1)]
        half = len(packed) // 2
        if half:
            packed = [torch.where(above, packed[half + k], packed[k]) for k in range(half)]
        else:
            shift = shift + above.int() * (8 * K)
    return (packed[0] >> shift) & 255


@kernel
def nearest_and_sums(
    g: Tensor, ones: Tensor, m: Tensor, v: Tensor, v_max: Tensor, codes: Tensor, live: Tensor,
    w0: Tensor, tables: tuple[Tensor, ...], beta1: float, beta2: float, p_factor: float,
    h_factor: float, eps: float, move_base: bool,
) -> Tensor:  # fmt: skip
    """Moments, nearest codes, and the sums that the coordinates follow from, in one pass.

    `tables` are `search_tables`, or what these are made of.
    Writes to m, v, v_max, codes and, with `move_base`, t to w0.
    Returns: (G, L + 1 + L(L-1)/2): the sums of x = h*w0 - p times the signs of each basis; of h;
    of h times the signs of every two bases.
    """
    L = live.shape[1]
    g = g * ones
    update_moments(g, m, v, v_max, (beta1, beta2))
    p, h = pseudo_gradient_and_hessian(m, v_max, p_factor, h_factor, eps)
    t = w0 - p / h  # (G, n)

    if len(tables) == 1:
        levels, positive = from_keys(*tables)
        tables = midpoints(levels), positive
    code = nearest_positive(t.abs(), *tables)
    code = torch.where(t < 0, code ^ bits(live), code)  # (G, n)

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
def solve_and_rebuild(
    sums: Tensor, alpha: Tensor, live: Tensor, codes: Tensor, w_hat: Tensor, ridge: float | None
) -> None:
    """Solve for alpha (G, L) with `nearest_and_sums`' sums, as `steps.solve_coordinates` does.

    Writes to alpha, w_hat and, as alpha becomes positive, to codes.
    """
    L = alpha.shape[1]
    exists = live.unbind(1)  # L times (G,)
    total, pairs = sums[:, L], iter(sums[:, L + 1 :].unbind(1))  # (G,) each
    R = total * RIDGE if ridge is None else torch.full_like(total, ridge)  # (G,)
    pull = alpha if ridge is None else torch.zeros_like(alpha)
    terms = zip(exists, sums[:, :L].unbind(1), pull.unbind(1), strict=True)
    b = [torch.where(e, x + R * a, 0.0) for e, x, a in terms]
    A = {(i, i): torch.where(exists[i], total + R, 1.0) for i in range(L)}
    for i in range(L):
        for j in range(i):
            A[i, j] = torch.where(exists[i] & exists[j], next(pairs), 0.0)
    solved = finite_or(alpha, torch.stack(solve(A, b), 1) * live)
    code = codes.int()
    w_hat.copy_(signed_sum(code, solved))  # the flip does not change it
    codes.copy_(code ^ bits(solved < 0))
    alpha.copy_(solved.abs())


def solve(A: dict[tuple[int, int], Tensor], b: list[Tensor]) -> list[Tensor]:
    """Return A^-1 b by A = C D C^T (Cholesky without roots), for all groups at once.

    `A` holds the elements (i, j), i >= j, of positive definite matrices, each (G,) as those of b.
    """
    L = len(b)
    D: list[Tensor] = []
    C = A | {(L, j): b[j] for j in range(L)}  # b as one row more, which becomes D^-1 C^-1 b
    for i in range(L + 1):
        for j in range(i):
            C[i, j] = (C[i, j] - sum(C[i, k] * D[k] * C[j, k] for k in range(j))) / D[j]
        if i < L:
            D.append(A[i, i] - sum(C[i, k] * C[i, k] * D[k] for k in range(i)))
    x = [C[L, j] for j in range(L)]
    for i in reversed(range(L)):
        x[i] = x[i] - sum(C[k, i] * x[k] for k in range(i + 1, L))
    return x


@kernel
def rebuild(codes: Tensor, alpha: Tensor, w_hat: Tensor) -> None:
    """Write w_hat = B^T alpha (G, n) of codes (G, n) and live coordinates (G, L)."""
    w_hat.copy_(signed_sum(codes.int(), alpha))


@kernel
def moments_and_products(
    g: Tensor, ones: Tensor, m: Tensor, v: Tensor, v_max: Tensor, codes: Tensor, live: Tensor,
    beta1: float, beta2: float,
) -> Tensor:  # fmt: skip
    """Update m, v and v_max, and return B g (G, L), in one pass."""
    g = g * ones
    update_moments(g, m, v, v_max, (beta1, beta2))
    return _products(g, codes, live)


def _products(x: Tensor, codes: Tensor, live: Tensor) -> Tensor:
    """Return B x (G, L) of x (G, n), as `codes.basis_products` does."""
    sums = [(x * sign).sum(1) for sign in signs_of(codes.int(), live.shape[1])]
    return torch.where(live, torch.stack(sums, 1), 0.0)


basis_products = kernel(_products)


def signs_of(code: Tensor, L: int) -> list[Tensor]:
    """Return the signs of the L bases, -1.0 and 1.0, each of the shape of the int32 codes."""
    return [((code >> l) & 1).float() * 2 - 1 for l in range(L)]


def signed_sum(code: Tensor, alpha: Tensor) -> Tensor:
    """Return the levels of codes (G, n) or (n,), added in the order of `level_table`."""
    total = torch.zeros_like(alpha[:, :1])
    for a, sign in zip(alpha.split(1, dim=1), signs_of(code, alpha.shape[1]), strict=True):
        total = total + sign * a
    return total


def bits(flags: Tensor) -> Tensor:
    """Return (G, 1) int32 with bit l set where `flags` (G, L) bool is, as `pack_bits` does."""
    total = torch.zeros_like(flags[:, :1], dtype=torch.int32)
    for l, bit in enumerate(flags.split(1, dim=1)):
        total = total + (bit.int() << l)
    return total
