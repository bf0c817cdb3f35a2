"""Structures, sizes, whole networks, saved state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import alq
from alq.method.structures import make_grouping
from compare import assert_same_levels
from test_steps import CASES, give_gradient, make_layer


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 10),
    )  # fmt: skip


def test_structures_group_the_weights_that_the_method_says() -> None:
    weight = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    expected = {
        "channelwise": [weight[o].flatten() for o in range(2)],
        "kernelwise": [weight[o, c].flatten() for o in range(2) for c in range(3)],
        "pixelwise": [weight[o, :, y, x] for o in range(2) for y in range(2) for x in range(2)],
    }
    for structure, groups in expected.items():
        grouping = make_grouping("layer", (2, 3, 2, 2), structure, None)
        assert (grouping.G, grouping.n) == (len(groups), groups[0].numel())
        assert torch.equal(grouping.to_groups(weight), torch.stack(groups))
        assert torch.equal(grouping.to_weight(torch.stack(groups)), weight)
    rows = torch.arange(24.0).view(2, 12)
    grouping = make_grouping("layer", (2, 12), "subchannelwise", 3)
    assert torch.equal(grouping.to_groups(rows), rows.view(6, 4))
    assert torch.equal(grouping.to_weight(rows.view(6, 4)), rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"structure": "rowwise"}, "0.weight: unknown structure 'rowwise'"),
        ({"structure": "pixelwise"}, "5.weight: structure 'pixelwise' needs a convolution"),
        ({"subc": [0, 0, 7]}, "5.weight: subc 7 does not divide its rows of 128"),
        ({"subc": [0, 0, 0]}, "5.weight: subc 0"),
        ({"subc": [1, 2]}, "subc: 2 values for 3 quantized layers"),
        ({"max_bit": [6, 9, 6]}, "3.weight: max_bit 9"),
        ({"max_bit": 0}, "0.weight: max_bit 0"),
    ],
)
def test_a_request_that_does_not_fit_names_the_layer(flags, message) -> None:
    with pytest.raises(ValueError, match=message):
        alq.quantize(small_network(), **flags)


def test_quantize_in_place_with_defaults_and_lists() -> None:
    model = small_network()
    before = copy.deepcopy(model)
    weights = alq.quantize(model)
    assert [w.name for w in weights] == ["0.weight", "3.weight", "5.weight"]
    assert [w.structure for w in weights] == ["channelwise", "pixelwise", "subchannelwise"]
    for w in weights:
        assert w.B.dtype == torch.int8 and w.B.shape == (w.G, w.I, w.n)
        products = (w.alpha.unsqueeze(1) @ w.B.float()).squeeze(1)
        torch.testing.assert_close(w.grouping.to_groups(w.w_hat()), products)
        assert torch.equal(w.parameter, w.w_hat())
    torch.testing.assert_close(model[0].weight, before[0].weight, atol=0.03, rtol=0)
    assert torch.equal(model[0].bias, before[0].bias)
    mixed = alq.quantize(
        before, ["kernelwise", "pixelwise", "subchannelwise"], [0, 0, 4], [1, 2, 3]
    )
    assert [(w.structure, w.I) for w in mixed] == [
        ("kernelwise", 1),
        ("pixelwise", 2),
        ("subchannelwise", 3),
    ]


def test_bitwidth_and_storage_follow_the_formula() -> None:
    weights = [make_layer(*case) for case in CASES]
    for w in weights:
        assert w.bitwidth == int(w.mask.sum()) / w.G
        assert w.storage_bytes == int(w.mask.sum()) * (w.n / 8 + 4)
    numel = [w.parameter.numel() for w in weights]
    mean = sum(w.bitwidth * size for w, size in zip(weights, numel, strict=True)) / sum(numel)
    assert alq.average_bitwidth(weights) == pytest.approx(mean)
    assert alq.storage_bytes(weights) == sum(w.storage_bytes for w in weights)


def test_layers_of_any_memory_format_give_the_same_weights() -> None:
    """channels_last parameters and gradients are other strides of the same numbers."""
    layers, weights = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        layer = nn.Conv2d(16, 4, 3).double().to(memory_format=memory_format)
        (w,) = alq.quantize(layer, "pixelwise", max_bit=2)  # of which no levels tie
        optimizer = alq.ALQ([w], lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for mode in ("basis", "coordinate", "ste"):
            g = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            w.parameter.grad = g.to(memory_format=memory_format)
            getattr(optimizer, f"{mode}_step")()
        assert layer.weight.is_contiguous(memory_format=memory_format)
        layers.append(layer.weight.detach().clone())
        weights.append(w.state_dict())
    torch.testing.assert_close(*layers, atol=1e-9, rtol=0)
    assert_same_levels(*weights, atol=1e-9)


@pytest.mark.parametrize("stop_after", range(5))
def test_state_dict_restores_everything(stop_after: int, tmp_path) -> None:
    """Stopping after any of the steps and going on elsewhere changes no bit."""
    modes = ["basis", "prune", "coordinate", "ste", "prune", "basis"]

    def make() -> tuple[list[alq.MultiBitWeight], alq.ALQ]:
        weights = [make_layer(*case) for case in CASES]
        return weights, alq.ALQ(weights, lr=0.01, generator=torch.Generator().manual_seed(3))

    def go(weights, optimizer, numbers) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for w in weights:
                give_gradient(w, generator)
            arguments = (0.3, 0.5) if modes[number] == "prune" else ()
            getattr(optimizer, f"{modes[number]}_step")(*arguments)

    weights, optimizer = make()
    go(weights, optimizer, range(stop_after + 1))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    go(weights, optimizer, range(stop_after + 1, len(modes)))

    others, other_optimizer = make()
    other_optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    go(others, other_optimizer, range(stop_after + 1, len(modes)))
    for w, other in zip(weights, others, strict=True):
        assert torch.equal(w.parameter, other.parameter)
        assert torch.equal(w.alpha, other.alpha) and torch.equal(w.mask, other.mask)
        assert torch.equal(w.B, other.B)


def test_restore_rebuilds_the_multi_bit_form() -> None:
    model = small_network()
    weights = alq.quantize(model, max_bit=3)
    states = [w.state_dict() for w in weights]
    other = small_network()
    for w, again in zip(weights, alq.restore(other, states), strict=True):
        assert torch.equal(w.B, again.B) and torch.equal(w.parameter, again.parameter)
    with pytest.raises(ValueError, match=r"0\.weight: is in the saved weights, but not in"):
        alq.restore(nn.Linear(3, 2), states)
    with pytest.raises(ValueError, match=r"0\.weight: is in the saved weights twice"):
        alq.restore(other, [*states, states[0]])


def test_state_dict_is_a_copy() -> None:
    (w,) = weights = [make_layer(*CASES[0])]
    optimizer = alq.ALQ(weights, lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for mode in ("basis", "coordinate", "ste"):
        give_gradient(w, generator)
        getattr(optimizer, f"{mode}_step")()
    saved, before = optimizer.state_dict(), w.w_hat()
    give_gradient(w, generator)
    optimizer.ste_step()
    assert not torch.equal(w.w_hat(), before)
    optimizer.load_state_dict(saved)
    assert torch.equal(w.w_hat(), before) and torch.equal(w.parameter, before)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small_network()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"3\.weight: has weights that are not finite"):
        alq.quantize(model)


def test_a_missing_gradient_changes_no_layer() -> None:
    weights = [make_layer(*case) for case in CASES[:2]]
    optimizer = alq.ALQ(weights, lr=0.1)
    give_gradient(weights[0], torch.Generator().manual_seed(0))
    before = weights[0].w_hat()
    with pytest.raises(ValueError, match="no gradient"):
        optimizer.basis_step()
    assert torch.equal(weights[0].parameter, before)
    assert optimizer.state[weights[0].parameter]["step"] == 0
