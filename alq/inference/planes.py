"""A layer's input in binary bases as planes of bits: x_hat = sum_m beta_m c_m, c_m in {0, 1}.

Each basis is a plane with beta_m = 2 gamma_m. Where the lowest level is not 0 it is one more, whose
bits are 1 throughout and beta is that level: zero padding, all of whose bits are 0, stays 0.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..method.activations import BinaryActivation, choices, in_memory, midpoints
from ..method.structures import Grouping
from .plan import can_count
from .tiles import REMEMBERED


@dataclass(frozen=True)
class Planes:
    """How an input becomes codes, whose bit m is that of plane m, and what the planes count.

    Attributes:
        betas: (P,) float32.
        middle: (K,) float32, the midpoints of the levels, ascending.
        flips: (K,) uint8, the bits in which the levels beside them differ.
        start: the lowest level's code.
    """

    betas: np.ndarray
    middle: np.ndarray
    flips: np.ndarray
    start: int


def countable(x: Tensor, activation: BinaryActivation | None, grouping: Grouping) -> int:
    """Return of how many planes the input x of a layer is, 0 where popcounts cannot compute it."""
    if activation is None:
        return 0
    if not activation.fitted:
        activation.fit_first(x)
    planes = len(activation.gamma) + int(activation.lowest != 0)
    # What is not a number has no code; what is infinite takes the same way, being as rare.
    return planes if can_count(grouping, planes) and x.sum().isfinite() else 0


def planes_of(activation: BinaryActivation) -> Planes:
    """Return the planes of an activation of at most 7 bits; it decides as the activation does."""
    return planes_of_levels(tuple(activation.gamma.tolist()), activation.lowest.item())


@lru_cache(REMEMBERED)
def planes_of_levels(gamma: tuple[float, ...], lowest: float) -> Planes:
    """Return the planes of the levels that `alq.method.activations` describes."""
    with torch.device("cpu"):
        steps, codes = 2 * torch.tensor(gamma, dtype=torch.float32), choices(len(gamma)).float()
    # The levels as `BinaryActivation.levels` computes them, so that both round alike.
    levels, order = (codes[:, 1:] @ steps + lowest).sort(stable=True)
    betas, start = steps.numpy(), 0
    if lowest != 0:
        start = 1 << len(gamma)
        betas = np.append(betas, np.float32(lowest))
    code = order.numpy().astype(np.uint8)  # a level's place among the choices is its code
    return Planes(betas, midpoints(levels).numpy(), code[:-1] ^ code[1:], start)


def encoded(x: Tensor, activation: BinaryActivation | None) -> tuple[Tensor, np.ndarray]:
    """Return the codes of an input that is `countable`, uint8 of its shape, and the betas."""
    from .inputs import encode

    assert activation is not None
    planes, order = planes_of(activation), in_memory(x)
    x = x.permute(order).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    values = planes.middle, planes.flips, np.uint8(planes.start)
    encode(x.view(-1).numpy(), *values, codes.view(-1).numpy())
    return codes.permute([order.index(k) for k in range(x.dim())]), planes.betas
