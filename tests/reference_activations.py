"""Activations in binary bases in plain loops, one value at a time, float64: slow and obvious.

`x_ref`, `gamma` as docs/activations.md has them; the fast code is held against this.
"""

from __future__ import annotations

import itertools

import numpy as np

RIDGE, DECAY = 1e-4, 0.9


def all_levels(x_ref: float, gamma: np.ndarray) -> list[tuple[float, tuple[int, ...]]]:
    """Every level x_ref + sum_m gamma_m D_m with its D, ascending."""
    signs = itertools.product((-1, 1), repeat=len(gamma))
    return sorted((x_ref + sum(g * d for g, d in zip(gamma, D, strict=True)), D) for D in signs)


def quantize_one(x: float, x_ref: float, gamma: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """The nearest level and its D; of two that are equally near the lower one."""
    return min(all_levels(x_ref, gamma), key=lambda level: (abs(x - level[0]), level[0]))


def gradient_one(x: float, gradient: float, x_ref: float, gamma: np.ndarray) -> float:
    """dLoss/dx, given dLoss/dx_hat."""
    return gradient if x_ref - sum(gamma) <= x <= x_ref + sum(gamma) else 0.0


def within_reach(x: np.ndarray, M: int, from_zero: bool) -> np.ndarray:
    """The values that a fit of M bits is of: those far out brought in."""
    middle = 0.0 if from_zero else x.mean()
    others = [abs(value - middle) for value in x if not from_zero or value != 0]
    reach = 1.25 * (1 + M / 2) * sum(others) / max(len(others), 1)
    low = 0.0 if from_zero else middle - reach
    return np.array([min(max(value, low), middle + reach) for value in x])


def update(x: np.ndarray, lowest: float, gamma: np.ndarray) -> tuple[float, np.ndarray]:
    """(lowest, gamma) after the batch x: a tenth of the way to the least squares.

    Unknown are the lowest level and 2 gamma; the first stays 0 where it is and no x is negative.
    """
    anchored = lowest == 0 and not (x < 0).any()
    x = within_reach(x, len(gamma), anchored)
    x_ref = lowest + gamma.sum()
    size = 1 + len(gamma)
    A, b = np.zeros((size, size)), np.zeros(size)
    for value in x:
        x_hat, D = quantize_one(value, x_ref, gamma)
        row = np.array([1.0, *((1 + d) / 2 for d in D)])
        A += np.outer(row, row)
        b += row * (value - x_hat)
    if anchored:
        A[0, :] = A[:, 0] = 0
        b[0] = 0
    change = np.linalg.solve(A + RIDGE * len(x) * np.eye(size), b)
    lowest += (1 - DECAY) * change[0]
    return lowest, np.maximum(gamma + (1 - DECAY) * change[1:] / 2, 0)
