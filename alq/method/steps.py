"""The arithmetic of the four steps, on groups of weights (docs/method.md, The four steps).

Comments such as B4 name the lines of pseudocode there.

A step sees `Groups`: G groups of n weights with their bases and coordinates, live ones first (see
`alq.method.codes`). It does not matter which layer they come from, nor how many. Four functions
go through all the weights of a group:

    basis_step             moments, then B, alpha and w_hat            basis and STE steps
    coordinate_gradients   moments, then B g                           coordinate and prune steps
    basis_products         B m, once after a new B                     coordinate and prune steps
    rebuild                w_hat = B^T alpha                           coordinate and prune steps

`alq.extras.compiled_steps` has the same four, and `alq.method.optimizer` takes either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import basis_products, live_pairs, pack_bits, pair_table, sum_by_code, weights_by_code
from .loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from .nearest import nearest_codes

RIDGE = 1e-4  # R of the coordinate solve, as a share of the sum of h over a group
BLOCK: int | None = None  # weights worked on at a time; None takes the device's number


@dataclass
class Groups:
    """G groups of n weights as a step reads them and writes to them, all tensors in place.

    Attributes:
        g: gradient of the loss at w_hat (G, n).
        m, v, v_max: AMSGrad's moments of it (G, n).
        codes: the bases B (G, n) uint8.
        alpha, live: the coordinates, and which exist (G, L), live ones first.
    """

    g: Tensor
    m: Tensor
    v: Tensor
    v_max: Tensor
    codes: Tensor
    alpha: Tensor
    live: Tensor

    def __getitem__(self, block: slice) -> "Groups":
        """Return some of the groups, as views: what is written to them is written here."""
        return Groups(*(tensor[block] for tensor in vars(self).values()))


def basis_step(
    groups: Groups, w0: Tensor, w_hat: Tensor, t: int, amsgrad: AMSGrad, move_base: bool,
    ridge: float | None = None,
) -> None:  # fmt: skip
    """Optimise the bases, then the coordinates, from base point `w0`; write `w_hat`, both (G, n).

    `t` counts the updates of the moments. In an STE step the base point moves: w0 = w0 - p/h.
    """
    # B1  moments of the gradient; p and h of the loss model
    update_moments(groups.g, groups.m, groups.v, groups.v_max, amsgrad.betas)
    p, h = pseudo_gradient_and_hessian(groups.m, groups.v_max, *amsgrad.at(t))
    codes, alpha, product, target = optimise_bases(w0, p, h, groups.alpha, groups.live, ridge)
    groups.codes.copy_(codes)
    groups.alpha.copy_(alpha)
    w_hat.copy_(product)
    if move_base:  # S2
        w0.copy_(target)


def optimise_bases(
    w0: Tensor, p: Tensor, h: Tensor, alpha: Tensor, live: Tensor, ridge: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Optimise B with alpha fixed, then alpha with B fixed, from base point `w0`.

    Arguments: w0, p, h (G, n); alpha, live (G, L); ridge as in `solve_coordinates`.
    Returns: codes (G, n) uint8, alpha (G, L), w_hat (G, n), target (G, n).
    """
    # B2  target = w0 - p/h, where the loss model is least if nothing binds
    target = torch.addcdiv(w0, p, h, value=-1)  # (G, n)

    # B3  B = the signs of the level nearest to the target, weight by weight
    codes = nearest_codes(target, alpha, live)  # (G, n)
    index = codes.long()

    # B4  alpha = argmin_a (B^T a - w0).p + 1/2 (B^T a - w0).(h*(B^T a - w0))
    solved = solve_coordinates(index, live, w0, p, h, alpha, ridge)  # (G, L)
    alpha = finite_or(alpha, solved)

    # B5  w_hat = B^T alpha
    w_hat = weights_by_code(alpha, index)  # (G, n)

    # B6  a negative coordinate flips together with its basis: w_hat does not change
    flipped = pack_bits(alpha < 0).unsqueeze(1)  # (G, 1)
    return codes.to(torch.uint8).bitwise_xor_(flipped), alpha.abs(), w_hat, target


def solve_coordinates(
    index: Tensor, live: Tensor, w0: Tensor, p: Tensor, h: Tensor, alpha: Tensor,
    ridge: float | None = None,
) -> Tensor:  # fmt: skip
    """Solve (B diag(h) B^T + R) a = B (h*w0 - p) + R alpha for a (G, L), 0 where not live.

    R is diagonal, `RIDGE` times the group's sum of h: a group that bases do not determine stays
    near its present alpha, one without gradient stays where it is, and the scale of the loss does
    not matter. A number `ridge` is the published rule: R = ridge, and nothing pulls to alpha.

    Element (i, j) of B diag(h) B^T is the sum of h over the 2^L codes, each times its signs i and
    j. The diagonal is 1 where a coordinate is not live.
    """
    L = live.shape[1]
    h_by_code = sum_by_code(h, index, L)  # (G, 2^L)
    both_live = live_pairs(L, h.dtype, h.device)[live.sum(1)]  # (G, L*L): live ones come first
    A = (h_by_code @ pair_table(L, h.dtype, h.device)).mul_(both_live).unflatten(1, (L, L))
    b = basis_products((h * w0).sub_(p), index, live)  # (G, L)
    if ridge is None:
        R = RIDGE * h_by_code.sum(1, keepdim=True)  # (G, 1)
        b.addcmul_(R, alpha)
    else:
        R = torch.full_like(h[:, :1], ridge)
    A.diagonal(dim1=1, dim2=2).add_(torch.where(live, R, 1.0))
    return torch.linalg.solve_ex(A, b.unsqueeze(2))[0].squeeze(2) * live


def finite_or(alpha: Tensor, solved: Tensor) -> Tensor:
    """Return `solved` (G, L), but `alpha` in the groups where it is not finite.

    Where h overflows, and under a published ridge that vanishes beside a large h, alpha stays.
    """
    return torch.where(solved.isfinite().all(1, keepdim=True), solved, alpha)


def coordinate_gradients(groups: Groups, betas: tuple[float, float]) -> Tensor:
    """Return g_a = B g (G, L), and update the moments of the weights."""
    update_moments(groups.g, groups.m, groups.v, groups.v_max, betas)
    return basis_products(groups.g, groups.codes, groups.live)


def alpha_moments(groups: Groups, product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Return the moments that the coordinates inherit from the weights after a new B, each (G, L).

        m_a = B m;   v_a = diag(B diag(v) B^T);   v_a_max = diag(B diag(v_max) B^T)

    As B is +-1, each of the last two is the group's sum on live coordinates. `product` is
    `basis_products`.
    """
    m_a = product(groups.m, groups.codes, groups.live)
    sums = (x.sum(1, keepdim=True) for x in (groups.v, groups.v_max))  # (G, 1)
    v_a, v_a_max = (torch.where(groups.live, x, 0.0) for x in sums)
    return m_a, v_a, v_a_max  # 0 where not live, also if a square has overflown


def rebuild(codes: Tensor, alpha: Tensor, w_hat: Tensor) -> None:
    """Write w_hat = B^T alpha (G, n) of codes (G, n) and live coordinates (G, L)."""
    w_hat.copy_(weights_by_code(alpha, codes))


def removal_cost(alpha: Tensor, p_a: Tensor, h_a: Tensor) -> Tensor:
    """Return how much the modelled loss rises when each coordinate becomes 0.

    f = -p_a*alpha + 1/2*alpha^2*h_a, all (G, I).
    """
    return alpha * (0.5 * alpha * h_a - p_a)


def choose_pruned(
    costs: Sequence[Tensor], masks: Sequence[Tensor], candidates: Sequence[int], M_p: float,
    prices: Sequence[int] | None = None, budget: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Choose what to remove: the cheapest `M_p` share of all layers' candidates together.

    Arguments: per layer the costs (G, I), the mask (G, I), the number of candidates (its live
    coordinates of smallest cost; at most all of them). The share of their sum is rounded down.
    With `prices`, the bits that a coordinate of each layer takes, no more are removed than it
    needs to free `budget` bits. A cost that is infinite or no number ranks last.
    Returns: per layer (G, I) bool.
    """
    values, places, offset = [], [], 0
    for f, mask, k in zip(costs, masks, candidates, strict=True):
        most = torch.finfo(f.dtype).max  # finite, so before any dead one
        f = torch.where(f.isfinite(), f, most)
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
    parts = dead.split([mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]
