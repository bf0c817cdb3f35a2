"""The Triton kernels in Triton's interpreter, on a CPU. `test_fused.py` runs this file.

By itself: TRITON_INTERPRET=1 python -m pytest tests/interpreted_fused.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import alq
from alq.extras import fused_steps
from alq.method import steps
from alq.method.loss_model import AMSGrad
from alq.method.weight import prune
from compare import follow
from reference import Reference
from test_compiled import assert_same_moments, give_gradients

BLOCK = fused_steps.LARGEST_BLOCK
LAYERS = [  # structure, subc, max_bit, shape: odd n, in one block and in several
    ("kernelwise", None, 2, (2, 2, 3, 3)),
    ("pixelwise", None, 4, (2, 33, 1, 2)),
    ("channelwise", None, 3, (4, 5, 3, 3)),
    ("subchannelwise", 2, 1, (2, 6)),
    *[("subchannelwise", 1, L, (3, n)) for L, n in ((5, BLOCK + 3), (6, 45), (7, BLOCK), (8, 35))],
]
STEPS = "basis coordinate prune basis coordinate ste ste coordinate basis".split()
SHARES = 1.0, 0.2  # of a prune step
LR = 0.2  # large enough that coordinates turn negative
AMSGRAD = AMSGrad(0.05, (0.9, 0.999), 1e-8)


class FusedALQ(alq.ALQ):
    """`CompiledALQ` as it is on CUDA."""

    def arithmetic(self, weight: alq.MultiBitWeight) -> object:
        return fused_steps if weight.L else steps


def make(ridge: float | None) -> FusedALQ:
    """Each layer with a group without bits; one with a hole in the mask, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for k, (*_, shape) in enumerate(LAYERS):
        model.register_module(f"c{k}", layer := nn.Module())
        layer.weight = nn.Parameter(torch.randn(shape, generator=generator))
    with torch.no_grad():
        model.c2.weight[0] = 0
    columns = list(zip(*LAYERS, strict=True))
    weights = alq.quantize(model, *map(list, columns[:3]))
    for weight in weights:
        dead = torch.zeros_like(weight.mask)
        dead[1] = True
        dead[-1, 0] = weight.I > 1
        prune([weight], [dead])
    return FusedALQ(weights, lr=LR, weight_decay=1e-3, ridge=ridge)


@pytest.mark.parametrize("ridge, names", [(None, STEPS), (1e-6, ["basis", "ste"])])
def test_steps_follow_the_plain_reference(ridge: float | None, names: list[str]) -> None:
    optimizer = make(ridge)
    assert {weight.L for weight in optimizer.weights} == set(range(1, 9))
    references = [
        Reference(w.B, w.alpha, w.mask, lr=LR, wd=1e-3, tie=1e-5, ridge=ridge)
        for w in optimizer.weights
    ]
    negative = 0
    for number, name in enumerate(names):
        give_gradients(optimizer, number)
        follow(optimizer, references, name, *(SHARES if name == "prune" else []), atol=1e-5)
        assert_same_moments(optimizer, references, f"step {number} ({name})")
        negative += sum(int((weight.alpha < 0).sum()) for weight in optimizer.weights)
    assert negative or ridge  # of which the next basis step made positive ones


def groups_of(L: int, n: int) -> steps.Groups:
    """L + 1 groups after some steps: with L, L - 1, ... and no live bases."""
    generator = torch.Generator().manual_seed(L)
    live = torch.arange(L) < torch.arange(L, -1, -1).unsqueeze(1)  # (L + 1, L)
    g, m, v, v_max = torch.randn(4, L + 1, n, generator=generator)
    codes = torch.randint(2**L, (L + 1, n), generator=generator) & steps.pack_bits(live)[:, None]
    alpha = torch.randn(L + 1, L, generator=generator) * live
    v, v_max = 1e-3 * v * v, 1e-3 * (v * v).maximum(v_max * v_max)
    return steps.Groups(g, 0.1 * m, v, v_max, codes.to(torch.uint8), alpha, live)


def copy_of(groups: steps.Groups) -> steps.Groups:
    return steps.Groups(*(tensor.clone() for tensor in vars(groups).values()))


@pytest.mark.parametrize("L", range(1, 9))
def test_sums_moments_and_w_hat_equal_the_eager_ones(L: int) -> None:
    """What no choice between levels enters into."""
    own = groups_of(L, BLOCK + 9)
    eager = copy_of(own)
    w_hat, expected = torch.empty(2, *own.g.shape)
    fused_steps.rebuild(own.codes, own.alpha, w_hat)
    steps.rebuild(own.codes, own.alpha, expected)
    assert torch.equal(w_hat, expected)  # added in the same order
    pairs = [
        (
            arithmetic.coordinate_gradients(groups, AMSGRAD.betas),
            arithmetic.basis_products(groups.v, groups.codes, groups.live),
            *vars(groups).values(),
        )
        for arithmetic, groups in ((fused_steps, own), (steps, eager))
    ]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_leaves_alpha() -> None:
    """Where h overflows, as in the eager step; a group without bits is 0, and no index runs off."""
    own = groups_of(3, 20)
    own.v_max[0, 0] = torch.inf
    own.g[1, 3] = torch.nan
    eager, alpha = copy_of(own), own.alpha.clone()
    w_hat, expected = torch.randn(2, *own.g.shape)
    bases = w_hat.clone(), w_hat.clone()
    for arithmetic, groups, base, out in (
        (fused_steps, own, bases[0], w_hat),
        (steps, eager, bases[1], expected),
    ):
        arithmetic.basis_step(groups, base, out, 3, AMSGRAD, True)
    for groups, out in ((own, w_hat), (eager, expected)):
        assert torch.equal(groups.alpha[:2], alpha[:2].abs())
        assert groups.alpha[2].isfinite().all() and not torch.equal(groups.alpha[2], alpha[2])
        assert not out[3].any() and not groups.codes[3].any()
        rebuilt = torch.empty_like(out)
        steps.rebuild(groups.codes, groups.alpha, rebuilt)
        assert torch.equal(out, rebuilt)  # the flip did not change it
    torch.testing.assert_close(bases[0], bases[1], equal_nan=True)
    for key in ("m", "v", "v_max"):
        torch.testing.assert_close(getattr(own, key), getattr(eager, key), equal_nan=True)
