"""The arithmetic of the four steps, on one layer's (G, n) (SPEC section 5; paper algorithms 2, 3).

`alpha` and `live` are (G, L) here: the live coordinates first (see `alq.method.codes`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codes import (
    basis_products,
    level_table,
    live_pairs,
    nearest_codes,
    pack_bits,
    pair_table,
    sum_by_code,
)

RIDGE = 1e-6  # R of the coordinate solve, SPEC section 5


def optimise_bases(
    w0: Tensor, p: Tensor, h: Tensor, alpha: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Optimise B with alpha fixed, then alpha with B fixed, from base point `w0`.

        1. t = w0 - p/h
        2. B = the signs of the level nearest to t, weight by weight
        3. alpha = argmin_a (B^T a - w0).p + 1/2 (B^T a - w0).(h*(B^T a - w0))
        4. negative coordinates become positive and their bases flip
        5. w_hat = B^T alpha

    Arguments: w0, p, h (G, n); alpha, live (G, L).
    Returns: codes (G, n) uint8, alpha (G, L), w_hat (G, n), t (G, n).
    """
    t = torch.addcdiv(w0, p, h, value=-1)  # (G, n)
    codes = nearest_codes(t, alpha, live)  # (G, n)
    index = codes.long()
    alpha = finite_or(alpha, solve_coordinates(index, live, w0, p, h))  # (G, L)
    w_hat = level_table(alpha).gather(1, index)  # (G, n); the flip does not change it
    flipped = pack_bits(alpha < 0).unsqueeze(1)  # (G, 1)
    return codes.to(torch.uint8).bitwise_xor_(flipped), alpha.abs(), w_hat, t


def solve_coordinates(index: Tensor, live: Tensor, w0: Tensor, p: Tensor, h: Tensor) -> Tensor:
    """alpha from  (B diag(h) B^T + R) alpha = B (h*w0 - p).  Returns (G, L), 0 where not live.

    R adds 1e-6 to the diagonal, and 1 more where a coordinate is not live. Element (i, j) of
    B diag(h) B^T is the sum of h over the 2^L codes, each times its signs i and j.
    """
    L = live.shape[1]
    pairs = pair_table(L, h.dtype, h.device)  # (2^L, L*L)
    both_live = live_pairs(L, h.dtype, h.device)[live.sum(1)]  # (G, L*L): live ones come first
    A = (sum_by_code(h, index, L) @ pairs).mul_(both_live).unflatten(1, (L, L))  # (G, L, L)
    A.diagonal(dim1=1, dim2=2).add_(RIDGE + (~live).to(h.dtype))
    b = basis_products((h * w0).sub_(p), index, live)  # (G, L)
    return torch.linalg.solve_ex(A, b.unsqueeze(2))[0].squeeze(2) * live


def finite_or(alpha: Tensor, solved: Tensor) -> Tensor:
    """`solved` (G, L), but `alpha` in the groups where it is not finite.

    Bases that coincide under a large h are singular in float32, ridge or not: alpha stays.
    """
    return torch.where(solved.isfinite().all(1, keepdim=True), solved, alpha)


def alpha_moments(
    m: Tensor, v: Tensor, v_max: Tensor, index: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments that the coordinates inherit from the weights after a new B. Each (G, L).

        m_a = B m;   v_a = diag(B diag(v) B^T);   v_a_max = diag(B diag(v_max) B^T)

    As B is +-1, each of the last two is the group's sum on live coordinates.
    """
    m_a = basis_products(m, index, live)
    v_a, v_a_max = (torch.where(live, x.sum(1, keepdim=True), 0.0) for x in (v, v_max))
    return m_a, v_a, v_a_max  # 0 where not live, also if a square has overflown


def removal_cost(alpha: Tensor, p_a: Tensor, h_a: Tensor) -> Tensor:
    """Modelled increase of the loss when a coordinate becomes 0: -p_a*alpha + 1/2*alpha^2*h_a."""
    return alpha * (0.5 * alpha * h_a - p_a)


def choose_pruned(
    costs: Sequence[Tensor],
    masks: Sequence[Tensor],
    candidates: Sequence[int],
    M_p: float,
    prices: Sequence[int] | None = None,
    budget: int = 0,
) -> list[Tensor]:
    """Which coordinates to remove: the cheapest `M_p` share of all layers' candidates together.

    Arguments: per layer the costs (G, I), the mask (G, I), the number of candidates (its live
    coordinates of smallest cost; at most all of them). The share of their sum is rounded down.
    With `prices`, the bits that a coordinate of each layer takes, no more are removed than it
    needs to free `budget` bits. A cost that is infinite or no number ranks last.
    Returns: per layer (G, I) bool.
    """
    values, places, offset = [], [], 0
    for f, mask, k in zip(costs, masks, candidates, strict=True):
        last = torch.finfo(f.dtype).max  # finite, so before any dead one
        f = f.nan_to_num(nan=last, posinf=last, neginf=last)
        cheapest = torch.where(mask, f, torch.inf).flatten().topk(k, largest=False)
        values.append(cheapest.values)
        places.append(cheapest.indices + offset)
        offset += mask.numel()
    removed = int(M_p * sum(candidates))
    chosen = torch.cat(values).topk(removed, largest=False).indices  # cheapest first
    gone = torch.ones_like(chosen, dtype=torch.bool)
    if prices is not None:
        layers = zip(values, prices, strict=True)
        bits = [torch.full_like(x, price, dtype=torch.int64) for x, price in layers]
        freed = torch.cat(bits)[chosen]
        gone = freed.cumsum(0) - freed < budget  # what the cheaper ones free
    dead = torch.zeros(offset, dtype=torch.bool, device=masks[0].device)
    dead[torch.cat(places)[chosen]] = gone
    return [
        part.view(mask.shape)
        for part, mask in zip(dead.split([mask.numel() for mask in masks]), masks, strict=True)
    ]
