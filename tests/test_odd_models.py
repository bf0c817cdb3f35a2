"""Models and calls that are odd but happen: each works, or is refused in one line."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import alq
from alq.errors import InputError
from alq.method import steps


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    first = next(model.parameters())
    x = torch.ones(3, 20, dtype=first.dtype)
    model(x).square().sum().backward()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_of_model_and_quantizer_go_on_alike(copied) -> None:
    model = small()
    optimizer = alq.ALQ(alq.quantize(model, max_bit=3), generator=torch.Generator().manual_seed(5))
    for step in (optimizer.basis_step, optimizer.coordinate_step, optimizer.ste_step):
        backward(model)
        step()
    other_model, other = copied((model, optimizer))
    for network, quantizer in ((model, optimizer), (other_model, other)):
        for _ in range(2):
            backward(network)
            quantizer.prune_step(0.3, 0.5)
            backward(network)
            quantizer.basis_step()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)
    assert [w.parameter for w in other.weights] == [other_model[0].weight, other_model[2].weight]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_models_in_fewer_bits_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"0\.weight: is b?float16; quantize the model in float32"):
        alq.quantize(small().to(kind))


def test_a_model_converted_after_quantizing_is_refused() -> None:
    model = small()
    optimizer = alq.ALQ(alq.quantize(model))
    model.double()
    backward(model)
    with pytest.raises(InputError, match=r"was torch\.float32 on cpu .* is torch\.float64"):
        optimizer.basis_step()


def test_sparse_gradients() -> None:
    """The rows that a batch holds move, as they do with dense gradients."""
    moved = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(10, 16, sparse=sparse)
        optimizer = alq.ALQ(alq.quantize(model, max_bit=2), lr=0.1)
        model(torch.tensor([1, 2, 2])).square().sum().backward()
        optimizer.basis_step()
        moved.append(model.weight.detach().clone())
    assert torch.equal(*moved)


def test_layers_without_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 4))
    assert [weight.name for weight in alq.quantize(model)] == ["1.weight"]


def test_numbers_of_bits() -> None:
    assert [w.I for w in alq.quantize(small(), max_bit=np.int64(3))] == [3, 3]
    assert [w.I for w in alq.quantize(small(), max_bit=np.array([3, 2]).tolist())] == [3, 2]
    with pytest.raises(InputError, match=r"0\.weight: max_bit 2\.0 is no whole number"):
        alq.quantize(small(), max_bit=2.0)
    with pytest.raises(InputError, match=r"max_bit: is a dict; give one value .* 0.weight, 2.weig"):
        alq.quantize(small(), max_bit={"0.weight": 2})


def test_a_weight_given_twice_is_refused() -> None:
    weights = alq.quantize(small())
    with pytest.raises(InputError, match="given twice"):
        alq.ALQ([*weights, weights[0]])


def test_a_compiled_model_has_its_own_names(tmp_path) -> None:
    model = small()
    compiled = torch.compile(model, backend="eager")
    weights = alq.quantize(compiled)
    assert [weight.name for weight in weights] == ["0.weight", "2.weight"]
    alq.save_packed(tmp_path / "net.alq", compiled, weights)
    other = small()
    alq.load_packed(tmp_path / "net.alq", other)
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_file_is_not_loaded_into_a_model_without_memory(tmp_path) -> None:
    model = small()
    alq.save_packed(tmp_path / "net.alq", model, alq.quantize(model))
    with torch.device("meta"):
        empty = small()
    with pytest.raises(InputError, match=r"has no memory; use model\.to_empty"):
        alq.load_packed(tmp_path / "net.alq", empty)
    alq.load_packed(tmp_path / "net.alq", empty.to_empty(device="cpu"))
    assert torch.equal(empty[0].weight, model[0].weight)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """As in a terminal; processes that start in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted(alq.ALQ):
    """Ctrl-C comes while the bases of the second layer are being written."""

    def __init__(self, *arguments, presses: int) -> None:
        super().__init__(*arguments)
        calls = []

        def basis_step(*arguments) -> None:
            calls.append(1)
            for _ in range(presses if len(calls) == 2 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            steps.basis_step(*arguments)

        self.arithmetic = lambda weight: SimpleNamespace(BLOCK=None, basis_step=basis_step)


def test_ctrl_c_in_a_step_waits_for_its_end(ctrl_c_raises) -> None:
    model = small()
    weights = alq.quantize(model)
    optimizer = Interrupted(weights, presses=1)
    before = model[2].weight.clone()
    backward(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.basis_step()
    assert not torch.equal(model[2].weight, before)  # the step was finished
    for weight in weights:
        assert torch.equal(weight.parameter, weight.w_hat())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    backward(model)
    alq.ALQ(weights).basis_step()


def test_a_second_ctrl_c_acts_at_once(ctrl_c_raises) -> None:
    model = small()
    optimizer = Interrupted(alq.quantize(model), presses=2)
    before = model[2].weight.clone()
    backward(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.basis_step()
    assert torch.equal(model[2].weight, before)


def test_parameters_in_one_memory_are_refused() -> None:
    """A step of either would change the other behind its back. Tied weights are one parameter."""
    for weight in (lambda w: w.data, lambda w: w.data.T):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = nn.Parameter(weight(model[0].weight))
        before = model[0].weight.clone()
        for skip in ((), ["1.weight"]):
            with pytest.raises(
                InputError, match=r"1\.weight: lies in the memory of 0\.weight, but"
            ):
                alq.quantize(model, skip=skip)
        assert torch.equal(model[0].weight, before)
    model[1].weight = model[0].weight
    assert len(alq.quantize(model)) == 1
    flat = torch.randn(2, 6, 6)
    model[0].weight, model[1].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    assert len(alq.quantize(model)) == 2


def test_a_layer_of_zeros_is_warned_of() -> None:
    model = small()
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match="2.weight: all its weights are 0, so it gets no bits"):
        alq.quantize(model, max_bit=1)


def test_an_embedding_that_changes_its_weight_is_refused_before_any_work() -> None:
    model = nn.Sequential(nn.Embedding(50, 64, max_norm=1.0), nn.Linear(64, 5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"0.weight: its embedding has max_norm"):
        alq.quantize(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(alq.quantize(model, skip=["0.weight"])) == 1


def test_a_model_without_memory_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(64, 5)
    with pytest.raises(InputError, match="weight: has no memory"):
        alq.quantize(model)


def test_the_quantizer_takes_no_other_parameters() -> None:
    model = small()
    optimizer = alq.ALQ(alq.quantize(model))
    with pytest.raises(InputError, match="other parameters want another optimizer"):
        optimizer.add_param_group({"params": [model[0].bias]})


def test_a_single_weight_in_the_place_of_a_list_is_refused() -> None:
    model = nn.Linear(64, 5)
    (weight,) = alq.quantize(model)
    batches = [(torch.randn(4, 64), torch.randint(5, (4,)))]
    for call in (
        lambda: alq.save_packed("unwritten.alq", model, weight),
        lambda: alq.ALQ(weight),
        lambda: alq.fit(model, weight, batches, batches, progress=False),
    ):
        with pytest.raises(InputError, match="weights: is a single one"):
            call()
