"""One layer's bits as the list of rows that the kernels walk, and back as numbers.

A row is one live basis of one group: the signs of the group's n weights, and its coordinate. An
output's weights are S groups, one after the other (docs/method.md, Structures); all outputs'
groups at one place are a segment, and meet the same n inputs. The rows come segment by segment,
in each output by output, in each basis by basis: groups of any bitwidth, without a branch.

    signs     (R, bytes) uint8    bit j of a row: weight j's sign, 1 for +1; whole words, 0 behind n
    alpha     (R,)                the coordinates
    outputs   (R,)       int32    whose weights these are
    first     (S + 1,)   int64    rows first[s] to first[s + 1] are segment s's
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..files.bits import LayerBits, live_signs
from ..method.structures import Grouping
from ..method.weight import MultiBitWeight

SHORT, LONG = 32, 64  # weights a word: of groups of at most SHORT, and of all others
BLOCK = 2**20  # weights, or signs where these are more, worked on at a time, about
WHOLE = 64  # outputs, of whose multiples PyTorch's product is fast


@dataclass(frozen=True)
class Rows:
    """The rows of one layer; the module's text explains the tensors."""

    signs: Tensor
    alpha: Tensor
    outputs: Tensor
    first: Tensor


def row_bytes(n: int) -> int:
    """Return the bytes of the signs of n weights, in whole words."""
    return SHORT // 8 if n <= SHORT else -(-n // LONG) * LONG // 8


def outputs_at_a_time(O: int, size: int) -> int:
    """Return how many of O outputs are decoded together that take `size` numbers.

    They take about BLOCK, more where that is not WHOLE outputs.
    """
    step = -(-O // max(1, -(-size // BLOCK)))
    return max(1, -(-step // WHOLE) * WHOLE)


def rows_of_file(layer: LayerBits) -> Rows:
    """Return the rows of a layer as a packed file holds it."""
    n = layer.grouping.n
    signs = np.empty((len(layer.alpha), -(-n // 8)), np.uint8)
    if n % 8 == 0:
        signs[:] = layer.signs.reshape(signs.shape)
    else:
        step = max(1, BLOCK // n) * 8  # rows that begin and end with a byte
        for start in range(0, len(signs), step):
            count = min(step, len(signs) - start)
            bits = layer.signs[start * n // 8 :]
            flags = np.unpackbits(bits, count=count * n, bitorder="little").reshape(count, n)
            signs[start : start + count] = np.packbits(flags, axis=1, bitorder="little")
    return sorted_rows(layer.grouping, layer.bits, signs, layer.alpha)


def rows_of_weight(weight: MultiBitWeight) -> Rows:
    """Return the rows of a multi-bit weight."""
    live = weight.live_first(weight.mask)  # (G, L)
    alpha = weight.live_first(weight.alpha)[live].cpu()
    bits, parts = live.sum(1).cpu().numpy(), [np.empty((0, -(-weight.n // 8)), np.uint8)]
    step = max(1, BLOCK // (8 * weight.n))
    for start in range(0, weight.G, step):
        block = slice(start, start + step)
        flags = live_signs(weight.codes[block].cpu().numpy(), bits[block])
        parts.append(np.packbits(flags, axis=1, bitorder="little"))
    return sorted_rows(weight.grouping, bits, np.concatenate(parts), alpha)


def sorted_rows(grouping: Grouping, bits: np.ndarray, signs: np.ndarray, alpha: Tensor) -> Rows:
    """Return the rows of groups with `bits` (G,); signs and alpha come group by group."""
    O = grouping.by_outputs[0]
    S = grouping.G // O
    outputs, segments = np.divmod(np.repeat(np.arange(grouping.G), bits), S)
    order = np.lexsort((outputs, segments))  # stable
    padded = np.zeros((len(signs), row_bytes(grouping.n)), np.uint8)
    padded[:, : signs.shape[1]] = signs[order]
    first = np.searchsorted(segments[order], np.arange(S + 1))
    return Rows(
        torch.from_numpy(padded),
        alpha[torch.from_numpy(order)].contiguous(),
        torch.from_numpy(outputs[order].astype(np.int32)),
        torch.from_numpy(first.astype(np.int64)),
    )


@cache
def byte_signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (256, 8): the eight signs that each byte stands for; read-only."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).to(dtype) * 2 - 1


def groups_of_rows(rows: Rows, n: int, start: int, stop: int) -> Tensor:
    """Return the weights of outputs `start` to `stop`, (stop - start, S, n)."""
    S = len(rows.first) - 1
    chosen = ((rows.outputs >= start) & (rows.outputs < stop)).nonzero()[:, 0]
    segments = torch.searchsorted(rows.first, chosen, right=True) - 1
    alpha = rows.alpha[chosen]
    table = byte_signs(alpha.dtype, alpha.device)
    signs = table[rows.signs[chosen].int()].flatten(1)[:, :n]  # (rows, n)
    groups = alpha.new_zeros((stop - start) * S, n)
    groups.index_add_(0, (rows.outputs[chosen] - start) * S + segments, signs * alpha.unsqueeze(1))
    return groups.reshape(stop - start, S, n)
