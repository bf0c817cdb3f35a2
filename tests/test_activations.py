"""Activations in binary bases: their arithmetic against plain loops, and its extremes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import reference_activations as reference
from alq.method import activations
from alq.method.activations import BinaryActivation, nearest_level, quantize


def made(lowest: float, gamma: list[float] | torch.Tensor) -> BinaryActivation:
    """One with these levels, in float64."""
    gamma = torch.as_tensor(gamma, dtype=torch.float64)
    found = BinaryActivation(len(gamma), gamma)
    found.load_state_dict({"gamma": gamma, "lowest": torch.tensor(lowest)})
    return found


def behind_relu(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).relu()


@pytest.mark.parametrize("M", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_the_nearest_level_is_that_of_the_plain_loops(M, signed) -> None:
    gamma = torch.rand(M, dtype=torch.float64)
    found = made(-0.7 if signed else 0.0, gamma)
    x = 2 * torch.randn(60, dtype=torch.float64)
    x_hat, levels = found.eval()(x), found.levels()
    assert len(levels) == 2**M and (levels.diff() >= 0).all()
    plain = reference.all_levels(found.x_ref.item(), found.gamma.numpy())
    np.testing.assert_allclose(levels, [level for level, _ in plain], atol=1e-12)
    for value, hat in zip(x.tolist(), x_hat.tolist(), strict=True):
        near, _ = reference.quantize_one(value, found.x_ref.item(), found.gamma.numpy())
        assert hat == pytest.approx(near, abs=1e-12)


@pytest.mark.parametrize("M", [1, 2, 3, 5])
@pytest.mark.parametrize("signed", [False, True])
def test_an_update_is_that_of_the_plain_loops(M, signed) -> None:
    gamma = torch.rand(M, dtype=torch.float64) + 0.05
    found = made(-0.9 if signed else 0.0, gamma)
    for _ in range(3):
        x = torch.randn(7, 11, dtype=torch.float64)
        x = x if signed else x.relu()
        before = found.lowest.item(), found.gamma.numpy().copy()
        lowest, gamma = reference.update(x.flatten().numpy(), *before)
        found.train()(x)
        np.testing.assert_allclose(found.gamma, gamma, rtol=1e-9)
        assert found.lowest.item() == pytest.approx(lowest, rel=1e-9)
        assert signed or found.lowest.item() == 0


@pytest.mark.parametrize("M", [1, 2, 4])
def test_the_gradient_is_that_of_the_definition(M) -> None:
    """1 from the lowest to the highest level, both included, else 0."""
    gamma = torch.tensor([0.5, 1.0, 0.25, 0.125][:M], dtype=torch.float64)  # exact in binary
    found = made(0.0, gamma).eval()
    top = 2 * gamma.sum().item()
    x = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, top / 3, top, top + 1e-9, 9.0], dtype=torch.float64)
    x.requires_grad_()
    weight = torch.arange(1.0, 9.0, dtype=torch.float64)
    (found(x) * weight).sum().backward()
    plain = [
        reference.gradient_one(value, g, found.x_ref.item(), found.gamma.numpy())
        for value, g in zip(x.tolist(), weight.tolist(), strict=True)
    ]
    assert x.grad.tolist() == plain
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


def test_relu_before_it_changes_neither_values_nor_gradients() -> None:
    found = made(0.0, [0.5, 1.0]).eval()
    x = torch.randn(1000, dtype=torch.float64)
    results = []
    for before in (torch.relu, lambda x: x):
        leaf = x.clone().requires_grad_()
        y = found(before(leaf))
        y.square().sum().backward()
        results.append((y, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def within_reach(x: torch.Tensor, M: int) -> torch.Tensor:
    """What a fit of M bits is of."""
    flat = x.double().flatten().numpy()
    from_zero = bool((flat >= 0).all() and (flat == 0).any())
    return torch.from_numpy(reference.within_reach(flat, M, from_zero))


def squared_error(x: torch.Tensor, levels: torch.Tensor) -> float:
    return (x.unsqueeze(-1) - levels).abs().amin(-1).square().mean().item()


@pytest.mark.parametrize("M", [1, 2])
def test_the_first_fit_is_near_the_best_levels_there_are(M) -> None:
    """Against a search through a grid of gamma, at any scale and with most values 0."""
    for keep, scale in itertools.product((1.0, 0.1), (1.0, 1e-6, 1e6)):
        x = behind_relu(4000) * (torch.rand(4000) < keep) * scale
        found = BinaryActivation(M, x[:0])
        found(x)
        x = within_reach(x, M)
        grid = torch.linspace(0.05, 4, 60, dtype=torch.float64) * scale
        best = min(
            squared_error(x, made(0.0, torch.stack(g) / 2).levels())
            for g in itertools.combinations(grid, M)
        )
        assert squared_error(x, found.levels()) <= 1.02 * best


def test_a_few_large_values_take_no_level_from_the_others() -> None:
    """One unit in fifty is twenty times the others: least squares would give it half the levels."""
    x = behind_relu(5000, 50)
    x[:, 7] += 20
    found = BinaryActivation(2, x[:0])
    for part in [x, *x.split(50)]:
        found(part)
        assert found.levels()[2] < 4 < 20 < x[:, 7].amax()


def test_more_bits_leave_less_error() -> None:
    for x in (behind_relu(9000), torch.randn(9000), torch.rand(9000) + 3):
        errors = []
        for M in range(1, 9):
            found = BinaryActivation(M, x[:0])
            found(x)
            errors.append(squared_error(x, found.levels()) / x.var().item())
        assert all(b < 0.5 * a for a, b in itertools.pairwise(errors[:6]))
        assert errors[7] < 1e-3


def test_training_follows_the_inputs_and_evaluation_stays() -> None:
    found = BinaryActivation(2, torch.empty(0))
    found(behind_relu(50, 20, dtype=torch.float32))
    before = found.gamma.clone()
    found.eval()
    found(7 * behind_relu(50, 20, dtype=torch.float32))
    assert torch.equal(found.gamma, before)
    found.train()
    for _ in range(200):
        found(7 * behind_relu(50, 20, dtype=torch.float32))
    fresh = BinaryActivation(2, torch.empty(0))
    fresh(7 * behind_relu(50, 200, dtype=torch.float32))
    torch.testing.assert_close(found.levels(), fresh.levels(), rtol=0.1, atol=0)
    assert found.lowest.item() == 0


@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 40), torch.full((3, 40), 2.5), torch.full((3, 40), -2.5), torch.ones(1, 1),
        torch.empty(0, 40), torch.cat([torch.zeros(99), torch.ones(1)]).reshape(10, 10),
    ],
    ids=["zeros", "constant", "negative constant", "one value", "no value", "one alive"],
)  # fmt: skip
def test_inputs_of_few_values_are_met_and_nothing_becomes_nan(M, x) -> None:
    found = BinaryActivation(M, torch.empty(0))
    for _ in range(200):
        x_hat = found(x)
    torch.testing.assert_close(x_hat, x, atol=0.02, rtol=0.02)
    assert found.levels().isfinite().all() and (found.gamma >= 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "first",
    [torch.zeros(1, 9), torch.empty(0, 9), torch.ones(2, 9)],
    ids=["zeros", "no values", "one value"],
)  # fmt: skip
def test_a_first_batch_that_tells_nothing_is_not_the_first(first, training) -> None:
    """Such as zeros that are passed to see the shapes: else all inputs would become constant."""
    ours, plain = (BinaryActivation(2, torch.empty(0)).train(training) for _ in range(2))
    ours(first)
    assert not ours.fitted
    loaded = BinaryActivation(2, torch.empty(0))
    loaded.load_state_dict(ours.state_dict())
    x = behind_relu(8, 100, dtype=torch.float32)
    assert torch.equal(ours(x), plain(x)) and torch.equal(loaded.train(training)(x), plain(x))
    assert ours.fitted and ours.gamma.all()


def test_a_dead_layer_comes_to_life() -> None:
    found = BinaryActivation(2, torch.empty(0))
    found(torch.zeros(8, 100))
    assert not found.levels().any()
    for _ in range(100):
        x = behind_relu(8, 100, dtype=torch.float32)
        x_hat = found(x)
    assert (x_hat - x).square().mean() < 0.05 * x.square().mean()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("signed", [False, True])
def test_the_scale_of_the_inputs_does_not_matter(scale, signed) -> None:
    x = torch.randn(400, 10)
    x = x if signed else x.relu()
    ours, scaled = BinaryActivation(2, x[:0]), BinaryActivation(2, x[:0])
    for part in x.split(100):
        ours(part), scaled(part * scale)
    torch.testing.assert_close(scaled.levels() / scale, ours.levels(), rtol=1e-3, atol=1e-3)


def test_negative_inputs_move_the_lowest_level_off_zero() -> None:
    found = BinaryActivation(2, torch.empty(0))
    found(behind_relu(100, 10, dtype=torch.float32))
    assert found.lowest.item() == 0
    for _ in range(100):
        found(torch.randn(100, 10))
    assert found.lowest.item() < -1
    assert squared_error(x := torch.randn(9999), found.levels()) < 0.15 * x.square().mean()


def test_a_single_negative_far_out_moves_the_lowest_level_as_in_the_plain_loops() -> None:
    found, x = made(0.0, [4.0]), torch.rand(301, dtype=torch.float64) + 10
    x[7] = -1
    lowest, gamma = reference.update(x.numpy(), 0.0, found.gamma.numpy().copy())
    found.train()(x)
    assert found.lowest.item() == pytest.approx(lowest, rel=1e-9) and lowest != 0
    np.testing.assert_allclose(found.gamma, gamma, rtol=1e-9)


@pytest.mark.parametrize("M", [2, 4])
def test_what_is_not_a_number_stays_that(M) -> None:
    x = torch.tensor([0.0, 1.0, float("nan"), float("inf"), -float("inf")])
    y = nearest_level(x, torch.linspace(0, 1, 2**M))
    assert y.isnan().tolist() == [False, False, True, False, False]
    assert y[3:].tolist() == [1, 0]
    found = BinaryActivation(M, torch.empty(0))
    found(x)
    assert found(torch.ones(5)).isnan().all()


@pytest.mark.parametrize("M", [2, 4])
def test_memory_keeps_its_order(M) -> None:
    x = torch.randn(2, 3, 4, 5)
    levels = torch.linspace(-1, 1, 2**M)
    plain = nearest_level(x, levels)
    for form in (torch.channels_last, torch.contiguous_format):
        found = nearest_level(x.contiguous(memory_format=form), levels)
        assert found.is_contiguous(memory_format=form) and torch.equal(found, plain)
    assert torch.equal(nearest_level(x.transpose(1, 3), levels), plain.transpose(1, 3))
    assert torch.equal(nearest_level(x[..., ::2], levels), plain[..., ::2])


def test_the_sample_is_of_all_of_the_batch(monkeypatch) -> None:
    monkeypatch.setattr(activations, "SAMPLE", 500)
    for form in (torch.channels_last, torch.contiguous_format):
        x = torch.arange(10 * 8 * 16 * 16.0).reshape(10, 8, 16, 16).contiguous(memory_format=form)
        taken = activations.sample(x)
        assert len(set(taken.tolist())) == 500
        number, channel = taken // 2048, taken // 256 % 8
        places = taken % 256
        for found, kinds in ((number, 10), (channel, 8), (places // 32, 8), (places % 16 // 2, 8)):
            counts = found.long().bincount(minlength=kinds)
            assert counts.min() > 0.5 * 500 / kinds and counts.max() < 1.6 * 500 / kinds


def test_a_sample_fits_nearly_as_well_as_the_whole(monkeypatch) -> None:
    x = behind_relu(64, 8, 20, 20, dtype=torch.float32) * torch.rand(64, 8, 1, 1)
    sampled = BinaryActivation(2, torch.empty(0))
    sampled(x)
    monkeypatch.setattr(activations, "SAMPLE", x.numel())
    whole = BinaryActivation(2, torch.empty(0))
    whole(x)
    x = within_reach(x, 2)
    assert squared_error(x, sampled.levels()) < 1.005 * squared_error(x, whole.levels())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_keep_theirs_and_the_fit_is_float32_at_least(dtype) -> None:
    found, wide = BinaryActivation(2, torch.empty(0)), BinaryActivation(2, torch.empty(0))
    x = behind_relu(100, 20, dtype=torch.float32).to(dtype)
    for part in x.split(20):
        y = found(part)
        wide(part.float())
    assert y.dtype == dtype and found.gamma.dtype == torch.float32
    torch.testing.assert_close(found.gamma, wide.gamma)
    # A value between two levels may round to either.
    errors = [(x_hat.float() - part.float()).abs() for x_hat in (y, wide.eval()(part.float()))]
    torch.testing.assert_close(*errors, atol=0.01, rtol=0.01)


def test_autocast_changes_nothing_in_the_fit() -> None:
    plain, cast = BinaryActivation(3, torch.empty(0)), BinaryActivation(3, torch.empty(0))
    for part in behind_relu(100, 20, dtype=torch.float32).split(20):
        plain(part)
        with torch.autocast("cpu", torch.bfloat16):
            cast(part)
    assert torch.equal(plain.gamma, cast.gamma)


def test_the_levels_that_come_out_are_no_more_than_there_are() -> None:
    for M in (1, 2, 3, 4, 8):
        found = BinaryActivation(M, torch.empty(0))
        y = found(behind_relu(200, 50, dtype=torch.float32))
        assert len(y.unique()) <= 2**M
        assert y.min() == 0


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x = torch.rand(3, requires_grad=True)
    y = quantize(x, torch.tensor([0.0, 1.0])).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
