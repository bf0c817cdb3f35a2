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
from alq.errors import InputError
from alq.extras.probing import without_bits
from alq.extras.unit_sources import first_call, unit_sources
from alq.files.floats import FLOATS
from alq.method.steps import choose_pruned
from alq.method.weight import prune
from alq.training.file_size import BITWIDTH, FileSize, Sources
from alq.training.plan import pruning_plan
from alq.training.pruning import PruneToFile
from tests.test_constant_units import NETWORKS, inputs_for, pruned_units, warm

ROOT = Path(__file__).resolve().parent.parent


def sources_of(model: nn.Module, x: Tensor, structures: str | None = None) -> list[list[int]]:
    weights = alq.quantize(model.eval(), structures, max_bit=1)
    return [found.tolist() for found in unit_sources(model, weights, ([x], {})).inputs]


# ---------------------------------------------------------------------------- sources


def test_the_sources_of_lenet5() -> None:
    found = sources_of(lenet5.LeNet5(), torch.randn(3, 1, 28, 28))
    assert found[0] == [-1]  # the picture
    assert found[1] == list(range(20))
    assert found[2] == [20 + c // 16 for c in range(800)]  # 4 x 4 positions of each channel
    assert found[3] == [70 + c for c in range(500)]


class Skips(nn.Module):
    """Adds its first layer's output to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


class Branches(Skips):
    """Leaves its second layer out where the first one's sum is a number."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h) if h.sum().isnan() else h


SHARED = nn.Linear(6, 6)
OTHERS = {
    "skips": (Skips, (5, 6), [[-1] * 6, [-1] * 6]),
    "a single sample": (Skips, (1, 6), [[-1] * 6, [-1] * 6]),
    "branches": (Branches, (5, 6), [[-1] * 6, [-1] * 6]),
    "no batch": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), (6,), [[-1] * 6] * 2),
    "pictures without a batch": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3)), (1, 11, 6),
        [[-1], [-1] * 3],
    ),
    "twice": (lambda: nn.Sequential(SHARED, nn.ReLU(), SHARED), (5, 6), [[-1] * 6]),
    "average of padding": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.AvgPool2d(2, padding=1), nn.Conv2d(3, 2, 2)),
        (2, 1, 8, 8), [[-1], [-1] * 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_no_one_unit_has_no_source(name) -> None:
    make, shape, expected = OTHERS[name]
    assert sources_of(make(), torch.randn(shape)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", [[-1] * 9, list(range(12))]),
        ("padded", [[-1], [-1] * 6, list(range(6, 12))]),
        ("padded apart", [[-1], [-1] * 6, list(range(6, 11))]),
        ("no biases", [[-1] * 9, [-1] * 12, list(range(12, 18))]),
        ("norm of all", [[-1] * 9, [-1] * 12]),
        ("normalised", [[-1], [-1] * 6, list(range(6, 13)), [13 + c // 4 for c in range(24)]]),
        ("residual", [[-1], list(range(6)), list(range(6, 14)), [-1] * 6]),
    ],
)
def test_the_sources_of_networks_of_other_kinds(name, expected) -> None:
    assert sources_of(NETWORKS[name](), inputs_for(name, 0)) == expected


class Averages(nn.Module):
    """Keeps a running mean of what it sees, in evaluation too, and drops part of it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.second(self.drop(x))


def test_model_and_random_numbers_are_left_as_they_were() -> None:
    model, x = Averages().train(), torch.randn(5, 6)
    model.norm.eval()
    weights = alq.quantize(model, max_bit=2)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def loss() -> Tensor:
        assert model.train()(x + torch.rand(())).isfinite().all()
        return model(x)

    args, named = first_call(model, loss)
    assert args[0].shape == x.shape and not named
    unit_sources(model, weights, (args, named))
    assert [m.training for m in (model, model.norm, model.drop)] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_does_not_run_on_nan_is_told() -> None:
    class Strict(Skips):
        def forward(self, x: Tensor) -> Tensor:
            assert x.isfinite().all(), "numbers, please"
            return super().forward(x)

    model = Strict()
    weights = alq.quantize(model, max_bit=1)
    with pytest.raises(InputError, match=r"file_kb: .* NaN: numbers, please"):
        unit_sources(model, weights, ([torch.randn(5, 6)], {}))


# ---------------------------------------------------------------------------- bytes


def size_of(model: nn.Module, weights: list, x: Tensor, floats: str = "6bit") -> float:
    """Return the KB that the file is counted to take."""
    file = FileSize.of(model, weights, FLOATS[floats])
    file = file.knowing(unit_sources(model, weights, ([x], {})))
    return file.kb(weights, [weight.mask for weight in weights])


@pytest.mark.parametrize("name", ["lenet5.alq", "lenet5_10kb.alq"])
def test_the_published_files_are_counted_to_one_percent(name, tmp_path) -> None:
    model, x = lenet5.LeNet5(), torch.randn(4, 1, 28, 28)
    weights = alq.load_packed(ROOT / "checkpoints" / "published" / name, model)
    size = size_of(model, weights, x)
    alq.fold_constant_units(model, weights, x)
    alq.round_floats(model, weights, "6bit")
    parts = alq.save_packed(tmp_path / "net.alq", model, weights, "6bit", coded=True)
    assert 1e3 * size == pytest.approx(sum(parts.values()), rel=0.01)


@pytest.mark.parametrize("name", ["normalised", "padded apart", "no biases", "linear"])
def test_networks_of_other_kinds_are_counted(name, tmp_path) -> None:
    torch.manual_seed(3)
    model, x = NETWORKS[name](), inputs_for(name, 0)
    warm(model, x)
    weights = pruned_units(model, 0.5, 0.2)
    size = size_of(model, weights, x)
    alq.fold_constant_units(model, weights, x)
    alq.round_floats(model, weights, "6bit")
    alq.save_packed(tmp_path / "net.alq", model, weights, "6bit", coded=True)
    names = 150  # bytes: with other names than LeNet5's
    assert abs((tmp_path / "net.alq").stat().st_size - 1e3 * size) < names


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
    size = size_of(model, weights, x, floats)
    alq.fold_constant_units(model, weights, x)
    alq.round_floats(model, weights, floats)
    alq.save_packed(tmp_path / "net.alq", model, weights, floats, coded=True)
    assert 1e3 * size == pytest.approx((tmp_path / "net.alq").stat().st_size, rel=0.04, abs=70)


def counted(weights: list, sources: Sources, number: float, bias: float) -> float:
    """Return the bytes of signs, coordinates and biases, in loops over groups and signs."""
    alive, frees = [], []
    for layer, weight in enumerate(weights):
        rows = weight.mask.view(weight.grouping.by_outputs[0], -1)
        alive += [bool(row.any()) for row in rows]
        after = {int(unit) for found in sources.inputs for unit in found if unit >= 0}
        first = len(alive) - len(rows)
        frees += [layer < len(weights) - 1 and first + k in after for k in range(len(rows))]
    total = sum(bias for live, goes in zip(alive, frees, strict=True) if live and goes)
    for weight, source in zip(weights, sources.inputs, strict=True):
        inputs = weight.grouping.inputs_of()
        for group, bases in enumerate(weight.mask.sum(1).tolist()):
            units = [int(source[c]) for c in inputs[group]]
            signs = sum(unit < 0 or alive[unit] for unit in units)
            total += bases * (signs / 8 + number) if signs else 0
    return total


@pytest.mark.parametrize("structure", ["subchannelwise", "channelwise", "pixelwise", "kernelwise"])
def test_worth_is_what_brute_force_counts(structure) -> None:
    """A unit's coordinates are together worth the bytes that go with it."""
    torch.manual_seed(2)
    model = NETWORKS["convolutions"]()
    weights = pruned_units(model, 0.2, 0.3, [*[structure] * 2, *["subchannelwise"] * 2])
    x = inputs_for("convolutions", 0)
    sources = unit_sources(model, weights, ([x], {}))
    file = FileSize(0.0, 0.5, 0.25, sources)
    worth = file.worth(weights, [weight.mask for weight in weights])
    before, compared = counted(weights, sources, 0.5, 0.25), 0
    for layer, weight in enumerate(weights):
        outputs, state = weight.grouping.by_outputs[0], weight.state_dict()
        assert worth[layer].shape == (weight.G, 1)
        per_unit = (worth[layer] * weight.mask).view(outputs, -1).sum(1)
        stored = (file.living(weights, [w.mask for w in weights])[1][layer] > 0).view(outputs, -1)
        for unit in range(outputs):
            gone = weight.mask.clone().view(outputs, -1)
            gone[torch.arange(outputs) != unit] = False
            if not gone.any():
                continue
            coded = int((gone.view(outputs, stored.shape[1], -1).sum(2) * stored).sum())
            prune([weight], [gone.view_as(weight.mask)])
            lost = before - counted(weights, sources, 0.5, 0.25)
            # Groups of later layers that multiply this unit alone lose their coordinates, too.
            alone = lost - float(per_unit[unit]) + BITWIDTH * coded
            assert alone == pytest.approx(0.5 * round(alone / 0.5), abs=1e-4) and alone > -1e-4
            compared += 1
            weight.load_state_dict(state)
    assert compared > 10


# ---------------------------------------------------------------------------- choosing


def test_of_the_signs_behind_a_unit_those_that_stay_count() -> None:
    torch.manual_seed(4)
    model, x = NETWORKS["convolutions"](), inputs_for("convolutions", 0)
    weights = pruned_units(model, 0.2, 0.3)
    file = FileSize(0.0, 0.5, 0.25, unit_sources(model, weights, ([x], {})))
    masks = [weight.mask for weight in weights]
    none, half, all_signs = (file.worth(weights, masks, share) for share in (0.0, 0.5, 1.0))
    for a, b, c in zip(none, half, all_signs, strict=True):
        torch.testing.assert_close(b, (a + c) / 2)
    assert all(bool((c > a).any()) for a, c in zip(none[:-1], all_signs, strict=False))
    assert torch.equal(none[-1], all_signs[-1])  # nothing comes behind the last layer


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


@pytest.mark.parametrize("batches", [1, 3, 20])
@pytest.mark.parametrize("name", ["convolutions", "normalised", "residual", "linear"])
def test_pruning_ends_at_the_size(name, batches) -> None:
    """At the end of each round, but for what a unit takes along that loses its last bit."""
    torch.manual_seed(0)
    model, x = NETWORKS[name](), inputs_for(name, 0)
    warm(model, x)
    weights = alq.quantize(model, max_bit=3)
    masks = [weight.mask for weight in weights]
    file = FileSize.of(model, weights, 6).knowing(unit_sources(model, weights, ([x], {})))
    fixed = file.fixed / 1e3
    value = fixed + 0.4 * (file.kb(weights, masks) - fixed)
    schedule = alq.Schedule(file_kb=value, pr=0.5, epoch_basis=0, epoch_coord=0)
    plan = pruning_plan(schedule, weights, batches, file=file)
    assert isinstance(plan, PruneToFile) and plan.rounds == 2
    quantizer = alq.ALQ(weights, generator=torch.Generator().manual_seed(0))
    for number in range(1, plan.rounds + 1):
        for batch in range(batches):
            for weight in weights:
                weight.parameter.grad = torch.randn_like(weight.parameter)
            plan.step(quantizer, number, batch)
        size = file.kb(weights, [weight.mask for weight in weights])
        assert abs(size - plan.aim(number)) < 0.1 * (plan.aim(number) - fixed) + 0.02
    assert plan.aim(plan.rounds) == value


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
    assert "in the last" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        lenet5.main([*flags, *files, "--resume", "--floats", "8bit"])
    assert "--floats 8bit: " in capsys.readouterr().err
    logged = json.loads((tmp_path / "net.jsonl").read_text().splitlines()[-1])
    size = (tmp_path / "net_posttrained.alq").stat().st_size
    assert 4800 < size == logged["file_bytes"] < 6300


class Text(nn.Module):
    """Takes whole numbers, which folding does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.rest = nn.Sequential(
            nn.Linear(8, 90), nn.ReLU(), nn.Linear(90, 90), nn.ReLU(), nn.Linear(90, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.embedding(x).mean(1))


def test_of_a_network_that_cannot_be_folded_the_whole_file_counts(tmp_path) -> None:
    torch.manual_seed(0)
    model = Text()
    x = torch.randint(20, (16, 5))
    batches = [(part, part[:, 0] % 4) for part in x.split(4)]
    weights = alq.quantize(model, max_bit=1)
    schedule = alq.Schedule(
        file_kb=0.7, pr=1.0, epoch_basis=0, epoch_coord=1, epoch_ste=0, epoch_post_coord=0
    )
    alq.fit(model, weights, batches, batches, schedule=schedule, progress=False)
    assert without_bits(weights[1]).any()  # which a fold would gain by
    with pytest.raises(InputError, match="fold: needs a model that takes a tensor of floats"):
        alq.fold_constant_units(model, weights, x)
    alq.round_floats(model, weights, "6bit")
    alq.save_packed(tmp_path / "net.alq", model, weights, "6bit", coded=True)
    assert 600 < (tmp_path / "net.alq").stat().st_size < 720


def test_what_folding_refuses_is_refused_before_training() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
    batches = [(torch.randn(4, 9), torch.zeros(4, dtype=torch.long))]
    weights = alq.quantize(model, max_bit=2)
    schedule = alq.Schedule(file_kb=0.2)
    with pytest.raises(ZeroDivisionError):  # the loss's own error is not taken for the model's

        def loss(model: nn.Module, batch: tuple) -> Tensor:
            raise ZeroDivisionError

        alq.fit(model, weights, batches, batches, loss, schedule, progress=False)
    alq.quantize_activations(model, 2)
    with pytest.raises(InputError, match="file_kb: needs activations in float"):
        alq.fit(model, weights, batches, batches, schedule=schedule, progress=False)
