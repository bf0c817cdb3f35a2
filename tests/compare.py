"""Compares what a step determines, and not what rounding chooses.

Levels that tie, as those of bases that coincide do, leave open which signs a weight takes; bases
that depend on each other leave open their coordinates. What is determined is that a weight takes a
level as near as any, the mask where no two costs tie, and from there w_hat and the set of levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import alq
from reference import Reference, prune


def numbers(x: torch.Tensor) -> np.ndarray:
    """The values of a tensor on any device."""
    return x.detach().cpu().numpy()


def follow(
    optimizer: alq.ALQ,
    references: Sequence[Reference],
    mode: str,
    *shares: float,
    atol: float = 1e-9,
) -> None:
    """Take step `mode` with the gradients that the weights have, and hold it against the reference.

    `shares` are `prune_step`'s. Afterwards the references are where the weights are, so that the
    next step is compared on its own.
    """
    weights = optimizer.weights
    gradients = [numbers(w.grouping.to_groups(w.parameter.grad).double()).copy() for w in weights]
    getattr(optimizer, f"{mode}_step")(*shares)
    if mode == "prune":
        prune(references, gradients, *shares, chosen=[numbers(w.mask) for w in weights])
    for w, reference, g in zip(weights, references, gradients, strict=True):
        if mode == "coordinate":
            reference.coordinate_step(g)
        elif mode != "prune":
            getattr(reference, f"{mode}_step")(g, chosen=(numbers(w.B), numbers(w.alpha)))
            assert (w.alpha >= 0).all(), "a negative coordinate has not flipped"
        assert_same(w, reference, atol, err_msg=f"{mode} step, {w.name}")
        reference.take_over(numbers(w.B), numbers(w.alpha), numbers(w.mask))


def assert_same(
    w: alq.MultiBitWeight, reference: Reference, atol: float, err_msg: str = ""
) -> None:
    """The same mask, bases and w_hat, and the same coordinates where the bases are independent."""
    np.testing.assert_array_equal(numbers(w.mask), reference.mask, err_msg=err_msg)
    np.testing.assert_array_equal(numbers(w.B), reference.B, err_msg=err_msg)
    w_hat = numbers(w.w_hat_groups())
    np.testing.assert_allclose(w_hat, reference.w_hat, atol=atol, rtol=0, err_msg=err_msg)
    parameter = numbers(w.grouping.to_groups(w.parameter))
    np.testing.assert_array_equal(parameter, w_hat, err_msg=err_msg)
    ours, theirs = numbers(w.alpha), reference.alpha
    assert not ours[~reference.mask].any(), err_msg
    free = independent(reference.B, reference.mask)
    np.testing.assert_allclose(ours[free], theirs[free], atol=atol, rtol=0, err_msg=err_msg)


def independent(B: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(G,) bool: no live basis of the group follows from the others."""
    return np.linalg.matrix_rank(B * mask[:, :, None]) == mask.sum(1)


def assert_same_levels(one: dict, other: dict, atol: float) -> None:
    """Two states of `MultiBitWeight.state_dict` have the same coordinates, in whatever order."""
    ours, theirs = (state["alpha"].abs().sort(dim=1).values for state in (one, other))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, msg=one["name"])
    assert torch.equal(one["mask"].sum(1), other["mask"].sum(1)), one["name"]
