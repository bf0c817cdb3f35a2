"""The ablations' changed arithmetic does what it says, and every claim's command runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ablations
import alq
import arms
import changed
import lenet5
import short_runs
from alq.data import mnist, read_mnist
from alq.files.checkpoint import load_checkpoint, save_checkpoint
from alq.method.steps import choose_pruned, optimise_bases
from published_runs import result_of
from small_networks import SMALL_NETWORKS

ROOT = Path(__file__).resolve().parent.parent
BATCHES = 10


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> list[str]:
    """Flags for runs on 4 batches of MNIST from the published network."""
    train, test = read_mnist(ROOT / "data")
    content = load_checkpoint(ablations.TRAINED, "lenet5")
    content["val_indices"] = torch.arange(88)
    sources = tmp_path_factory.mktemp("few")
    path = sources / "model_ori.pth"
    for file in (path, sources / f"{short_runs.Start('lenet5', 'mnist', 0).name}.pth"):
        save_checkpoint(file, content)
    small = tuple([part[:count] for part in pair] for pair, count in ((train, 344), (test, 50)))
    patch = pytest.MonkeyPatch()
    patch.setattr(mnist, "read_mnist", lambda root, dataset: small)
    patch.setattr(arms, "TOP_K", 0.5)  # enough candidates at each of so few batches
    rounds = arms.decaying([*arms.ROUND, "prune"], 1) + arms.decaying(["coordinate"], 2)
    patch.setattr(arms, "PRUNING", rounds)
    short_runs.read_pictures.cache_clear()
    yield ["--model_ori", str(path), "--sources", str(sources), "--dataset", "mnist"]
    patch.undo()
    short_runs.read_pictures.cache_clear()


@pytest.mark.parametrize(
    "claim",
    [
        "adaptive", "smooth --arm one_cut", "defects --arm lost_flips", "ridge --arm published",
        "structures",
    ],
)  # fmt: skip
def test_every_claim_runs_and_runs_once(few, tmp_path, claim) -> None:
    flags = [*claim.split(), "--seed", "0", "--out", str(tmp_path), *few]
    ablations.main(flags)
    logs = sorted(tmp_path.glob("mnist_*_seed0.jsonl"))
    assert logs and all(short_runs.finished(log) for log in logs)
    before = [log.stat().st_mtime_ns for log in logs]
    ablations.main(flags)
    assert [log.stat().st_mtime_ns for log in logs] == before
    if claim == "adaptive":
        ends = {
            name: last_point(tmp_path, f"adaptive_{name}") for name in ("uniform", "within_layers")
        }
        assert ends["uniform"]["bitwidth"] == 4.0
        across = last_point(tmp_path, "adaptive_across_layers")
        assert across["bitwidth"] == pytest.approx(ends["within_layers"]["bitwidth"], abs=0.01)


def last_point(logs: Path, name: str) -> dict:
    (events,) = short_runs.seeds_of(logs, f"mnist_{name}")
    return [event for event in events if event["event"] == "point"][-1]


def test_whole_commands_run(few, tmp_path, monkeypatch) -> None:
    name, flags = list(arms.SIZES.items())[-1]
    monkeypatch.setitem(arms.SIZES, name, flags + " --R 1 --top_k 0.5 --val_size 88")
    ablations.main(["size", "--arm", name, "--out", str(tmp_path), *few])
    assert result_of(tmp_path / f"size_{name}.jsonl", "posttrain")


# ---------------------------------------------------------------------------- pruning


def pruned_bits(arm: arms.Arm) -> list[float]:
    """Bits after each round of BATCHES prune steps, by an arm's plan, on gradients at random."""
    torch.manual_seed(0)
    model = lenet5.LeNet5()
    network = SMALL_NETWORKS["lenet5"]
    training = arms.training_of("alq", arm, network, model, 0, BATCHES)
    quantizer, plan, found = training.optimizers[0], arm.plan(BATCHES), []
    for round_number in range(1, arms.ROUNDS + 1):
        for batch in range(BATCHES):
            for weight in training.weights:
                weight.parameter.grad = torch.randn_like(weight.parameter)
            plan.step(quantizer, round_number, batch)
        found.append(alq.average_bitwidth(training.weights))
    return found


@pytest.fixture(scope="module")
def aims() -> list[float]:
    return [6 * (1 - arms.PR / BATCHES) ** (BATCHES * r) for r in range(1, arms.ROUNDS + 1)]


COMPARED = [*arms.adaptive()[:2], *arms.smooth(), *arms.defects(), *arms.ridge()]


@pytest.mark.parametrize("arm", COMPARED, ids=lambda arm: arm.name)
def test_arms_that_are_compared_end_every_round_at_the_same_bits(arm, aims, monkeypatch) -> None:
    """To the largest group's share of the network: 500 of 430 500 weights."""
    monkeypatch.setattr(arms, "TOP_K", 0.1)
    assert pruned_bits(arm) == pytest.approx(aims, abs=0.0013)


def test_one_cut_takes_all_at_the_first_batch() -> None:
    (cut,) = (arm for arm in arms.smooth() if arm.name == "one_cut")
    plan, counted = cut.plan(BATCHES), []

    class Counting(alq.ALQ):
        def prune_step(self, top_k, M_p, prices=None, budget=0) -> None:
            counted.append(budget)

    weights = alq.quantize(lenet5.LeNet5(), *lenet5_groups(), 6)
    for batch in range(BATCHES):
        plan.step(Counting(weights), 1, batch)
    assert counted[0] > 0 and not any(counted[1:])


def lenet5_groups() -> tuple:
    network = SMALL_NETWORKS["lenet5"]
    return network.structure, network.subc


def test_the_published_ridge_is_the_setting_of_that_name() -> None:
    weights = alq.quantize(lenet5.LeNet5(), *lenet5_groups(), 2)
    assert changed.PublishedRidge(weights, lr=1e-3).ridge == 1e-6
    assert alq.ALQ(weights, lr=1e-3).ridge is None


# ---------------------------------------------------------------------------- defects


def layer(seed: int) -> dict[str, torch.Tensor]:
    """w0, p, h (G, n) and alpha, live (G, L) of a random layer."""
    random = torch.Generator().manual_seed(seed)
    w0, p = torch.randn(2, 6, 4, generator=random)
    h = torch.rand(6, 4, generator=random) + 0.5
    alpha = torch.rand(6, 3, generator=random)
    return {"w0": w0, "p": p, "h": h, "alpha": alpha, "live": torch.ones(6, 3, dtype=torch.bool)}


def test_a_lost_flip_changes_the_weights_where_a_coordinate_was_negative() -> None:
    lost_any = False
    for seed in range(30):
        right = optimise_bases(**layer(seed), ridge=1e-6)
        wrong = changed.bases_losing_flips(**layer(seed), ridge=1e-6)
        torch.testing.assert_close(right[1], wrong[1])  # the coordinates are the same
        flipped = (right[0] != wrong[0]).any(1)
        torch.testing.assert_close(right[2][~flipped], wrong[2][~flipped])
        lost_any = lost_any or bool(flipped.any())
        assert not flipped.any() or not torch.allclose(right[2][flipped], wrong[2][flipped])
    assert lost_any


def test_the_wrong_ranking_is_right_while_no_coordinate_is_dead() -> None:
    random = torch.Generator().manual_seed(0)
    costs = [torch.rand(8, 3, generator=random) + 1, torch.rand(5, 2, generator=random) + 1]
    live = [torch.ones_like(f, dtype=torch.bool) for f in costs]
    for a, b in zip(
        choose_pruned(costs, live, [9, 4], 0.5),
        changed.choose_by_wrong_values(costs, live, [9, 4], 0.5),
        strict=True,
    ):
        assert torch.equal(a, b)
    live[0][:4] = False
    right = choose_pruned(costs, live, [9, 4], 0.5)
    wrong = changed.choose_by_wrong_values(costs, live, [9, 4], 0.5)
    assert any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True))
    assert all(not (dead & ~mask).any() for dead, mask in zip(wrong, live, strict=True))


def test_the_wrong_ranking_keeps_to_the_budget() -> None:
    random = torch.Generator().manual_seed(0)
    costs = [torch.rand(8, 3, generator=random) + 1, torch.rand(5, 2, generator=random) + 1]
    live = [torch.ones_like(f, dtype=torch.bool) for f in costs]
    asked = ([24, 10], 1.0, [3, 5], 40)
    right = choose_pruned(costs, live, *asked)
    wrong = changed.choose_by_wrong_values(costs, live, *asked)
    assert all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))  # none is dead yet
    live[0][:4] = False
    wrong = changed.choose_by_wrong_values(costs, live, [12, 10], *asked[1:])
    assert 40 <= sum(int(x.sum()) * price for x, price in zip(wrong, (3, 5), strict=True)) < 45


def test_uniform_cuts_every_group_to_its_costliest() -> None:
    f = torch.tensor([[3.0, 1.0, 2.0], [1.0, 9.0, 5.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert torch.equal(changed.cheapest(f, mask, 1, 2 / 3), expected)
