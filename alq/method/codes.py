"""The bases B as one byte a weight, and what a group's 2^L levels give for free.

Bit l of a weight's code is its sign (1 for +1) in the group's l-th *live* basis: live bases come
first whatever their position in the mask, so that all work depends on L, the layer's largest
number of live bases, and not on max_bit. Bits of bases a group does not have are 0.

    signs     (2^L, L)    every code's signs
    levels    (G, 2^L)    alpha signs^T: the value a weight of group g takes with each code
    w_hat     (G, n)      levels looked up by code
    B x       (G, L)      x summed into the 2^L codes, times signs

Sums and look-ups by code replace the products with the (G, L, n) array B, which never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

# Weights worked on at a time. On a CPU a block's temporaries stay in cache and outweigh the time of
# the calls; elsewhere a block is large, for few kernels, and bounds the memory.
CPU_BLOCK, DEVICE_BLOCK = 2**18, 2**24


def blocks(codes: Tensor, L: int, size: int | None = None) -> Iterator[slice]:
    """The groups of `codes` (G, n) in blocks, with L live bases: of n weights and 2^L levels."""
    G, n = codes.shape
    size = size or (CPU_BLOCK if codes.device.type == "cpu" else DEVICE_BLOCK)
    groups = max(1, size // max(n, 2**L))
    for start in range(0, G, groups):
        yield slice(start, start + groups)


def sign_table(L: int, like: Tensor) -> Tensor:
    """(2^L, L) of -1 and +1, in the type and on the device of `like`. Not to be written to."""
    return _sign_table(L, like.dtype, like.device)


@cache
def _sign_table(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    code = torch.arange(2**L, device=device)
    bit = torch.arange(L, device=device).unsqueeze(1)
    # Column by column in memory: a CPU then takes half the time for a product with it.
    return (((code >> bit) & 1).to(dtype) * 2 - 1).T


@cache
def pair_table(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2^L, L*L): the products of every two signs of every code. Not to be written to."""
    signs = _sign_table(L, dtype, device)
    return (signs.unsqueeze(2) * signs.unsqueeze(1)).flatten(1)


@cache
def live_pairs(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(L + 1, L*L): 1 where of k = 0 to L live bases i and j both are. Not to be written to."""
    live = torch.arange(L, device=device) < torch.arange(L + 1, device=device).unsqueeze(1)
    return (live.unsqueeze(2) & live.unsqueeze(1)).flatten(1).to(dtype)


@cache
def _place_values(L: int, device: torch.device) -> Tensor:
    return 2 ** torch.arange(L, device=device, dtype=torch.uint8)


def level_table(alpha: Tensor) -> Tensor:
    """Live coordinates (G, L), 0 where a group has fewer -> levels (G, 2^L).

    Summed in the order of the bases: the same coordinates give the same bits in every block, on
    every device, and after the sign of one and its bits in the codes flip together. A matrix
    product promises none of this.
    """
    L = alpha.shape[1]
    levels = alpha.new_zeros(alpha.shape[0], 2**L)
    for l in range(L):
        half, a = 2**l, alpha[:, l : l + 1]
        torch.add(levels[:, :half], a, out=levels[:, half : 2 * half])
        levels[:, :half] -= a
    return levels


def look_up(make_table: Callable[[Tensor], Tensor], x: Tensor, codes: Tensor) -> Tensor:
    """What the codes (G, n) point to in the table (G, 2^L) that is made of x (G, L)."""
    found = []
    for block in blocks(codes, x.shape[1]):
        found.append(make_table(x[block]).gather(1, codes[block].long()))
    return torch.cat(found)


def pack_bits(flags: Tensor) -> Tensor:
    """(..., L) bool -> (...) uint8 with bit l set where flags[..., l] is."""
    return (flags * _place_values(flags.shape[-1], flags.device)).sum(-1, dtype=torch.uint8)


def sum_by_code(x: Tensor, index: Tensor, L: int) -> Tensor:
    """(G, n) summed over the weights of each code -> (G, 2^L). `index` is `codes.long()`."""
    return x.new_zeros(x.shape[0], 2**L).scatter_add_(1, index, x)


def basis_products(x: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """B x: (G, n) -> (G, L), 0 for the bases a group does not have. `live` is (G, L) bool."""
    L = live.shape[1]
    return sum_by_code(x, index, L) @ sign_table(L, x) * live


COUNTED = 3  # bisections done by counting: 7 comparisons cost less than 3 look-ups (not 15 than 4)


def nearest_codes(target: Tensor, alpha: Tensor, live: Tensor) -> Tensor:
    """The code of the level nearest to each target, exactly: (G, n), (G, L) twice -> (G, n) int32.

    The levels are symmetric about 0, so the search is for |target| among the 2^(L-1) that are not
    negative, and its rank the number of their midpoints below it.
    """
    if alpha.shape[1] == 0:
        return torch.zeros(target.shape, dtype=torch.int32, device=target.device)
    middle, positive, every = search_tables(alpha, live)
    by_rank = torch.cat([positive, positive ^ every], dim=1)  # (G, 2^L), negative targets second
    rank = _count_below(target.abs(), middle)
    rank.add_(torch.lt(target, 0, out=torch.empty_like(target)), alpha=positive.shape[1])
    return by_rank.gather(1, _long(rank))


def search_tables(alpha: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What |target| is searched in: (G, L) twice, L > 0 -> three tables.

    Returns: the midpoints of neighbours of the 2^(L-1) levels >= 0 (G, 2^(L-1) - 1), ascending;
    the codes of these levels (G, 2^(L-1)) int32; all live bits (G, 1) int32: code ^ live bits is
    the code of the opposite level.
    """
    L = alpha.shape[1]
    # One of each pair of opposite codes: those with bit 0 set (basis 0 is live if any is).
    codes = torch.arange(1, 2**L, 2, device=alpha.device, dtype=torch.int32)
    every = pack_bits(live).unsqueeze(1).int()  # (G, 1)
    levels, codes = positive_levels(alpha @ sign_table(L, alpha)[1::2].T, codes, every)
    if levels.dtype == torch.float32:
        levels, codes = from_keys(sort_rows(to_keys(levels, codes)))
    else:
        levels, order = levels.sort(dim=1)
        codes = codes.gather(1, order)
    return midpoints(levels), codes, every


def positive_levels(levels: Tensor, codes: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """|levels| and their codes (G, 2^(L-1)), of levels whose `codes` do not look at live bits."""
    return levels.abs(), (codes ^ -(levels < 0).int()) & every


def midpoints(levels: Tensor) -> Tensor:
    """(G, K) ascending -> (G, K - 1)"""
    return (levels[:, 1:] + levels[:, :-1]) / 2


def to_keys(levels: Tensor, codes: Tensor) -> Tensor:
    """float32 levels >= 0 and their codes as int64 that are in the levels' order.

    Non-negative float32 numbers are ordered as their bits are.
    """
    return levels.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(codes)


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Levels float32 and codes int32 of `to_keys`."""
    return (keys >> 32).int().view(torch.float32), keys.int()  # the lower half


def sort_rows(keys: Tensor) -> Tensor:
    """Each row of int64 (G, K) ascending, on a CPU in place.

    There numpy sorts integers 14 times as fast as torch sorts floats with indices (128 levels a
    group), which at 8 bits were 40 % of a basis step.
    """
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)  # the array shares the tensor's memory
    return keys


def _count_below(x: Tensor, middle: Tensor) -> Tensor:
    """How many of `middle` (G, 2^D - 1), ascending, are below x (G, n): floats (G, n).

    Bisection: D look-ups and comparisons a weight. The first ones count all their midpoints
    instead. Comparisons write 0 or 1 as floats, which a CPU does four times as fast as bools.
    """
    first = max(1, (middle.shape[1] + 1) >> COUNTED)  # distance of the midpoints counted
    if first > middle.shape[1]:
        return torch.zeros_like(x)
    counted = middle[:, first - 1 :: first].split(1, dim=1)
    rank, above = torch.gt(x, counted[0], out=torch.empty_like(x)), torch.empty_like(x)
    for one in counted[1:]:
        rank.add_(torch.gt(x, one, out=above))
    while (first := first // 2) > 0:
        at = middle[:, first - 1 :: 2 * first].contiguous().gather(1, _long(rank))
        rank = torch.add(at.lt_(x), rank, alpha=2)
    return rank


def _long(x: Tensor) -> Tensor:
    return x.int().long()  # two conversions that have vector instructions instead of one without
