"""The ablations' changed arithmetic does what it says, and every claim's command runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ablations
import arms
import changed
from alq.data import mnist, read_mnist
from alq.files.checkpoint import load_checkpoint, save_checkpoint
from alq.method.steps import choose_pruned, optimise_bases

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> list[str]:
    """Flags for runs on 4 batches of MNIST from the published network."""
    train, test = read_mnist(ROOT / "data")
    content = load_checkpoint(ablations.TRAINED, "lenet5")
    content["val_indices"] = torch.arange(88)
    path = tmp_path_factory.mktemp("few") / "model_ori.pth"
    save_checkpoint(path, content)
    small = tuple([part[:count] for part in pair] for pair, count in ((train, 344), (test, 50)))
    patch = pytest.MonkeyPatch()
    patch.setattr(mnist, "read_mnist", lambda root, dataset: small)
    patch.setattr(arms, "TOP_K", 0.5)  # enough candidates at each of so few batches
    rounds = arms.decaying([*arms.ROUND, "prune"], 1) + arms.decaying(["basis"], 2)
    patch.setattr(arms, "PRUNING", rounds)
    yield ["--model_ori", str(path), "--threads", "1"]
    patch.undo()


def events(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    "claim",
    ["loss_aware", "adaptive", "smooth --arm one_cut", "defects --arm lost_flips", "structures"],
)
def test_every_claim_runs_and_runs_once(few, tmp_path, claim) -> None:
    flags = [*claim.split(), "--out", str(tmp_path), *few]
    ablations.main(flags)
    logs = sorted(tmp_path.glob("*.jsonl"))
    assert logs and all(ablations.finished(log) for log in logs)
    if claim != "structures":
        before = [log.stat().st_mtime_ns for log in logs]
        ablations.main(flags)
        assert [log.stat().st_mtime_ns for log in logs] == before
    if claim == "adaptive":
        last = [e for e in events(tmp_path / "adaptive_uniform.jsonl") if e["event"] == "epoch"][-1]
        assert set(last["bitwidths"].values()) == {4.0}


@pytest.mark.parametrize("claim", ["size", "recipe"])
def test_commands_run(few, tmp_path, monkeypatch, claim) -> None:
    name, flags = list(arms.COMMANDS[claim].items())[-1]
    monkeypatch.setitem(arms.COMMANDS[claim], name, flags + " --R 1 --top_k 0.5 --val_size 88")
    ablations.main([claim, "--arm", name, "--out", str(tmp_path), *few])
    assert ablations.finished(tmp_path / f"{claim}_{name}.jsonl")


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


def test_uniform_cuts_every_group_to_its_costliest() -> None:
    f = torch.tensor([[3.0, 1.0, 2.0], [1.0, 9.0, 5.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert torch.equal(changed.cheapest(f, mask, 1, 2 / 3), expected)
