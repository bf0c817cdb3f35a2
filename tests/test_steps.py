"""The four steps against the plain loops of reference.py, and each part against an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import alq
from alq.errors import InputError
from alq.method.codes import level_table, pack_bits, sign_table
from alq.method.loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from alq.method.nearest import nearest_codes
from alq.method.sketch import sketch
from alq.method.steps import RIDGE, choose_pruned, optimise_bases, solve_coordinates
from alq.method.weight import prune as remove_coordinates
from compare import follow
from reference import Reference, distances, sketch_group

# structure, subc, max_bit, weight shape: every structure, I = 1 to 8, n below I, a 1 x 1 kernel.
CASES = [
    ("kernelwise", None, 4, (3, 2, 5, 5)),
    ("kernelwise", None, 6, (4, 3, 1, 2)),
    ("kernelwise", None, 5, (3, 4, 1, 1)),
    ("pixelwise", None, 3, (2, 12, 3, 3)),
    ("pixelwise", None, 8, (3, 40, 1, 1)),
    ("channelwise", None, 1, (4, 3, 3, 3)),
    ("channelwise", None, 7, (2, 4, 3, 3)),
    ("subchannelwise", 4, 5, (3, 48)),
    ("subchannelwise", 1, 2, (5, 20)),
]


class OneLayer(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def make_layer(structure, subc, max_bit, shape, seed=0) -> alq.MultiBitWeight:
    """A layer in float64 with an all-zero group, a group without bits and a hole in the mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    (w,) = alq.quantize(OneLayer(weight), structure, subc, max_bit)
    groups = w.grouping.to_groups(weight.clone())
    groups[0] = 0
    (w,) = alq.quantize(OneLayer(w.grouping.to_weight(groups).clone()), structure, subc, max_bit)
    dead = torch.zeros_like(w.mask)
    dead[1] = True  # a group without bits
    if w.G > 2 and w.mask[2].sum() > 1:
        dead[2, 0] = True  # a hole before live coordinates
    remove_coordinates([w], [dead])
    return w


def give_gradient(w: alq.MultiBitWeight, generator: torch.Generator) -> np.ndarray:
    g = torch.randn(w.G, w.n, generator=generator, dtype=torch.float64)
    w.parameter.grad = w.grouping.to_weight(g).clone()
    return g.numpy()


@pytest.mark.parametrize("ridge", [None, 1e-6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_follow_the_plain_reference(case, ridge: float | None) -> None:
    w = make_layer(*case)
    reference = Reference(w.B, w.alpha, w.mask, lr=0.02, wd=0.01, ridge=ridge)
    optimizer = alq.ALQ([w], lr=0.02, weight_decay=0.01, ridge=ridge)
    generator = torch.Generator().manual_seed(1)
    sequence = "basis coordinate coordinate basis basis coordinate prune basis ste ste coordinate"
    for mode in sequence.split():
        give_gradient(w, generator)
        follow(optimizer, [reference], mode, *([1.0, 0.2] if mode == "prune" else []))
    assert not w.mask[1].any() and not w.w_hat_groups()[1].any()


def test_a_negative_coordinate_flips_without_changing_the_weight() -> None:
    w = make_layer("channelwise", None, 3, (3, 4, 3, 3))
    w.alpha = torch.where(w.mask, -0.5 * w.alpha, w.alpha)
    w.write()
    before = w.w_hat()
    optimizer = alq.ALQ([w], lr=0.0)
    w.parameter.grad = torch.ones_like(w.parameter)
    optimizer.basis_step()  # with lr 0 the target is w_hat itself
    assert (w.alpha >= 0).all()
    torch.testing.assert_close(w.w_hat(), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("I", range(1, 9))
def test_sketch_follows_the_plain_reference(I: int) -> None:
    for n in (1, 2, 5, 30):
        w = torch.randn(20, n, generator=torch.Generator().manual_seed(I), dtype=torch.float64)
        w[3] = 0
        w[4, 1:] = 0
        B, alpha, mask = sketch(w, I)
        assert mask.sum(1).max() <= min(I, n)
        ties = 0
        for g in range(len(w)):
            bases, coordinates, tie = sketch_group(w[g].numpy(), I)
            k = int(mask[g].sum())
            assert not mask[g, k:].any() and not B[g, k:].any() and not alpha[g, k:].any()
            ties += tie
            if not tie:
                np.testing.assert_allclose(alpha[g, :k].numpy(), coordinates, atol=1e-9)
                if not (np.diff(coordinates) < 1e-9).any():  # else their order is arbitrary
                    np.testing.assert_array_equal(B[g, :k].numpy(), bases)
        assert n < 30 or ties < 5
    assert not mask[3].any()


def nearest_by_definition(
    target: torch.Tensor, alpha: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """The nearest level's code by comparing each target with all; any of levels that coincide."""
    existing = pack_bits(live).unsqueeze(1).long()  # (G, 1)
    distance = (target.unsqueeze(2) - level_table(alpha).unsqueeze(1)).abs()  # (G, n, 2^L)
    return (distance.argmin(2) & existing).int()  # a bit without basis changes no level


@pytest.mark.parametrize("I", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_level_against_brute_force(I: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(I)
    G, n = 6, 200
    live = torch.arange(I) < torch.tensor([I, I, max(I - 1, 1), 1, 0, I]).unsqueeze(1)
    alpha = torch.randn(G, I, generator=generator, dtype=dtype) * live  # negative ones too
    alpha[5] = alpha[5, :1]  # equal coordinates: many levels coincide
    target = 3 * torch.randn(G, n, generator=generator, dtype=dtype)
    target[:, 0] = 0
    codes = nearest_codes(target, alpha, live)
    every = (2 ** torch.arange(I) * live).sum(1, keepdim=True)
    assert not (codes & ~every).any(), "a bit of a basis that does not exist is set"
    chosen = (level_table(alpha).gather(1, codes.long()) - target).abs()
    levels = level_table(alpha)
    least = (levels.unsqueeze(1) - target.unsqueeze(2)).abs().min(2).values
    torch.testing.assert_close(
        chosen, least, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=0
    )
    by_definition = nearest_by_definition(target, alpha, live)
    assert not (by_definition & ~every).any()
    assert torch.equal((levels.gather(1, by_definition.long()) - target).abs(), least), (
        "the definition compares with every level"
    )
    distance = distances(target[0].numpy(), alpha[0].numpy()).min(0)
    np.testing.assert_allclose(chosen[0].numpy(), distance, atol=1e-5, rtol=0)


def test_unconstrained_step_is_amsgrad() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    w = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=0.01, amsgrad=True)
    m, v, v_max = torch.zeros(3, 5, 7, dtype=torch.float64)
    for t in range(1, 30):
        g = torch.randn(5, 7, generator=generator, dtype=torch.float64) / t
        parameter.grad = g.clone()
        # Adam adds eps after the division by sqrt(1-beta2^t), h before it.
        adam.param_groups[0]["eps"] = 1e-3 / (1 - 0.999**t) ** 0.5
        adam.step()
        update_moments(g, m, v, v_max, (0.9, 0.999))
        p, h = pseudo_gradient_and_hessian(m, v_max, *AMSGrad(0.01, (0.9, 0.999), 1e-3).at(t))
        w -= p / h
        torch.testing.assert_close(w, parameter.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("ridge", [None, 1e-6])
def test_coordinate_solve_is_the_weighted_least_squares(ridge: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    G, L, n = 7, 4, 50
    live = torch.arange(L) < torch.tensor([4, 4, 3, 2, 1, 0, 4]).unsqueeze(1)
    codes = torch.randint(0, 2**L, (G, n), generator=generator) & (2 ** torch.arange(L) * live).sum(
        1, keepdim=True
    )
    w0, p = torch.randn(2, G, n, generator=generator)
    h = torch.rand(G, n, generator=generator) + 0.1
    now = torch.rand(G, L, generator=generator) * live
    alpha = solve_coordinates(codes, live, w0, p, h, now, ridge)
    for g in range(G):
        k = int(live[g].sum())
        B = sign_table(L, h.dtype, h.device)[codes[g], :k].double().numpy()  # (n, k)
        # argmin |sqrt(h) (B a - t)|^2 + R |a - pull|^2 as an ordinary least squares problem
        R = RIDGE * float(h[g].sum()) if ridge is None else ridge
        pull = now[g, :k].numpy() if ridge is None else np.zeros(k)
        root = np.sqrt(h[g].double().numpy())
        t = (w0[g] - p[g] / h[g]).double().numpy()
        A = np.vstack([root[:, None] * B, R**0.5 * np.eye(k)])
        expected = np.linalg.lstsq(A, np.concatenate([root * t, R**0.5 * pull]), rcond=None)[0]
        np.testing.assert_allclose(alpha[g, :k].numpy(), expected, atol=2e-5)
        assert not alpha[g, k:].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coordinate_step_uses_the_gradient_of_alpha(case) -> None:
    w = make_layer(*case)
    optimizer = alq.ALQ([w], lr=0.01)
    alpha = w.alpha.clone().requires_grad_()
    w_hat = w.grouping.to_weight((alpha.unsqueeze(1) @ w.B.double()).squeeze(1))
    loss = (w_hat.sin() + w_hat**2).sum()
    (g_a,) = torch.autograd.grad(loss, alpha)
    w.parameter.grad = (w_hat.cos() + 2 * w_hat).detach()
    optimizer.coordinate_step()
    m_a = optimizer.state[w.parameter]["alpha_moments"][0]
    torch.testing.assert_close(m_a / 0.1, g_a * w.mask, atol=1e-10, rtol=0)


def test_pruning_takes_the_cheapest_candidates_of_all_layers() -> None:
    costs = [torch.tensor([[5.0, 1.0], [9.0, 2.0]]), torch.tensor([[3.0, 0.0, 4.0]])]
    masks = [torch.tensor([[True, True], [True, True]]), torch.tensor([[True, False, True]])]
    first, second = choose_pruned(costs, masks, [2, 2], 0.99)  # of 1, 2 and 3, 4: three go
    assert first.tolist() == [[False, True], [False, True]]
    assert second.tolist() == [[True, False, False]]  # 0.0 was dead already


def test_pruning_several_layers_follows_the_reference() -> None:
    layers = [make_layer(*case, seed=k) for k, case in enumerate(CASES)]
    references = [Reference(w.B, w.alpha, w.mask, lr=0.01) for w in layers]
    optimizer = alq.ALQ(layers, lr=0.01)
    generator = torch.Generator().manual_seed(2)
    while sum(w.live_total for w in layers):  # down to a network pruned to nothing
        for w in layers:
            give_gradient(w, generator)
        before = [w.mask.clone() for w in layers]
        alphas = [w.alpha.clone() for w in layers]
        M_p = 0.3 if sum(w.live_total for w in layers) > 8 else 1.0
        follow(optimizer, references, "prune", 1.0, M_p)
        for w, mask, alpha in zip(layers, before, alphas, strict=True):
            assert not (w.mask & ~mask).any()
            assert torch.equal(w.alpha, alpha * w.mask)  # alpha does not move
    for w in layers:
        give_gradient(w, generator)
    for step in (optimizer.basis_step, optimizer.coordinate_step, optimizer.ste_step):
        step()  # nothing left: all weights stay 0
        assert not any(w.parameter.any() for w in layers)


def test_random_rounding_is_seeded_and_has_the_right_mean() -> None:
    def removed(seed: int) -> int:
        w = make_layer("channelwise", None, 4, (10, 3, 3, 3))
        optimizer = alq.ALQ([w], generator=torch.Generator().manual_seed(seed))
        live = w.live_total
        for _ in range(3):
            give_gradient(w, torch.Generator().manual_seed(0))
            optimizer.prune_step(0.04, 1.0)  # 1.24 of 31 coordinates, then a little less
        return live - w.live_total

    counts = [removed(seed) for seed in range(60)]
    assert counts == [removed(seed) for seed in range(60)]
    assert 3.3 < np.mean(counts) < 3.85  # 0.04 * (31 + 29.8 + 28.6) = 3.57


def test_a_step_without_gradient_names_the_layer() -> None:
    w = make_layer("channelwise", None, 2, (3, 2, 3, 3))
    with pytest.raises(ValueError, match="weight: no gradient"):
        alq.ALQ([w]).basis_step()


@pytest.mark.parametrize("ridge", [None, 1e-6])
def test_coinciding_bases_under_a_large_curvature_stay_finite(ridge: float | None) -> None:
    """In float32 the published ridge vanishes beside h: the system is singular, alpha stays."""
    w0 = torch.ones(1, 25)
    h = torch.full((1, 25), 10.0)
    alpha = torch.full((1, 2), 0.5)
    live = torch.ones(1, 2, dtype=torch.bool)
    p = torch.zeros(1, 25)
    solved = solve_coordinates(torch.full((1, 25), 3), live, w0, p, h, alpha, ridge)
    assert bool(solved.isfinite().all()) == (ridge is None)
    _, new_alpha, w_hat, _ = optimise_bases(w0, p, h, alpha, live, ridge)
    torch.testing.assert_close(new_alpha, alpha, rtol=1e-2, atol=0)
    torch.testing.assert_close(w_hat, w0)


@pytest.mark.parametrize(("top_k", "M_p"), [(0.0, 0.5), (1.5, 0.5), (0.5, 1.5), (0.5, -0.1)])
def test_shares_out_of_range_are_refused(top_k, M_p) -> None:
    w = make_layer("channelwise", None, 2, (3, 2, 3, 3))
    with pytest.raises(ValueError, match="are shares"):
        alq.ALQ([w]).prune_step(top_k, M_p)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1), ("betas", (0.9, 1)), ("eps", 0), ("weight_decay", -1), ("ridge", 0)],
)
def test_the_optimizer_names_the_number_that_is_wrong(name: str, value: object) -> None:
    weights = alq.quantize(nn.Linear(8, 4), max_bit=2)
    with pytest.raises(InputError, match=f"^{name} .*: .*must be") as refused:
        alq.ALQ(weights, **{name: value})
    assert refused.value.argument == name


def test_each_layer_counts_its_own_steps() -> None:
    """A layer whose counters are set back leaves the other's steps as they were."""

    def after(reset: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
        optimizer = alq.ALQ(alq.quantize(model, max_bit=2))
        for number in range(4):
            for parameter in (model[0].weight, model[1].weight):
                parameter.grad = torch.randn_like(parameter)
            if reset and number == 3:
                optimizer.state[model[0].weight].update(step=0, step_a=0)
            optimizer.coordinate_step()
        return model[1].weight.detach().clone()

    assert torch.equal(after(reset=True), after(reset=False))
