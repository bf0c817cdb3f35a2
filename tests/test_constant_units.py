"""Folding units without bits: the same outputs, and nothing left of them to store."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import alq
import lenet5
from alq.command import stages
from alq.errors import InputError
from alq.method.weight import prune


class Residual(nn.Module):
    """Adds what its layers make of x to x, by which constants go on."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def convolutions() -> nn.Module:
    """Max pooling, no padding: all constants move."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 8, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 2 * 2, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5)),
    "sigmoid": lambda: nn.Sequential(nn.Linear(9, 12), nn.Sigmoid(), nn.Linear(12, 5)),
    "convolutions": convolutions,
    "padded": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding="same"), nn.Tanh(),
        nn.Conv2d(6, 3, 3),
    ),
    "normalised": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 3, padding=1),
        nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 6, 2), nn.AvgPool2d(2), nn.Flatten(1),
        nn.Linear(6 * 2 * 2, 3),
    ),
    "residual": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 1), Residual(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)),
        nn.Conv2d(6, 2, 1),
    ),
    "padded apart": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ZeroPad2d(1), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ),
    "no biases": lambda: nn.Sequential(
        nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 5)
    ),
    "of groups": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ),
    "norm of all": lambda: nn.Sequential(
        nn.Linear(9, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5)
    ),
    "one dimension": lambda: nn.Sequential(
        nn.Conv1d(9, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 2), nn.Conv1d(4, 3, 1)
    ),
}  # fmt: skip


def inputs_for(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = {"linear": (9,), "sigmoid": (9,), "no biases": (9,), "norm of all": (9,)}
    shape = plain.get(name, (9, 7) if name == "one dimension" else (1, 8, 8))
    return torch.randn(5, *shape, generator=generator)


def pruned_units(
    model: nn.Module, share: float, groups: float, structures: str | list[str] | None = None
) -> list[alq.MultiBitWeight]:
    """The model's weights without the bits of this share of units, and of this share of groups."""
    weights = alq.quantize(model, structures, max_bit=2)
    for weight in weights:
        units = torch.rand(weight.grouping.by_outputs[0], 1) < share
        dead = units.expand(-1, weight.G // len(units)).reshape(-1, 1)
        dead = dead | (torch.rand(weight.G, 1) < groups)
        prune([weight], [dead & weight.mask])
    return weights


def warm(model: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        model.train()(x)
    model.eval()


@settings(max_examples=80, deadline=None, database=None)
@given(
    name=st.sampled_from(list(NETWORKS)), seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.3, 0.8]), groups=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*more than the")
def test_the_outputs_stay(name, seed, share, groups) -> None:
    torch.manual_seed(seed)
    model, x = NETWORKS[name](), inputs_for(name, seed)
    warm(model, x)
    weights = pruned_units(model, share, groups)
    fresh = inputs_for(name, seed + 1000)
    before = model(fresh)
    model.train()
    alq.fold_constant_units(model, weights, x)
    assert all(module.training for module in model.modules())
    model.eval()
    torch.testing.assert_close(model(fresh), before, rtol=1e-4, atol=1e-5)
    for weight in weights:
        assert torch.equal(weight.w_hat(), weight.parameter)
    state = copy.deepcopy(model.state_dict())
    codes = [weight.codes.clone() for weight in weights]
    alq.fold_constant_units(model, weights, x)
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert all(torch.equal(weight.codes, old) for weight, old in zip(weights, codes, strict=True))


@pytest.mark.parametrize("name", ["linear", "sigmoid", "convolutions"])
def test_where_all_can_move_nothing_is_left_of_units_without_bits(name) -> None:
    torch.manual_seed(1)
    model = NETWORKS[name]()
    weights = pruned_units(model, 0.4, 0.0)
    alq.fold_constant_units(model, weights, inputs_for(name, 0))
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    for place, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        dead = ~weight.mask.reshape(layer.weight.shape[0], -1).any(1)
        if place < len(layers) - 1:
            assert dead.any() and not dead.all() and not layer.bias[dead].any()
            behind = weights[place + 1]
            inputs = behind.grouping.by_outputs[1]
            columns = dead.repeat_interleave(inputs // len(dead))[behind.grouping.inputs_of()]
            plus = 2 ** behind.mask.sum(1, keepdim=True) - 1
            assert ((behind.codes == plus) | ~columns).all()
        else:
            assert layer.bias[dead].all()  # they are outputs of the network


def test_groups_that_multiply_constants_only_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    weights = alq.quantize(model, "kernelwise", max_bit=2)
    prune(weights[:1], [(torch.arange(6) < 2).unsqueeze(1) & weights[0].mask])
    live, x = weights[1].mask.sum(1).reshape(4, 6), inputs_for("convolutions", 0)
    before = model(x)
    alq.fold_constant_units(model, weights, x)
    torch.testing.assert_close(model(x), before)
    after = weights[1].mask.sum(1).reshape(4, 6)
    assert live.all() and not after[:, :2].any() and torch.equal(after[:, 2:], live[:, 2:])


def test_lenet5_after_two_layers_of_constants() -> None:
    """A unit whose groups all go is without bits then, and is folded in turn."""
    torch.manual_seed(0)
    model = lenet5.LeNet5().eval()
    weights = alq.quantize(model, lenet5.DEFAULTS["structure"], [0, 0, 50, 1], max_bit=1)
    keep = torch.zeros(500, 50, dtype=torch.bool)
    keep[:100], keep[100:200, 7] = True, True  # pieces of 16 weights: a channel of conv2 each
    prune([weights[2]], [~keep.reshape(-1, 1) & weights[2].mask])
    prune([weights[1]], [(torch.arange(1000) // 20 == 7).unsqueeze(1) & weights[1].mask])
    x = torch.randn(8, 1, 28, 28)
    before = model(x)
    alq.fold_constant_units(model, weights, x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert weights[2].mask.any(1).reshape(500, 50).any(1).sum() == 100
    assert not model.fc1.bias[100:].any() and model.fc1.bias[:100].all()


class Swallows(nn.Module):
    """Makes numbers of what is none, so that all looks constant."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).float()


def test_a_model_that_hides_what_varies_is_refused_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), Swallows(), nn.Linear(12, 5))
    weights = pruned_units(model, 0.3, 0.0)
    before = copy.deepcopy(model.state_dict())
    codes = [weight.codes.clone() for weight in weights]
    with pytest.raises(InputError, match="fold: outputs would change by"):
        alq.fold_constant_units(model, weights, inputs_for("linear", 0))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert all(torch.equal(weight.codes, old) for weight, old in zip(weights, codes, strict=True))


def test_what_cannot_be_folded_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 12), nn.Flatten(), nn.Linear(24, 5))
    weights = alq.quantize(model)
    with pytest.raises(InputError, match="takes a tensor of floats"):
        alq.fold_constant_units(model, weights, torch.tensor([[1, 2]]))
    model = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5))
    weights = alq.quantize(model)
    alq.quantize_activations(model, 2)
    with pytest.raises(InputError, match="in binary bases, not in float"):
        alq.fold_constant_units(model, weights, inputs_for("linear", 0))


def test_a_layer_that_is_called_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.second(self.first(x).relu()).relu())

    torch.manual_seed(0)
    model, x = Twice(), inputs_for("linear", 0)
    weights = pruned_units(model, 0.4, 0.0)
    before, codes = model(x), weights[1].codes.clone()
    alq.fold_constant_units(model, weights, x)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(weights[1].codes, codes)


class Positions(nn.Module):
    """Adds a number of its own to each place of a sequence (batch, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(3 * torch.randn(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


def test_what_differs_by_position_is_not_constant_where_only_one_is_seen() -> None:
    torch.manual_seed(0)
    sequences = nn.Sequential(nn.Linear(9, 12), Positions(), nn.ReLU(), nn.Linear(12, 5))
    pictures = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AvgPool2d(3, 2, 1), nn.Conv2d(6, 3, 1))
    for model, short, long in [
        (sequences, torch.randn(4, 1, 9), torch.randn(4, 5, 9)),
        (pictures, torch.randn(4, 1, 4, 4), torch.randn(4, 1, 20, 20)),
    ]:
        weights = pruned_units(model, 0.4, 0.0)
        before = model(long)
        alq.fold_constant_units(model, weights, short)
        torch.testing.assert_close(model(long), before)


class Branches(nn.Module):
    """Returns what `first` gives, which also enters a padding together with `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = (nn.Conv2d(1, 6, 3) for _ in range(3))
        self.padded, self.last = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        padded = self.padded((first + self.second(x)).relu())
        return torch.cat([first, padded, self.last(self.other(x).relu())], 1)


def test_what_cannot_move_does_not_keep_the_rest_from_moving() -> None:
    """1 - 2 and 0 + 0 are 0 after the ReLU, but 1 + 0 is not: so the -2 stays with the 1."""
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(3, 1, 8, 8)
    weights = alq.quantize(model, "channelwise", max_bit=2)
    prune(weights[:3], [(torch.arange(6) < 3).unsqueeze(1) & w.mask for w in weights[:3]])
    with torch.no_grad():
        model.first.bias[:3], model.second.bias[:3] = 1, -2
    before = model(x)
    alq.fold_constant_units(model, weights, x)
    torch.testing.assert_close(model(x), before)
    assert (model.first.bias[:3] == 1).all() and (model.second.bias[:3] == -2).all()
    assert not model.other.bias[:3].any()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("call", range(1, 9))
def test_a_fold_that_is_cut_off_leaves_the_model_as_it_was(error, call) -> None:
    torch.manual_seed(0)
    model, calls = NETWORKS["linear"](), []
    weights = pruned_units(model, 0.4, 0.3)
    before = copy.deepcopy(model.state_dict())
    forms = [copy.deepcopy(weight.state_dict()) for weight in weights]

    def interrupt(module: nn.Module, args: tuple) -> None:
        calls.append(args)
        if len(calls) == call:
            raise error

    model.train().register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        alq.fold_constant_units(model, weights, inputs_for("linear", 0))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert all(module.training for module in model.modules())
    for weight, form in zip(weights, forms, strict=True):
        state = weight.state_dict()
        assert all(torch.equal(state[key], form[key]) for key in ("codes", "alpha", "mask"))


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    model = NETWORKS["linear"]()
    weights = pruned_units(model, 0.4, 0.0)
    for inputs, message in [
        (torch.randn(0, 9), "fold: the batch to compare outputs on is empty"),
        (torch.randn(5, 8), r"fold: the model takes no \(5, 8\): mat1 and mat2"),
        ([1.0], "takes a tensor of floats"),
    ]:
        with pytest.raises(InputError, match=message) as refused:
            alq.fold_constant_units(model, weights, inputs)
        assert refused.value.argument == "fold"


def test_a_layer_that_is_called_by_keyword_is_folded_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(9, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(input=self.first(input=x).relu())

    torch.manual_seed(0)
    model, x = Named(), inputs_for("linear", 0)
    weights = pruned_units(model, 0.4, 0.0)
    before = model(x)
    alq.fold_constant_units(model, weights, x)
    torch.testing.assert_close(model(x), before)
    assert not model.first.bias[~weights[0].mask.any(1)].any()


@pytest.mark.parametrize("shares", [(20, 7), (0, 7)])
def test_all_processes_fold_on_the_same_pictures(monkeypatch, shares) -> None:
    """Each has a share of the validation pictures, of a small one none."""
    pictures = [torch.randn(count, 1, 4, 4) for count in shares]
    batches = [[(x, torch.zeros(len(x)))] * 2 if len(x) else [] for x in pictures]
    sent: list = []

    def send(own: list) -> list:
        sent.append(own)
        return [[torch.zeros(1)]]

    monkeypatch.setattr(stages, "gather_from_all", send)
    for own in batches:
        stages.same_pictures(own)
    monkeypatch.setattr(stages, "gather_from_all", lambda own: sent)
    expected = next(x for x in pictures if len(x))[:8]
    for own in batches:
        assert torch.equal(stages.same_pictures(own), expected)
