"""A layer's input in binary bases as planes of bits: x_hat = sum_m beta_m c_m, c_m in {0, 1}.

Each basis is a plane with beta_m = 2 gamma_m. Where the lowest level is not 0 it is one more, whose
bits are 1 throughout and beta is that level: zero padding, all of whose bits are 0, stays 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..method.activations import BinaryActivation, in_memory, midpoints


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


def planes_of(activation: BinaryActivation) -> Planes:
    """Return the planes of an activation of at most 7 bits; it decides as the activation does."""
    gamma, lowest = activation.gamma.float(), activation.lowest.float()
    levels, codes = (activation.choices[:, 1:].float() @ (2 * gamma) + lowest).sort(stable=True)
    betas, start = (2 * gamma).numpy(), 0
    if lowest != 0:
        start = 1 << len(gamma)
        betas = np.append(betas, lowest.numpy())
    codes = codes.numpy().astype(np.uint8)
    return Planes(betas, midpoints(levels).numpy(), codes[:-1] ^ codes[1:], start)


def encoded(x: Tensor, planes: Planes) -> Tensor:
    """Return the codes of x, uint8 of its shape."""
    from .popcounts import encode

    order = in_memory(x)
    x = x.permute(order).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    values = planes.middle, planes.flips, np.uint8(planes.start)
    encode(x.view(-1).numpy(), *values, codes.view(-1).numpy())
    return codes.permute([order.index(k) for k in range(x.dim())])
