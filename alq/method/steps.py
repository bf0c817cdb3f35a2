"""The arithmetic of the four steps, on groups of weights (docs/method.md, The four steps).

Comments such as B4 name the lines of pseudocode there.

A step sees `Groups`: G groups of n weights with their bases and coordinates, live ones first (see
`alq.method.codes`). It does not matter which layer they come from, nor how many. Four functions
go through all the weights of a group:

    basis_step             moments, then B, alpha and w_hat            basis and STE steps
    coordinate_gradients   moments, then B g                           coordinate and prune steps
    basis_products         B m, once after a new B                     coordinate and prune steps
    rebuild                w_hat = B^T alpha                           coordinate and prune steps

`alq.extras.compiled_steps` and `alq.extras.fused_steps` have the same four, and
`alq.method.optimizer` takes any of the three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..machine.arithmetic import solve
from .codes import (
    as_index,
    basis_products,
    on_accelerator,
    pack_bits,
    pair_products,
    weights_by_code,
)
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
    codes, alpha, _, target = optimise_bases(w0, p, h, groups.alpha, groups.live, ridge, w_hat)
    groups.codes.copy_(codes)
    groups.alpha.copy_(alpha)
    if move_base:  # S2
        w0.copy_(target)


def optimise_bases(
    w0: Tensor, p: Tensor, h: Tensor, alpha: Tensor, live: Tensor, ridge: float | None = None,
    w_hat: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Optimise B with alpha fixed, then alpha with B fixed, from base point `w0`.

    Arguments: w0, p, h (G, n); alpha, live (G, L); ridge as in `solve_coordinates`; w_hat takes
        the result, and may be w0.
    Returns: codes (G, n) uint8, alpha (G, L), w_hat (G, n), target (G, n).
    """
    # B2  target = w0 - p/h, where the loss model is least if nothing binds
    target = torch.addcdiv(w0, p, h, value=-1)  # (G, n)

    # B3  B = the signs of the level nearest to the target, weight by weight
    codes = nearest_codes(target, alpha, live)  # (G, n)
    index = as_index(codes)

    # B4  alpha = argmin_a (B^T a - w0).p + 1/2 (B^T a - w0).(h*(B^T a - w0))
    solved = solve_coordinates(index, live, w0, p, h, alpha, ridge, target)  # (G, L)
    alpha = finite_or(alpha, solved)

    # B5  w_hat = B^T alpha
    w_hat = weights_by_code(alpha, index, w_hat)  # (G, n)

    # B6  a negative coordinate flips together with its basis: w_hat does not change
    flipped = pack_bits(alpha < 0).unsqueeze(1)  # (G, 1)
    return codes.to(torch.uint8).bitwise_xor_(flipped), alpha.abs(), w_hat, target


def solve_coordinates(
    index: Tensor, live: Tensor, w0: Tensor, p: Tensor, h: Tensor, alpha: Tensor,
    ridge: float | None = None, target: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Solve (B diag(h) B^T + R) a = B (h*w0 - p) + R alpha for a (G, L), 0 where not live.

    R is diagonal, `RIDGE` times the group's sum of h: a group that bases do not determine stays
    near its present alpha, one without gradient stays where it is, and the scale of the loss does
    not matter. A number `ridge` is the published rule: R = ridge, and nothing pulls to alpha.
    The diagonal is 1 where a coordinate is not live. `target` is w0 - p/h, if it is known.
    """
    A, total = pair_products(h, index, live)  # (G, L, L), (G, 1)
    if on_accelerator(h) and target is not None:
        x = h * target  # (G, n): the same, and two tensors less to read
    else:
        x = (h * w0).sub_(p)
    b = basis_products(x, index, live)  # (G, L)
    if ridge is None:
        R = RIDGE * total  # (G, 1)
        b.addcmul_(R, alpha)
    else:
        R = torch.full_like(h[:, :1], ridge)
    A.diagonal(dim1=1, dim2=2).add_(torch.where(live, R, 1.0))
    return solve(A, b) * live


def finite_or(alpha: Tensor, solved: Tensor) -> Tensor:
    """Return `solved` (G, L), but `alpha` in the groups where it is not finite.

    Where h overflows, and under a published ridge that vanishes beside a large h, alpha stays.
    """
    not_finite = (solved - solved).any(1, keepdim=True)  # else the difference is 0
    return torch.where(not_finite, alpha, solved)


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
    weights_by_code(alpha, codes, w_hat)


def removal_cost(alpha: Tensor, p_a: Tensor, h_a: Tensor) -> Tensor:
    """Return how much the modelled loss rises when each coordinate becomes 0.

    f = -p_a*alpha + 1/2*alpha^2*h_a, all (G, I).
    """
    return alpha * (0.5 * alpha * h_a - p_a)


def round_at_random(shares: Sequence[float], generator: torch.Generator | None) -> list[int]:
    """Round each number down, or up with a probability that is its fraction.

    One draw a number, in order, on the host: no device waits.
    """
    draws = torch.rand(len(shares), generator=generator, device="cpu").tolist()
    pairs = zip(shares, draws, strict=True)
    return [int(share) + (draw < share - int(share)) for share, draw in pairs]


def choose_pruned(
    costs: Sequence[Tensor], masks: Sequence[Tensor], candidates: Sequence[int], M_p: float,
    prices: Sequence[int | Tensor] | None = None, budget: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Choose what to remove: the cheapest `M_p` share of all layers' candidates together.

    Arguments: per layer the costs (G, I), the mask (G, I), the number of candidates (its live
    coordinates of smallest cost; at most all of them). The share of their sum is rounded down.
    With `prices`, the bits that a coordinate takes, of a layer or of each group (G, 1), no more are
    removed than it needs to free `budget` bits. A cost that is infinite or no number ranks last.
    Returns: per layer (G, I) bool.
    """
    sizes = [mask.numel() for mask in masks]
    f, alive = (torch.cat([x.flatten() for x in parts]) for parts in (costs, masks))
    most = torch.finfo(f.dtype).max  # finite, so before any dead one
    ranked = torch.where(alive, f.nan_to_num(most, most, most), torch.inf).split(sizes)
    cheapest = [part.topk(k, largest=False) for part, k in zip(ranked, candidates, strict=True)]
    places = [found.indices for found in cheapest]
    bits = None if prices is None else bits_of(prices, masks, places)
    torch._foreach_add_(places, [0, *accumulate(sizes[:-1])])
    removed = int(M_p * sum(candidates))
    values = torch.cat([found.values for found in cheapest])
    chosen = values.topk(removed, largest=False).indices  # cheapest first
    gone = torch.ones_like(chosen, dtype=torch.bool)
    if bits is not None:
        freed = bits[chosen]
        gone = freed.cumsum(0) - freed < budget  # what the cheaper ones free
    dead = torch.zeros_like(alive)
    dead[torch.cat(places)[chosen]] = gone
    parts = dead.split(sizes)
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def bits_of(
    prices: Sequence[int | Tensor], masks: Sequence[Tensor], places: Sequence[Tensor]
) -> Tensor:
    """Return the bits of the coordinates at these places of each layer's flat mask, end to end."""
    found = []
    for price, mask, place in zip(prices, masks, places, strict=True):
        if isinstance(price, Tensor):
            found.append(price.flatten()[place // mask.shape[1]])
        else:
            found.append(torch.full_like(place, price))
    return torch.cat(found)
