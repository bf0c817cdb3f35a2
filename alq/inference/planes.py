"""A layer's input in binary bases as planes of bits: x_hat = sum_m beta_m c_m, c_m in {0, 1}.

Each basis is a plane with beta_m = 2 gamma_m. Where the lowest level is not 0 it is one more, whose
bits are 1 throughout and beta is that level: zero padding, all of whose bits are 0, stays 0.
"""

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from ..method.activations import BinaryActivation, choices, midpoints
from ..method.structures import Grouping
from .plan import MOST_PLANES, can_count
from .tiles import REMEMBERED


@dataclass(frozen=True)
class Planes:
    """How an input becomes bits of planes, and what the planes count.

    Attributes:
        betas: (P,) float32.
        middle: (K,) float32, the midpoints of the levels, ascending.
        flips: (K, P) int64, all ones where the levels beside them differ in the plane, else 0.
        starting: (P,) int64, all ones where the lowest level's bit is 1, else 0.
        levels: (K + 1,) float32, ascending.
    """

    betas: np.ndarray
    middle: np.ndarray
    flips: np.ndarray
    starting: np.ndarray
    levels: np.ndarray

    @cached_property
    def numbers(self) -> dict[str, int]:
        """What a job (`alq.inference.jobs`) is told of them."""
        arrays = {field.name: getattr(self, field.name).ctypes.data for field in fields(self)}
        return {**arrays, "midpoints": len(self.middle)}


def planes_to_count(activation: BinaryActivation, grouping: Grouping) -> int:
    """Return of how many planes a layer's input is, 0 where popcounts cannot compute it.

    Nor can they where the input is not finite, which shows when its bits are made.
    """
    if not few(activation):
        return 0
    planes = len(planes_of(activation).betas)
    return planes if can_count(grouping, planes) else 0


def few(activation: BinaryActivation) -> bool:
    """Return whether `planes_of` is all that the activation does, and says it in few planes."""
    bits: Any = activation._buffers["gamma"]  # at once: `nn.Module` looks for attributes long
    return activation.fitted and not activation.training and len(bits) <= MOST_PLANES


def planes_of(activation: BinaryActivation) -> Planes:
    """Return the planes of an activation of few bits; it decides as the activation does."""
    own: dict[str, Any] = activation._buffers
    return planes_of_levels(tuple(own["gamma"].tolist()), own["lowest"].item())


@lru_cache(REMEMBERED)
def planes_of_levels(gamma: tuple[float, ...], lowest: float) -> Planes:
    """Return the planes of the levels that `alq.method.activations` describes."""
    with torch.device("cpu"):
        steps, codes = 2 * torch.tensor(gamma, dtype=torch.float32), choices(len(gamma)).float()
    # The levels as `BinaryActivation.levels` computes them, so that both round alike.
    levels, order = (codes[:, 1:] @ steps + lowest).sort(stable=True)
    bits = codes[order, 1:].numpy() > 0  # (levels, M)
    betas = steps.numpy()
    if lowest != 0:
        bits = np.pad(bits, ((0, 0), (0, 1)), constant_values=True)
        betas = np.append(betas, np.float32(lowest))
    flips, start = -(bits[:-1] ^ bits[1:]).astype(np.int64), -bits[0].astype(np.int64)
    return Planes(betas, midpoints(levels).numpy(), flips, start, levels.numpy())
