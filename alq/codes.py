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

import torch
from torch import Tensor


def sign_table(L: int, like: Tensor) -> Tensor:
    """(2^L, L) of -1 and +1, in the type and on the device of `like`."""
    code = torch.arange(2**L, device=like.device).unsqueeze(1)
    bit = torch.arange(L, device=like.device)
    return ((code >> bit) & 1).to(like.dtype) * 2 - 1


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


def pack_bits(flags: Tensor) -> Tensor:
    """(..., L) bool -> (...) uint8 with bit l set where flags[..., l] is."""
    place = 2 ** torch.arange(flags.shape[-1], device=flags.device)
    return (flags * place).sum(-1).to(torch.uint8)


def sum_by_code(x: Tensor, index: Tensor, L: int) -> Tensor:
    """(G, n) summed over the weights of each code -> (G, 2^L). `index` is `codes.long()`."""
    return x.new_zeros(x.shape[0], 2**L).scatter_add_(1, index, x)


def basis_products(x: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """B x: (G, n) -> (G, L), 0 for the bases a group does not have. `live` is (G, L) bool."""
    L = live.shape[1]
    return sum_by_code(x, index, L) @ sign_table(L, x) * live


def nearest_codes(target: Tensor, alpha: Tensor, live: Tensor) -> Tensor:
    """The code of the level nearest to each target, exactly: (G, n), (G, L) twice -> (G, n) uint8.

    The levels are symmetric about 0, so the search is for |target| among the 2^(L-1) that are not
    negative, by bisection of their midpoints: L-1 gathers and comparisons a weight, where comparing
    with every level takes 2^L.
    """
    L = alpha.shape[1]
    if L == 0:
        return torch.zeros(target.shape, dtype=torch.uint8, device=target.device)
    half = 2 ** (L - 1)
    # One of each pair of opposite codes: those with bit 0 set (basis 0 is live if any is).
    codes = torch.arange(half, device=alpha.device, dtype=torch.uint8) * 2 + 1  # (half,)
    levels = level_table(alpha)[:, 1::2]  # (G, half)
    codes = torch.where(levels < 0, ~codes, codes)  # (G, half): the code of +|level|
    levels, order = levels.abs().sort(dim=1)
    every = pack_bits(live).unsqueeze(1)  # (G, 1): all live bits
    positive = codes.gather(1, order) & every
    by_rank = torch.cat([positive, positive ^ every], dim=1)  # (G, 2^L), negative targets second
    middle = (levels[:, 1:] + levels[:, :-1]) / 2  # (G, half - 1)

    distance = target.abs()
    rank = torch.zeros(target.shape, dtype=torch.long, device=target.device)
    step = half // 2
    while step:  # rank = number of midpoints below the target, its highest bit first
        rank.add_(distance > middle.gather(1, rank + (step - 1)), alpha=step)
        step //= 2
    return by_rank.gather(1, rank.add_(target < 0, alpha=half))
