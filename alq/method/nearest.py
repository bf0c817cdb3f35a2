"""The level nearest to each weight, exactly: the search inside every basis step.

What it must equal takes three lines, and 2^L distances a weight:

    levels = level_table(alpha)                                          (G, 2^L)
    distance = |target.unsqueeze(2) - levels.unsqueeze(1)|               (G, n, 2^L)
    codes = distance.argmin(2)                                           (G, n)

(Tests hold `nearest_codes` to it.) The search needs only L comparisons:

    The levels are symmetric about 0, so |target| is searched among the 2^(L-1) that are not
    negative, and its sign decides between a code and its opposite.
    Sorted levels put the nearest one between two midpoints: bisection finds it.

The rest of the file is what a CPU makes of that; each part says what it buys. An accelerator gets
the fewest operations instead, and sorts all 2^L levels.
"""

import torch
from torch import Tensor

from .codes import on_accelerator, pack_bits, sign_table

COUNTED_TURNS = 3  # of the bisection, by counting: 7 comparisons cost less than 3 look-ups


def nearest_codes(target: Tensor, alpha: Tensor, live: Tensor) -> Tensor:
    """Return the code of the level nearest to each target, exactly.

    Arguments: target (G, n); alpha, live (G, L), live coordinates first.
    Returns: (G, n) int32 or uint8; bits of bases that a group does not have are 0.
    """
    L = alpha.shape[1]
    if L == 0:
        return torch.zeros(target.shape, dtype=torch.int32, device=target.device)
    if on_accelerator(target):
        levels, order = (alpha @ sign_table(L, alpha.dtype, alpha.device).T).sort(dim=1)
        by_rank = order.to(torch.uint8) & pack_bits(live).unsqueeze(1)  # (G, 2^L)
        middle = torch.lerp(levels[:, 1:], levels[:, :-1], 0.5)  # `midpoints` by one operation
        return by_rank.gather(1, torch.searchsorted(middle, target))
    # Of each pair of opposite codes take the one with bit 0 set (basis 0 is live if any is), or
    # the other where its level is negative; then sort by level. (G, 2^(L-1)) each
    codes = torch.arange(1, 2**L, 2, device=alpha.device, dtype=torch.int32)
    existing = pack_bits(live).unsqueeze(1).int()  # (G, 1): code ^ existing is the opposite one
    levels = alpha @ sign_table(L, alpha.dtype, alpha.device)[1::2].T
    levels, codes = positive_levels(levels, codes, existing)
    if levels.dtype == torch.float32:
        levels, codes = from_keys(sort_rows(to_keys(levels, codes)))
    else:
        levels, order = levels.sort(dim=1)
        codes = codes.gather(1, order)
    rank = _count_below(target.abs(), midpoints(levels))
    rank.add_(torch.lt(target, 0, out=torch.empty_like(target)), alpha=levels.shape[1])
    by_rank = torch.cat([codes, codes ^ existing], dim=1)  # (G, 2^L), negative ones second
    return by_rank.gather(1, rank.int().long())


def positive_levels(levels: Tensor, codes: Tensor, existing: Tensor) -> tuple[Tensor, Tensor]:
    """Return |levels| and the codes that have them, both (G, 2^(L-1)).

    `codes` may set bits of bases that a group does not have; `existing` (G, 1) clears them.
    """
    return levels.abs(), (codes ^ -(levels < 0).int()) & existing


def midpoints(levels: Tensor) -> Tensor:
    """Return the midpoints of neighbours: (G, K) ascending -> (G, K - 1)."""
    return (levels[:, 1:] + levels[:, :-1]) / 2


# ---------------------------------------------------------------------------- sorting as integers
# numpy sorts integers 14 times as fast as torch sorts floats with indices (128 levels a group),
# which at 8 bits were 40 % of a basis step. Float32 numbers >= 0 are ordered as their bits are.


def to_keys(levels: Tensor, codes: Tensor) -> Tensor:
    """Return int64 that hold float32 levels >= 0 and their codes, in the order of the levels."""
    return levels.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(codes)


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 levels and int32 codes that `to_keys` made `keys` of."""
    return (keys >> 32).int().view(torch.float32), keys.int()  # the lower half


def sort_rows(keys: Tensor) -> Tensor:
    """Return each row of int64 `keys` (G, K) in ascending order; on a CPU it is sorted in place."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)  # the array shares the tensor's memory
    return keys


def _count_below(x: Tensor, middle: Tensor) -> Tensor:
    """Return how many of `middle` (G, 2^D - 1), ascending, are below x (G, n), as floats (G, n).

    A turn of bisection is a look-up and a comparison a weight. The first turns count all their
    midpoints instead. Comparisons write 0 or 1 as floats, which a CPU does four times as fast as
    bools; two conversions by vector instructions make an index of them, faster than one without.
    """
    step = max(1, (middle.shape[1] + 1) >> COUNTED_TURNS)  # distance of the midpoints counted
    if step > middle.shape[1]:
        return torch.zeros_like(x)
    first, *others = middle[:, step - 1 :: step].split(1, dim=1)
    rank, above = torch.gt(x, first, out=torch.empty_like(x)), torch.empty_like(x)
    for other in others:
        rank.add_(torch.gt(x, other, out=above))
    while (step := step // 2) > 0:
        at = middle[:, step - 1 :: 2 * step].contiguous().gather(1, rank.int().long())
        rank = torch.add(at.lt_(x), rank, alpha=2)
    return rank
