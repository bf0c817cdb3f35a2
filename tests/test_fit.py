"""`alq.fit` with any batch and any loss; pruning to a target; the example of the README."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import alq
import lenet5
from alq.errors import InputError
from alq.machine.processes import tensors_in
from alq.method.steps import choose_pruned
from alq.training.batches import moved_to
from alq.training.plan import expected_size, pruning_plan
from alq.training.sizes import SketchedLayer, bits_of_one, coordinate_prices, size_in

pytestmark = pytest.mark.usefixtures("sliver")
ROOT = Path(__file__).resolve().parent.parent
SHORT = alq.Schedule(
    R=2, epoch_basis=1, epoch_coord=1, pr=0.5, top_k=0.5, epoch_ste=2, epoch_post_coord=1
)


def test_the_example_of_the_readme(monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "alq.fit(" in block]
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    result = names["result"]
    assert 0.99 < result["bitwidth"] <= 1.0 and result["val_accuracy"] > 85
    printed = capsys.readouterr().out
    assert "target_bit 1 from 4 in 2 rounds" in printed
    assert "4.weight" in printed
    assert re.findall(r".*7\.weight.*", printed) == re.findall(r"not quantized: .*", printed)
    assert f"bit a weight, {result['storage_bytes'] / 1e3:.1f} KB" in printed
    assert f"validation {result['val_accuracy']:.2f} %" in printed


def regression(batches: int = 6) -> tuple[nn.Module, list[dict]]:
    """A network with batch normalisation, and dict batches of a function it can learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(batches, 16, 8)
    return model, [{"x": part, "more": {"y": part[:, :2].sin()}} for part in x]


def squared_error(model: nn.Module, batch: dict) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]), batch["more"]["y"])


def test_dict_batches_and_a_loss_without_accuracy(tmp_path, capsys) -> None:
    model, batches = regression()
    weights = alq.quantize(model, max_bit=3)
    result = alq.fit(
        model, weights, batches[:4], batches[4:], squared_error, SHORT,
        log=tmp_path / "log.jsonl", progress=False,
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    kinds = [epoch["kind"] for epoch in epochs]
    assert kinds == [*["basis", "coordinate", "prune"] * 2, "ste", "ste", "coordinate"]
    # The best post-training epoch is kept, in the model and in the weights.
    last = [e for e in events if e.get("stage") == "posttrain" and e["event"] != "result"]
    best = min(event["val_loss"] for event in last)  # the start and its epochs
    assert len(last) == 4
    assert result["val_loss"] == pytest.approx(best, rel=1e-6) and result["val_accuracy"] is None
    assert not model.training
    with torch.no_grad():
        again = sum(float(squared_error(model, batch)) for batch in batches[4:]) / 2
    assert again == pytest.approx(best, rel=1e-5)
    for w in weights:
        assert torch.equal(w.parameter, w.w_hat())
    assert result["bitwidth"] == alq.average_bitwidth(weights) == epochs[-1]["bitwidth"]
    assert result["storage_bytes"] == alq.storage_bytes(weights)


def test_tuple_batches_and_the_default_loss_learn(capsys) -> None:
    fit_tuples(compile=False)
    assert "1 round at pr 0.5" in capsys.readouterr().out


def test_compiled_steps_learn(compiler) -> None:
    fit_tuples(compile=True)


def fit_tuples(compile: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2, bias=False))
    loader = list(zip(x.split(40), y.split(40), strict=True))
    weights = alq.quantize(model, max_bit=4)
    schedule = alq.Schedule(
        lr=0.01, R=1, epoch_basis=4, epoch_coord=2, pr=0.5, top_k=0.2, epoch_ste=4,
        epoch_post_coord=1,
    )  # fmt: skip
    result = alq.fit(model, weights, loader[:8], loader[8:], schedule=schedule, compile=compile)
    assert result["val_accuracy"] > 90


def test_a_loss_may_count_its_answers_itself() -> None:
    model, batches = regression()

    def close(model: nn.Module, batch: dict) -> tuple:
        output, y = model(batch["x"]), batch["more"]["y"]
        return F.mse_loss(output, y), ((output - y).abs().amax(1) < 0.5).sum(), len(y)

    weights = alq.quantize(model, max_bit=2)
    result = alq.fit(model, weights, batches, batches, close, SHORT, progress=False)
    assert 0 < result["val_accuracy"] <= 100


def test_fit_leaves_the_process_as_it_was() -> None:
    torch.set_flush_denormal(False)
    model, batches = regression()
    weights = alq.quantize(model)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    alq.fit(model, weights, batches, batches, squared_error, SHORT, progress=False)
    assert torch.tensor(1e-39) * torch.tensor(0.5) != 0  # a denormal number is still one
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)


def test_no_stage_repeats_the_orders_of_another() -> None:
    class Noting(list):
        def set_epoch(self, number: int) -> None:
            orders.append(number)

    orders: list[int] = []
    model, batches = regression()
    alq.fit(
        model, alq.quantize(model), Noting(batches), batches, squared_error, SHORT, progress=False
    )
    assert len(orders) == 9 and len(set(orders)) == 9


def test_a_network_of_quantized_weights_alone_and_no_post_training() -> None:
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    weights = alq.quantize(model)
    _, batches = regression()
    schedule = alq.Schedule(**{**vars(SHORT), "epoch_ste": 0, "epoch_post_coord": 0})
    result = alq.fit(model, weights, batches, batches, squared_error, schedule, progress=False)
    assert 0 < result["bitwidth"] < 6


def test_what_fit_cannot_do_is_said() -> None:
    model, batches = regression()
    weights = alq.quantize(model)
    with pytest.raises(ValueError, match="train_loader: needs a length"):
        alq.fit(model, weights, iter(batches), batches, squared_error, SHORT)
    with pytest.raises(ValueError, match="val_loader: needs a length"):
        alq.fit(model, weights, batches, [], squared_error, SHORT)
    with pytest.raises(ValueError, match="weights: none given"):
        alq.fit(model, [], batches, batches, squared_error, SHORT)
    with pytest.raises(InputError, match="is a share, at most 1") as caught:
        alq.Schedule(pr=1.5)
    assert caught.value.argument == "pr"
    with pytest.raises(ValueError, match="epoch_prune 0: must be above 0"):
        alq.Schedule(epoch_prune=0)
    unused = nn.ModuleList([model, nn.Linear(3, 3)])
    weights = alq.quantize(unused)
    with pytest.raises(ValueError, match=r"1\.weight: no gradient; .* skip="):
        alq.fit(
            unused, weights, batches, batches, lambda model, batch: squared_error(model[0], batch),
            SHORT, progress=False,
        )  # fmt: skip


# ---------------------------------------------------------------------------- targets


def network() -> list[alq.MultiBitWeight]:
    """Layers whose coordinates differ much in size."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(144, 40), nn.Linear(40, 10)]
    return alq.quantize(
        nn.Sequential(*layers), ["kernelwise", "pixelwise", "subchannelwise", "subchannelwise"]
    )


def prune_all(
    plan, weights: list[alq.MultiBitWeight], schedule, batches: int, steps=None, kind=alq.ALQ
) -> list:
    """Go through the rounds on random gradients; the sizes after each round."""
    unit = getattr(plan, "unit", "target_bit")
    quantizer = kind(weights, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    before = (schedule.epoch_basis + schedule.epoch_coord) * batches
    sizes = []
    taken = 0
    for round in range(1, plan.rounds + 1):
        for number in range(before + schedule.epoch_prune * batches):
            for w in weights:
                w.parameter.grad = torch.randn(w.parameter.shape, generator=generator)
            if number < before:
                quantizer.coordinate_step()
            else:
                plan.step(quantizer, round, number - before)
            taken += 1
            if steps is not None and taken == steps:  # as --resume does
                state = copy.deepcopy(quantizer.state_dict())
                quantizer = alq.ALQ(weights, generator=torch.Generator())
                quantizer.load_state_dict(state)
        sizes.append(size_in(unit, weights))
    return sizes


@pytest.mark.parametrize(("pr", "top_k", "batches", "R"), [(0.8, 0.1, 20, 2), (0.15, 0.05, 30, 5)])
def test_what_the_rounds_leave_is_known_from_the_counts(pr, top_k, batches, R) -> None:
    """Also before there are weights; as the same share of each layer, or as less or more bits."""
    weights = network()
    layers = [SketchedLayer(weight.grouping, weight.I) for weight in weights]
    schedule = alq.Schedule(R=R, pr=pr, top_k=top_k, epoch_basis=0, epoch_coord=0)
    plan = pruning_plan(schedule, weights, batches)
    assert pruning_plan(schedule, layers, batches) == plan
    assert expected_size(plan, layers) == expected_size(plan, weights)
    before = sum(weight.live_total for weight in weights)
    expected = plan.share_left(before)
    prune_all(plan, weights, schedule, batches)
    left = sum(weight.live_total for weight in weights) / before
    # Candidates are rounded at random, which the prediction leaves out.
    assert left == pytest.approx(expected, rel=0.02)
    assert left > (1 - pr / batches) ** (batches * R)  # without any rounding down


@pytest.mark.parametrize("options", [{"target_bit": 1.5}, {"target_kb": 2.0}])
def test_what_a_target_leaves_is_known(options) -> None:
    schedule = alq.Schedule(**options)
    size = expected_size(pruning_plan(schedule, network(), 20), network())
    assert size["bitwidth"] == pytest.approx(options.get("target_bit", size["bitwidth"]))
    assert size["storage_bytes"] == pytest.approx(
        1e3 * options.get("target_kb", size["storage_bytes"] / 1e3)
    )
    assert size["bitwidth"] / 6 == pytest.approx(size["storage_bytes"] / 10.88e3, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "pr", "top_k", "batches", "rounds"),
    [
        ({"target_bit": 1.0}, 0.8, 0.005, 20, 3),
        ({"target_bit": 0.05}, 0.8, 0.005, 10, 6),
        ({"target_bit": 5.5}, 0.8, 0.005, 20, 1),
        ({"target_bit": 0.5}, 1.0, 0.05, 1, 1),
        ({"target_kb": 2.0}, 0.4, 0.002, 20, 5),
        ({"target_kb": 0.05}, 0.8, 1.0, 20, 7),
    ],
)
def test_the_target_is_reached_to_the_coordinate(target, pr, top_k, batches, rounds) -> None:
    weights = network()
    schedule = alq.Schedule(**target, pr=pr, top_k=top_k, epoch_basis=0, epoch_coord=1)
    plan = pruning_plan(schedule, weights, batches)
    ((unit, value),) = target.items()
    assert plan.rounds == rounds and 0 < plan.last_pr <= pr + 1e-9
    price = max(coordinate_prices(unit, weights)) / bits_of_one(unit, weights)
    sizes = prune_all(plan, weights, schedule, batches)
    for number, size in enumerate(sizes[:-1], 1):
        assert plan.aim(number) - price < size <= plan.aim(number) * (1 + 1e-9)
    assert value - price < sizes[-1] <= value * (1 + 1e-9)
    own = {"target_bit": alq.average_bitwidth, "target_kb": alq.storage_bytes}[unit](weights)
    assert sizes[-1] == pytest.approx(own / (1e3 if unit == "target_kb" else 1))
    if pr < 1:  # what the paper's rounds leave: (1 - pr/b)^b
        assert plan.aim(1) == max(value, plan.start * (1 - pr / batches) ** batches)


@pytest.mark.parametrize("cost", [float("inf"), float("nan"), -float("inf")])
def test_costs_that_are_no_numbers_leave_the_target_exact(cost) -> None:
    """Only live coordinates are ever chosen, so the count of what is removed is right."""

    def choose(costs: list[Tensor], *others: object) -> list[Tensor]:
        return choose_pruned([torch.full_like(f, cost) for f in costs], *others)

    class OfSuchCosts(alq.ALQ):
        def prune_step(self, *arguments: object) -> None:
            super().prune_step(*arguments, choose=choose)

    for unit, value in (("target_bit", 0.7), ("target_kb", 1.5)):
        weights = network()
        schedule = alq.Schedule(**{unit: value}, pr=0.8, top_k=0.1, epoch_basis=0, epoch_coord=0)
        plan = pruning_plan(schedule, weights, 5)
        size = prune_all(plan, weights, schedule, 5, kind=OfSuchCosts)[-1]
        price = max(coordinate_prices(unit, weights)) / bits_of_one(unit, weights)
        assert value - price < size <= value
        assert all(w.live_total == int(w.mask.sum()) for w in weights)


@pytest.mark.parametrize("cost", [float("inf"), float("nan"), -float("inf")])
def test_a_cost_that_is_not_finite_ranks_last(cost) -> None:
    (dead,) = choose_pruned([torch.tensor([[cost, 5.0, 9.0]])], [torch.ones(1, 3) > 0], [3], 0.7)
    assert dead.tolist() == [[False, True, True]]


def test_a_round_prunes_a_little_at_each_batch() -> None:
    weights = network()
    schedule = alq.Schedule(
        target_bit=3.0, top_k=0.005, epoch_basis=0, epoch_coord=0, epoch_prune=2
    )
    plan = pruning_plan(schedule, weights, 10)
    assert plan.rounds == 1
    quantizer = alq.ALQ(weights)
    sizes = [plan.start]
    for batch in range(20):
        for w in weights:
            w.parameter.grad = torch.randn_like(w.parameter)
        plan.step(quantizer, 1, batch)
        sizes.append(size_in("target_bit", weights))
    shares = [1 - after / before for before, after in itertools.pairwise(sizes)]
    assert all(0.02 < share < 0.05 for share in shares)


def test_a_resumed_run_prunes_the_same() -> None:
    schedule = alq.Schedule(target_bit=1.0, epoch_basis=0, epoch_coord=1)
    results = []
    for steps in (None, 17, 40):
        weights = network()
        plan = pruning_plan(schedule, weights, 10)
        prune_all(plan, weights, schedule, 10, steps)
        results.append([w.mask for w in weights])
    for masks in results[1:]:
        assert all(map(torch.equal, masks, results[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bit": 7.0}, "target_bit 7: the network has 6 bit before any pruning"),
        ({"target_kb": 100.0}, "target_kb 100: the network has 10.88 KB before any pruning"),
        ({"target_bit": 1e-6}, "target_bit 1e-06: not one coordinate would be left"),
        ({"target_kb": 0.0}, "target_kb 0: not one coordinate would be left"),
        ({"target_bit": 1.0, "target_kb": 1.0}, "target_bit 1, target_kb 1: give one"),
        ({"top_k": 0.005}, "top_k 0.005: too few candidates"),
    ],
)
def test_an_impossible_target_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        pruning_plan(alq.Schedule(**options), network(), 10)


@pytest.mark.parametrize(
    ("options", "batches", "message"),
    [
        (
            {"pr": 0.9, "R": 20},
            10,
            r"pr 0.9: of \d+ coordinates not one .* after 20 rounds; use less",
        ),
        ({"pr": 1.0, "R": 1}, 1, r"pr 1.0: of \d+ coordinates not one .* after 1 round; use less"),
        ({"pr": 1e-17, "target_bit": 1.0}, 10, "pr 1e-17: prunes nothing, so target_bit is never"),
    ],
)
def test_a_share_that_leaves_nothing_or_all_is_refused(options, batches, message) -> None:
    with pytest.raises(InputError, match=message):
        pruning_plan(alq.Schedule(**options), network(), batches, rounded=False)


def test_pruning_stops_at_the_coordinate_that_frees_enough() -> None:
    costs = [torch.tensor([[5.0, 1.0], [9.0, 2.0]]), torch.tensor([[3.0, 0.0, 4.0]])]
    masks = [torch.tensor([[True, True], [True, True]]), torch.tensor([[True, False, True]])]
    for budget, count in ((0, 0), (1, 1), (10, 1), (11, 2), (21, 3), (99, 6)):
        first, second = choose_pruned(costs, masks, [4, 2], 1.0, [10, 3], budget)
        order = [first[0, 1], first[1, 1], second[0, 0], second[0, 2], first[0, 0], first[1, 0]]
        assert order == [True] * count + [False] * (6 - count)


@pytest.mark.parametrize("flag", ["--target_bit", "--target_kb"])
def test_the_script_prunes_to_a_target(flag, tmp_path) -> None:
    value = {"--target_bit": 1.5, "--target_kb": 150.0}[flag]
    lenet5.main([
        "--PRETRAIN", "--ALQ", flag, str(value), "--data", str(ROOT / "data"),
        "--model_ori", str(tmp_path / "ori.pth"), "--model", str(tmp_path / "model.pth"),
        *"--val_size 200 --batch_size 50 --epoch_pretrain 1 --epoch_basis 0 --max_bit 3".split(),
        *"--epoch_coord 1 --threads 1".split(),
    ])  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "model.jsonl").read_text().splitlines()]
    (plan,) = [event for event in events if event["event"] == "plan"]
    assert sum(event["event"] == "round" for event in events) == plan["rounds"]
    result = events[-1]
    size = result["bitwidth"] if flag == "--target_bit" else result["storage_bytes"] / 1e3
    assert 0.99 * value < size <= value


@pytest.mark.parametrize("name", ["train_loader", "val_loader"])
@pytest.mark.parametrize("gives, said", [(3, "3"), (7, "more"), (None, "more")])
def test_a_loader_whose_length_does_not_hold_is_refused(name, gives, said) -> None:
    """What a batch prunes follows from the length: a target would be missed without a word.

    None gives batches without end.
    """
    batches = [(torch.randn(4, 64), torch.randint(10, (4,))) for _ in range(5)]

    class Loader:
        def __len__(self) -> int:
            return 5

        def __iter__(self):
            return itertools.islice(itertools.cycle(batches), gives)

    model = nn.Linear(64, 10)
    weights = alq.quantize(model)
    schedule = alq.Schedule(target_bit=1.0, epoch_basis=1, epoch_coord=0, epoch_ste=0)
    loaders = {"train_loader": batches, "val_loader": batches, name: Loader()}
    with pytest.raises(InputError, match=rf"^{name}: its length is 5, but it gave {said} batches"):
        alq.fit(model, weights, **loaders, schedule=schedule, progress=False)


class Items(dict):
    """A batch whose items are attributes, too, as libraries have them."""

    def __getattr__(self, key: str) -> object:
        if key not in self:
            raise AttributeError(key)
        return self[key]


class SameItems(dict):
    """The other way of the same."""

    def __init__(self, **items: object) -> None:
        super().__init__(items)
        self.__dict__ = self


@dataclasses.dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    later: object = dataclasses.field(init=False)  # never set


@pytest.mark.parametrize("kind", [Items, SameItems, Pair])
def test_batches_keep_their_class_and_count_their_samples(kind: type) -> None:
    torch.manual_seed(0)
    batches = [kind(x=torch.randn(n, 64), y=torch.randint(5, (n,))) for n in (8, 2)]
    model = nn.Linear(64, 5)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        assert type(batch) is kind
        return F.cross_entropy(model(batch.x), batch.y)

    weights = alq.quantize(model, max_bit=2)
    result = alq.fit(model, iter(weights), batches, batches, loss, SHORT, progress=False)
    with torch.no_grad():
        sums = sum(loss(model, batch) * len(batch.x) for batch in batches)
    assert result["val_loss"] == pytest.approx(float(sums) / 10)


@pytest.mark.parametrize("kind", [Items, SameItems, Pair, UserDict])
def test_batches_are_moved_whatever_their_class(kind: type) -> None:
    batch = kind(x=torch.randn(8, 64), y=torch.randint(5, (8,)))
    moved = moved_to(batch, torch.device("meta"))
    assert type(moved) is kind and not any(part.is_meta for part in tensors_in(batch))
    parts = list(tensors_in(moved))
    parts += [moved.x, moved.y] if kind is not UserDict else []
    assert len(parts) >= 2 and all(part.is_meta for part in parts)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), "mse", None], ids=str)
def test_a_loss_that_is_no_function_of_model_and_batch_is_refused(loss: object) -> None:
    model = nn.Linear(64, 5)
    batches = [(torch.randn(4, 64), torch.randint(5, (4,)))]
    with pytest.raises(InputError, match=r"^loss: is a .*; give a function \(model, batch\)"):
        alq.fit(model, alq.quantize(model), batches, batches, loss, SHORT, progress=False)
