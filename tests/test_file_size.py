"""Pruning to the size of the smallest file: where inputs come from, what coordinates take."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import alq
import lenet5
from alq.data import mnist, read_mnist
from alq.extras.unit_sources import unit_sources
from alq.files.floats import FLOATS
from alq.method.steps import choose_pruned
from alq.method.weight import prune
from alq.training.file_size import BITWIDTH, FileSize, number_bytes
from alq.training.pruning import PruneToFile, pruning_plan
from tests.test_constant_units import NETWORKS, inputs_for, pruned_units, warm

ROOT = Path(__file__).resolve().parent.parent


def sources_of(model: nn.Module, x: Tensor, structures: str | None = None) -> list[list[int]]:
    weights = alq.quantize(model.eval(), structures, max_bit=1)
    return [found.tolist() for found in unit_sources(model, weights, lambda: model(x))]


# ---------------------------------------------------------------------------- sources


def test_the_sources_of_lenet5() -> None:
    found = sources_of(lenet5.LeNet5(), torch.randn(3, 1, 28, 28))
    assert found[0] == [-1]  # the picture
    assert found[1] == list(range(20))
    assert found[2] == [20 + c // 16 for c in range(800)]  # 4 x 4 positions of each channel
    assert found[3] == [70 + c for c in range(500)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", [[-1] * 9, list(range(12))]),
        ("padded", [[-1], [-1] * 6, list(range(6, 12))]),
        ("no biases", [[-1] * 9, [-1] * 12, list(range(12, 18))]),
        ("norm of all", [[-1] * 9, [-1] * 12]),
        ("normalised", [[-1], [-1] * 6, list(range(6, 13)), [13 + c // 4 for c in range(24)]]),
        ("residual", [[-1], list(range(6)), list(range(6, 14)), [-1] * 6]),
    ],
)
def test_the_sources_of_networks_of_other_kinds(name, expected) -> None:
    assert sources_of(NETWORKS[name](), inputs_for(name, 0)) == expected


def test_what_is_added_to_the_picture_has_no_source() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x + self.first(x))

    assert sources_of(Skips(), torch.randn(5, 6)) == [[-1] * 6, [-1] * 6]


def test_a_layer_that_runs_twice_has_no_sources() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 2))
    assert sources_of(model, torch.randn(5, 6))[0] == [-1] * 6


def test_the_model_is_left_as_it_was() -> None:
    model, x = NETWORKS["normalised"]().train(), inputs_for("normalised", 0)
    weights = alq.quantize(model, max_bit=2)
    before = copy.deepcopy(model.state_dict())
    unit_sources(model, weights, lambda: model(x))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("floats", ["3bit", "6bit", "float16", "float32"])
def test_the_estimate_is_near_the_file(share, floats, tmp_path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(12, 20, 5), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), nn.Linear(320, 90), nn.ReLU(), nn.Linear(90, 10),
    )  # fmt: skip
    x = torch.randn(4, 1, 28, 28)
    structures = ["channelwise", "channelwise", "subchannelwise", "subchannelwise"]
    weights = pruned_units(model, share, share / 2, structures)
    sources = unit_sources(model, weights, lambda: model(x))
    size = FileSize.of(model, weights, FLOATS[floats]).knowing(sources).kb(weights)
    alq.fold_constant_units(model, weights, x)
    alq.round_floats(model, weights, floats)
    alq.save_packed(tmp_path / "net.alq", model, weights, floats, coded=True)
    assert 1e3 * size == pytest.approx((tmp_path / "net.alq").stat().st_size, rel=0.04, abs=40)


def counted(weights: list, sources: list[Tensor], number: float, bias: float) -> float:
    """Return the bytes of signs, coordinates and biases, in loops; dead groups' among them."""
    alive = [bool(row.any()) for w in weights for row in w.mask.view(w.grouping.by_outputs[0], -1)]
    total = sum(alive) * bias
    for weight, source in zip(weights, sources, strict=True):
        inputs = weight.grouping.inputs_of()
        for group, bases in enumerate(weight.mask.sum(1).tolist()):
            units = [int(source[c]) for c in inputs[group]]
            signs = sum(unit < 0 or alive[unit] for unit in units)
            total += bases * (signs / 8 + number)
    return total


@pytest.mark.parametrize("structure", ["subchannelwise", "channelwise", "pixelwise", "kernelwise"])
def test_worth_is_what_brute_force_counts(structure) -> None:
    """A unit's coordinates are together worth the bytes that go with it."""
    torch.manual_seed(2)
    model = NETWORKS["convolutions"]()
    weights = pruned_units(model, 0.2, 0.3, [*[structure] * 2, *["subchannelwise"] * 2])
    x = inputs_for("convolutions", 0)
    sources = unit_sources(model, weights, lambda: model(x))
    file = FileSize(0.0, 0.5, 0.25, sources)
    freed, worth = file.prices(weights)
    before = counted(weights, sources, 0.5, 0.25)
    for layer, weight in enumerate(weights[:-1]):
        outputs, state = weight.grouping.by_outputs[0], weight.state_dict()
        per_unit = (worth[layer] * weight.mask).view(outputs, -1).sum(1)
        for unit in range(outputs):
            gone = weight.mask.clone().view(outputs, -1)
            gone[torch.arange(outputs) != unit] = False
            if not gone.any():
                continue
            prune([weight], [gone.view_as(weight.mask)])
            lost = before - counted(weights, sources, 0.5, 0.25) + BITWIDTH * int(gone.sum())
            assert float(per_unit[unit]) == pytest.approx(lost, rel=1e-5)
            weight.load_state_dict(state)
    for weight, bits, price in zip(weights, freed, worth, strict=True):
        assert bits.shape == price.shape == (weight.G, 1) and not bits.is_floating_point()
        assert (bits / 8 <= price + 0.07).all()


def test_coded_numbers_take_less_than_their_bits() -> None:
    assert all(0 < number_bytes(bits) < bits / 8 for bits in (*range(3, 9), 16, 32))


# ---------------------------------------------------------------------------- choosing


def test_prices_of_groups_are_as_those_of_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = [torch.rand(6, 3, generator=generator), torch.rand(4, 2, generator=generator)]
    masks = [cost > 0.2 for cost in costs]
    live = [int(mask.sum()) for mask in masks]
    for budget in (0, 1, 30, 77, 10**6):
        wide = [
            torch.full((len(mask), 1), price) for mask, price in zip(masks, (7, 20), strict=True)
        ]
        a = choose_pruned(costs, masks, live, 1.0, [7, 20], budget)
        b = choose_pruned(costs, masks, live, 1.0, wide, budget)
        assert all(map(torch.equal, a, b))


def test_groups_of_other_prices_stop_at_the_budget() -> None:
    costs, masks = [torch.tensor([[1.0], [2.0], [3.0]])], [torch.ones(3, 1) > 0]
    prices = [torch.tensor([[5], [50], [5]])]
    (gone,) = choose_pruned(costs, masks, [3], 1.0, prices, 6)
    assert gone.flatten().tolist() == [True, True, False]


def test_cost_per_byte_prunes_what_takes_more_first() -> None:
    """Two layers whose coordinates cost the loss about the same; one's take more bytes."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(80, 4, bias=False))
    torch.manual_seed(0)
    weights = alq.quantize(model, "subchannelwise", 1, 1)
    worth = [
        weight.alpha.new_full((weight.G, 1), size)
        for weight, size in zip(weights, (5, 14), strict=True)
    ]
    for given, layer in ((None, 0), (worth, 1)):
        quantizer = alq.ALQ(weights)
        for k, weight in enumerate(weights):
            f = [1.0, 1.5][k]  # modelled cost of each coordinate: p_a = 0, h_a/2 * alpha^2
            alpha, mask = torch.full_like(weight.alpha, f**0.5), torch.ones_like(weight.mask)
            weight.set_form(weight.codes, alpha, mask)
            weight.parameter.grad = torch.zeros_like(weight.parameter)
            state = quantizer.state[weight.parameter]
            big = torch.full_like(weight.alpha, 1e6)
            state["alpha_moments"] = [torch.zeros_like(big), big.clone(), big.clone()]
        quantizer.prune_step(1.0, 0.25, worth=given)
        assert [weight.live_total for weight in weights][layer] == 2


@pytest.mark.parametrize("name", ["convolutions", "normalised", "residual"])
def test_pruning_ends_at_the_size(name) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name](), inputs_for(name, 0)
    warm(model, x)
    weights = alq.quantize(model, max_bit=3)
    file = FileSize.of(model, weights, 6).knowing(unit_sources(model, weights, lambda: model(x)))
    aim = file.fixed / 1e3 + 0.4 * (file.kb(weights) - file.fixed / 1e3)
    schedule = alq.Schedule(file_kb=aim, pr=0.5, epoch_basis=0, epoch_coord=0)
    plan = pruning_plan(schedule, weights, 10, file=file)
    assert isinstance(plan, PruneToFile) and "file_kb" in str(plan)
    quantizer = alq.ALQ(weights, generator=torch.Generator().manual_seed(0))
    for number in range(1, plan.rounds + 1):
        for batch in range(10):
            for weight in weights:
                weight.parameter.grad = torch.randn_like(weight.parameter)
            plan.step(quantizer, number, batch)
        # A unit that lost its last bit took more with it than was counted on.
        assert 0.85 * plan.aim(number) <= file.kb(weights) <= 1.01 * plan.aim(number)


# ---------------------------------------------------------------------------- whole runs


def test_fit_prunes_to_the_size_of_the_file(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 5))
    x = torch.randn(40, 30)
    batches = [(part, part[:, :5].argmax(1)) for part in x.split(8)]
    weights = alq.quantize(model, max_bit=2)
    schedule = alq.Schedule(
        file_kb=0.5, pr=0.6, epoch_basis=1, epoch_coord=1, epoch_ste=1, epoch_post_coord=1
    )
    alq.fit(model, weights, batches, batches, schedule=schedule, progress=False)
    alq.fold_constant_units(model, weights, x)
    alq.round_floats(model, weights, "6bit")
    alq.save_packed(tmp_path / "net.alq", model, weights, "6bit", coded=True)
    assert 400 < (tmp_path / "net.alq").stat().st_size < 540


def test_the_flag_gives_a_file_of_this_size(tmp_path, capsys, monkeypatch) -> None:
    sets = read_mnist(ROOT / "data")
    few = [[part[:300] for part in pair] for pair in sets]
    monkeypatch.setattr(mnist, "read_mnist", lambda root, dataset: few)
    files = ["--model_ori", f"{tmp_path}/ori.pth", "--model", f"{tmp_path}/net.pth"]
    short = "--val_size 44 --epoch_pretrain 1 --epoch_basis 1 --epoch_coord 1 --pr 0.8 --max_bit 2"
    post = "--epoch_ste 1 --epoch_post_coord 1 --batch_size 32"
    small = "--file_kb 6 --coded --fold --floats 6bit"
    flags = f"--PRETRAIN --ALQ --POSTTRAIN --threads 1 {short} {post} {small}".split()
    lenet5.main([*flags, *files])
    assert "file_kb 6 from" in capsys.readouterr().out
    logged = json.loads((tmp_path / "net.jsonl").read_text().splitlines()[-1])
    size = (tmp_path / "net_posttrained.alq").stat().st_size
    assert 4800 < size == logged["file_bytes"] < 6300
