"""The bases B as one byte a weight, and what a group's 2^L levels give for free.

Bit l of a weight's code is its sign (1 for +1) in the group's l-th *live* basis: live bases come
first whatever their position in the mask, so that all work depends on L, the layer's largest
number of live bases, and not on max_bit. Bits of bases a group does not have are 0.

    signs     (2^L, L)    every code's signs
    levels    (G, 2^L)    alpha signs^T: the value a weight of group g takes with each code
    w_hat     (G, n)      levels looked up by code
    B x       (G, L)      x summed into the 2^L codes, times signs

Sums and look-ups by code replace the products with the (G, L, n) array B, which never exists.

Where an accelerator does otherwise than a CPU, it is for fewer operations, fewer bytes, and sums in
an order of their own: `on_accelerator` decides, here and in the modules that use this one.
"""

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CPU = "cpu"  # devices of this type, and mps, take the formulation for caches; tests patch it
# Weights worked on at a time. On a CPU a block's temporaries stay in cache and outweigh the time of
# the calls; on an accelerator a block is large, for few kernels, and bounds the memory.
CPU_BLOCK, DEVICE_BLOCK = 2**18, 2**23


def on_accelerator(x: Tensor) -> bool:
    """Return whether x is on an accelerator, where few large operations are fast.

    MPS counts as a CPU: torch 2.9 has no embedding_bag there.
    """
    return x.device.type not in (CPU, "mps")


def blocks(codes: Tensor, L: int, size: int | None = None) -> Iterator[slice]:
    """Yield the groups of `codes` (G, n) with L live bases, some at a time.

    A block has about `size` weights, or levels where these are more; None takes the device's size.
    """
    G, n = codes.shape
    size = size or (DEVICE_BLOCK if on_accelerator(codes) else CPU_BLOCK)
    count = max(1, size // max(n, 2**L))
    for start in range(0, G, count):
        yield slice(start, start + count)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Return the tensors one behind the other; a single one is returned itself."""
    found = list(tensors)
    return found[0] if len(found) == 1 else torch.cat(found)


@cache
def sign_table(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return every code's signs (2^L, L); read-only."""
    code = torch.arange(2**L, device=device)
    bit = torch.arange(L, device=device).unsqueeze(1)
    # Column by column in memory: a CPU then takes half the time for a product with it.
    return (((code >> bit) & 1).to(dtype) * 2 - 1).T


@cache
def half_bits(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return every code's bits (2^L, L), 0 or 1/2; read-only."""
    return (sign_table(L, dtype, device) + 1) / 4


@cache
def pair_table(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the products of every two signs of every code (2^L, L*L); read-only."""
    signs = sign_table(L, dtype, device)
    return (signs.unsqueeze(2) * signs.unsqueeze(1)).flatten(1)


@cache
def live_pairs(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (L + 1, L*L): 1 where of k = 0 to L live bases both i and j are; read-only."""
    live = torch.arange(L, device=device) < torch.arange(L + 1, device=device).unsqueeze(1)
    return (live.unsqueeze(2) & live.unsqueeze(1)).flatten(1).to(dtype)


def pack_bits(flags: Tensor) -> Tensor:
    """Return (...) uint8 with bit l set where `flags` (..., L) bool is."""
    return (flags << places(flags.shape[-1], flags.device)).sum(-1, dtype=torch.uint8)


@cache
def places(L: int, device: torch.device) -> Tensor:
    """Return 0 to L - 1 as uint8; read-only."""
    return torch.arange(L, dtype=torch.uint8, device=device)


def level_table(alpha: Tensor) -> Tensor:
    """Return the levels (G, 2^L) of live coordinates (G, L), 0 where a group has fewer.

    Summed in the order of the bases: the same coordinates give the same bits in every block, on
    every device, and after the sign of one and its bits in the codes flip together. A matrix
    product promises none of this.
    """
    L = alpha.shape[1]
    if on_accelerator(alpha):  # one operation a basis
        levels = alpha.new_zeros(alpha.shape[0], 1)
        both = alpha.unsqueeze(1) * sign_table(1, alpha.dtype, alpha.device)  # (G, 2, L): -, +
        for l in range(L):
            levels = (levels.unsqueeze(1) + both[:, :, l : l + 1]).flatten(1)  # (G, 2^(l+1))
        return levels
    levels = alpha.new_zeros(alpha.shape[0], 2**L)  # no operation on a few numbers of each group
    for l in range(L):
        half, a = 2**l, alpha[:, l : l + 1]
        torch.add(levels[:, :half], a, out=levels[:, half : 2 * half])
        levels[:, :half] -= a
    return levels


def as_index(codes: Tensor) -> Tensor:
    """Return codes (G, n) as integers of the width that sums by code read fastest."""
    return codes.int() if on_accelerator(codes) else codes.long()


def weights_by_code(alpha: Tensor, codes: Tensor, out: Tensor | None = None) -> Tensor:
    """Return w_hat = B^T alpha (G, n) of live coordinates (G, L) and codes (G, n), in `out`."""
    levels = level_table(alpha)  # (G, 2^L)
    if out is None:
        out = alpha.new_empty(codes.shape)
    if on_accelerator(codes):  # one table, and indices of half the width
        index = codes + row_starts(*levels.shape, levels.device).unsqueeze(1)
        torch.index_select(levels.flatten(), 0, index.flatten(), out=out.view(-1))
    else:
        torch.gather(levels, 1, codes.long(), out=out)
    return out


@lru_cache(maxsize=32)
def row_starts(rows: int, length: int, device: torch.device) -> Tensor:
    """Return the place of each row's first element in a flattened (rows, length); read-only."""
    return torch.arange(0, rows * length, length, dtype=torch.int32, device=device)


def sum_by_code(x: Tensor, index: Tensor, L: int) -> Tensor:
    """Return x (G, n) summed over the weights of each code (G, 2^L); `index` is `codes.long()`."""
    return x.new_zeros(x.shape[0], 2**L).scatter_add_(1, index, x)


def sum_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return the sum over each group's weights of x times its code's row: (G, n) -> (G, D).

    `index` is `as_index(codes)` (G, n), `rows` (2^L, D). On an accelerator in one pass: sums by
    code are additions in an order of chance there, and tables of 2^L numbers a group.
    """
    (G, n), D = x.shape, rows.shape[1]
    if D == 0:
        return x.new_zeros(G, 0)
    starts = row_starts(G, n, x.device)
    return embedding_bag(index.flatten(), rows, starts, mode="sum", per_sample_weights=x.flatten())


def basis_products(x: Tensor, codes: Tensor, live: Tensor) -> Tensor:
    """Return B x (G, L) of x (G, n), 0 for the bases a group does not have; `live` is (G, L)."""
    L, index = live.shape[1], as_index(codes)
    signs = sign_table(L, x.dtype, x.device)
    if on_accelerator(x):
        return sum_rows(x, index, signs) * live
    return sum_by_code(x, index, L) @ signs * live


def pair_products(h: Tensor, index: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return B diag(h) B^T (G, L, L), 0 where not live, and the groups' sums of h (G, 1).

    Element (i, j) is the sum of h over the 2^L codes, each times its signs i and j.
    """
    L = live.shape[1]
    pairs = pair_table(L, h.dtype, h.device)
    if on_accelerator(h):
        A = sum_rows(h, index, pairs).unflatten(1, (L, L))
        A.mul_(live.unsqueeze(2) & live.unsqueeze(1))
        return A, A.diagonal(dim1=1, dim2=2)[:, :1]  # the first basis is live if any is
    by_code = sum_by_code(h, index, L)  # (G, 2^L)
    both_live = live_pairs(L, h.dtype, h.device)[live.sum(1)]  # (G, L*L): live ones come first
    A = (by_code @ pairs).mul_(both_live).unflatten(1, (L, L))
    return A, by_code.sum(1, keepdim=True)
