"""Groups of zeros, weights from 1e-30 to 1e30, layers pruned to nothing: what holds throughout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import alq
from alq.files.packed import load_packed, save_packed
from alq.method.loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from alq.method.steps import optimise_bases
from alq.method.structures import STRUCTURES
from alq.method.weight import prune

SCALES = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
GRADIENTS = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
OVERFLOW = ("basis", "prune", "basis", "coordinate")  # by gradients whose squares overflow
STEPS = ("basis", "coordinate", "prune", "ste", "prune all")


def quantized(scales: list[float], structure: str, max_bit: int, seed: int) -> tuple:
    """A convolution and a linear layer, a scale for each output; their multi-bit weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, len(scales), 2), nn.Flatten(), nn.Linear(4, len(scales)))
    for layer in (model[0], model[2]):
        with torch.no_grad():
            for row, scale in zip(layer.weight, scales, strict=True):
                row.copy_(torch.randn(row.shape) * scale)
    return model, alq.quantize(model, [structure, "subchannelwise"], [0, 2], max_bit)


def check(weights: list) -> None:
    for weight in weights:
        w_hat = weight.w_hat()
        assert w_hat.isfinite().all() and torch.equal(w_hat, weight.parameter)
        assert weight.alpha.isfinite().all() and not weight.alpha[~weight.mask].any()
        assert weight.live_total == int(weight.mask.sum()) and weight.bitwidth >= 0


@settings(max_examples=100, deadline=None, derandomize=True)
@example([1.0, 1e-30, 1e30], "kernelwise", 4, list(zip(OVERFLOW, [1e30] * 4, strict=True)), 4)
@given(
    scales=st.lists(SCALES, min_size=3, max_size=3),
    structure=st.sampled_from(STRUCTURES[:3]),
    max_bit=st.integers(1, 8),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), GRADIENTS), max_size=6),
    seed=st.integers(0, 99),
)
def test_whatever_the_weights_and_steps(scales, structure, max_bit, steps, seed) -> None:
    """w_hat stays finite, masks only shrink, storage never grows."""
    _, weights = quantized(scales, structure, max_bit, seed)
    check(weights)
    optimizer = alq.ALQ(weights, lr=1e-3, generator=torch.Generator().manual_seed(seed))
    for kind, size in steps:
        masks, storage = [weight.mask.clone() for weight in weights], alq.storage_bytes(weights)
        for weight in weights:
            weight.parameter.grad = torch.randn(weight.parameter.shape) * size
        if kind.startswith("prune"):
            optimizer.prune_step(1.0, 1.0 if kind == "prune all" else 0.5)
        else:
            getattr(optimizer, f"{kind}_step")()
        check(weights)
        for weight, mask in zip(weights, masks, strict=True):
            assert not (weight.mask & ~mask).any()
        assert alq.storage_bytes(weights) <= storage
        if kind == "prune all":
            assert alq.storage_bytes(weights) == 0 and not any(w.parameter.any() for w in weights)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e3]),
    size=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3]),
    max_bit=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_a_basis_step_never_raises_its_quadratic(scale, size, max_bit, seed) -> None:
    """p.d + 1/2 d.(h*d), which the step minimises over B, then over alpha; 0 where it starts."""
    torch.manual_seed(seed)
    layer = nn.Linear(12, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 12) * scale)
    (weight,) = alq.quantize(layer, subc=1, max_bit=max_bit)
    w0, alpha = weight.w_hat_groups(), weight.live_first(weight.alpha)
    m, v, v_max = (torch.zeros_like(w0) for _ in range(3))
    update_moments(torch.randn_like(w0) * size, m, v, v_max, (0.9, 0.999))
    p, h = pseudo_gradient_and_hessian(m, v_max, *AMSGrad(1e-3, (0.9, 0.999), 1e-8).at(1))
    live = weight.live_first(weight.mask)
    _, _, w_hat, _ = optimise_bases(w0, p, h, alpha, live)
    d = w_hat - w0
    after = (p * d + h * d * d / 2).sum(1)
    size_of_terms = (p.abs() * w0.abs() + h * w0 * w0).sum(1)
    assert (after <= 1e-9 * size_of_terms).all(), after


@pytest.mark.parametrize("all_layers", [True, False])
def test_pruned_to_nothing_trains_saves_and_loads(tmp_path, all_layers) -> None:
    model, weights = quantized([1.0, 1.0, 0.0], "channelwise", 3, 0)
    optimizer = alq.ALQ(weights)
    for weight in weights:
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    if all_layers:
        optimizer.prune_step(1.0, 1.0)
    else:
        prune([weights[0]], [weights[0].mask])
    for step in (optimizer.basis_step, optimizer.coordinate_step, optimizer.ste_step):
        for weight in weights:
            weight.parameter.grad = torch.randn(weight.parameter.shape)
        step()
    optimizer.prune_step(1.0, 0.5)
    check(weights)
    assert weights[0].bitwidth == 0 and not weights[0].parameter.any()
    save_packed(tmp_path / "x.alq", model, weights)
    other, _ = quantized([1.0, 1.0, 0.0], "channelwise", 3, 1)
    restored = load_packed(tmp_path / "x.alq", other)
    assert all(torch.equal(a.w_hat(), b.w_hat()) for a, b in zip(weights, restored, strict=True))
    fresh = alq.ALQ(weights)
    fresh.load_state_dict(optimizer.state_dict())
    check(weights)
