"""What steps ask of an accelerator: counted, and the same steps as on a CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import alq
from alq.method import codes
from alq.method.codes import level_table
from alq.method.weight import prune
from compare import follow
from device_cost import as_on_an_accelerator, cost_of, costs_of_steps
from reference import Reference

# Operations of a basis, a coordinate and a prune step; bytes a weight of a basis step. The sizes of
# the networks do not enter: a stack is worked on in one block, or in as many as its size asks for.
MOST = {"vgg": (300, 150, 250, 250), "resnet18": (400, 150, 250, 255)}
STEPS = "basis coordinate coordinate prune basis prune coordinate ste ste coordinate basis".split()


class Layers(nn.Module):
    """Layers whose groups have the same n, in memory of either order, and some that stay alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)  # n = 27 by outputs
        self.one = nn.Conv2d(20, 6, 3)  # n = 20 by positions
        self.two = nn.Conv2d(20, 5, 1)
        self.three = nn.Linear(40, 3)
        self.four = nn.ConvTranspose2d(40, 4, 2, groups=2)
        self.to(torch.float64)


def make(channels_last: bool = True) -> alq.ALQ:
    """All kinds of layers; one with a group of zeros, one without bits, a hole in the mask."""
    torch.manual_seed(0)
    model = Layers()
    with torch.no_grad():
        model.one.weight[0] = 0
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    structure = ["channelwise", "pixelwise", "pixelwise", "subchannelwise", "pixelwise"]
    weights = alq.quantize(model, structure, [0, 0, 0, 2, 0], 3)
    dead = [torch.zeros_like(weight.mask) for weight in weights]
    dead[2][1] = True
    dead[3][0, 0] = True
    prune(weights, dead)
    generator = torch.Generator().manual_seed(1)
    return alq.ALQ(weights, lr=0.02, weight_decay=0.01, generator=generator)


def give_gradients(optimizer: alq.ALQ, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in optimizer.weights:
        g = torch.randn(weight.parameter.shape, generator=generator, dtype=torch.float64)
        weight.parameter.grad = torch.empty_like(weight.parameter).copy_(g)


def take(optimizer: alq.ALQ, number: int, step: str) -> None:
    give_gradients(optimizer, number)
    getattr(optimizer, f"{step}_step")(*([0.5, 0.4] if step == "prune" else []))


def stacks(optimizer: alq.ALQ) -> list[list[str]]:
    """The names of the layers that are one matrix."""
    families = optimizer._arranged()
    found = [[w.name for w in stack.weights] for family in families for stack in family.stacks]
    return sorted(found, key=len)


@pytest.mark.parametrize("name", MOST)
def test_operations_and_bytes(name: str) -> None:
    weights, costs = costs_of_steps(name, "max")
    basis, coordinate, pruning, traffic = MOST[name]
    assert costs["basis"].operations.total() <= basis
    assert costs["coordinate"].operations.total() <= coordinate
    assert costs["prune"].operations.total() <= pruning
    assert costs["basis"].bytes.total() <= traffic * weights
    assert {step: cost.waits for step, cost in costs.items() if cost.waits} == {
        "prune": 1, "prune, first": 1,
    }  # fmt: skip


def test_what_is_counted() -> None:
    x, y = torch.ones(8, 4), torch.ones(4)

    def step() -> None:
        room = torch.empty(8, 4)  # allocates
        torch.add(
            x.view(4, 8).view(8, 4), y.expand(8, 4), out=room
        )  # views; 128 + 16 and 128 bytes
        room.mul_(room)  # 128 and 128
        torch._foreach_copy_([x, y], [room, room[0]])  # 144 - 16, as room holds its row, and 144
        torch.lerp(y[1:], y[:-1], 0.5)  # 16 and 12: y has no more
        room.sum().item()  # 128 and 4, and a wait
        x.tolist()  # a wait

    cost = cost_of(step)
    assert dict(cost.operations) == {"add": 1, "mul_": 1, "_foreach_copy_": 1, "lerp": 1, "sum": 1}
    expected = {"add": 272, "mul_": 256, "_foreach_copy_": 272, "lerp": 28, "sum": 132}
    assert dict(cost.bytes) == expected
    assert cost.waits == 2


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("block", [None, 90])
def test_stacked_steps_follow_the_plain_reference(monkeypatch, channels_last, block) -> None:
    optimizer = make(channels_last)
    references = [Reference(w.B, w.alpha, w.mask, lr=0.02, wd=0.01) for w in optimizer.weights]
    monkeypatch.setattr(codes, "DEVICE_BLOCK", block or codes.DEVICE_BLOCK)
    with as_on_an_accelerator():
        assert len(stacks(optimizer)[-1]) > 1
        for number, step in enumerate(STEPS):
            give_gradients(optimizer, number)
            follow(optimizer, references, step, *([1.0, 0.3] if step == "prune" else []))


def test_stacked_steps_do_what_single_layers_do() -> None:
    """To rounding, which chooses among signs where bases coincide but hardly moves a level."""
    single, stacked = make(), make()
    for number, step in enumerate(STEPS):
        take(single, number, step)
        with as_on_an_accelerator():
            take(stacked, number, step)
        for a, b in zip(single.weights, stacked.weights, strict=True):
            assert torch.equal(a.mask, b.mask) and a.live_total == b.live_total and a.L == b.L
            torch.testing.assert_close(a.parameter, b.parameter)
            levels = [level_table(w.live_first(w.alpha)).sort(1).values for w in (a, b)]
            torch.testing.assert_close(*levels)


def test_layers_of_one_n_and_L_are_stacked_until_pruning_parts_them() -> None:
    optimizer = make()
    assert all(len(names) == 1 for names in stacks(optimizer))  # on a CPU
    with as_on_an_accelerator():
        take(optimizer, 0, "basis")
        optimizer._families = []
        *others, largest = stacks(optimizer)
        assert largest == ["one.weight", "two.weight", "three.weight"] and len(others) == 2
        one = optimizer.weights[1]
        dead = torch.zeros_like(one.mask)
        dead[:, 0] = True
        prune([one], [dead])
        assert stacks(optimizer)[-1] == ["two.weight", "three.weight"]
        take(optimizer, 1, "coordinate")
        assert not one.alpha[:, 0].any() and torch.equal(one.parameter, one.w_hat())


def states_of(optimizer: alq.ALQ) -> list[torch.Tensor]:
    return [x for w in optimizer.weights for x in (w.codes, w.alpha, w.mask, w.parameter)]


@pytest.mark.parametrize("way", ["state dict", "copy", "pickle", "assignment", "other optimizer"])
def test_whoever_changes_a_layer_need_not_say_so(way: str) -> None:
    """A run goes on with the same bits from a saved state, as a copy, and after other hands."""
    with as_on_an_accelerator():
        straight, other = make(), make()
        for number, step in enumerate(STEPS):
            take(straight, number, step)
            take(other, number, step)
            if way == "state dict":
                state = other.state_dict()
                for saved in state["weights"]:
                    assert saved["codes"].untyped_storage().nbytes() == saved["codes"].numel()
                other = make()
                other.load_state_dict(state)
            elif way == "copy":
                other = copy.deepcopy(other)
            elif way == "pickle":
                content = pickle.dumps(other)
                assert len(content) < 60_000 + 8 * 40 * sum(w.codes.numel() for w in other.weights)
                other = pickle.loads(content)
            elif way == "assignment":
                for w in other.weights:
                    w.set_form(w.codes.clone(), w.alpha.clone(), w.mask.clone())
                    own = other.state[w.parameter]
                    own["m"] = own["m"].clone()
            else:
                twin = alq.ALQ(other.weights, lr=0.0)  # takes the layers into stacks of its own
                twin._arranged()
            assert all(map(torch.equal, states_of(straight), states_of(other))), (number, step)
