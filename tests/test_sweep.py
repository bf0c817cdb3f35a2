"""The sweep of rates: its arms differ in their steps alone, and its logs are read as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import alq
import arms
import changed
import short_runs
import sweep
import sweep_report
from alq.data import mnist, read_mnist
from small_networks import SMALL_NETWORKS
from sweep import ARMS, RATES, Cell

ROOT = Path(__file__).resolve().parent.parent
SETTING = ("lenet5", "mnist", 1)


def write_log(logs: Path, cell: Cell, *accuracies: float, failed: str | None = None) -> None:
    """Write the log of a run with these validation accuracies; its test accuracy is 1 below."""
    events = [{"event": "start"}]
    for number, accuracy in enumerate(accuracies, 1):
        loss = (100 - accuracy) / 10 / number
        events.append({"event": "epoch", "epoch": number, "loss": loss, "val_accuracy": accuracy})
    last = accuracies[-1]
    top1 = None if failed else last - 1
    events.append({"event": "result", "failed": failed, "val_accuracy": last, "top1": top1})
    logs.mkdir(exist_ok=True)
    text = "".join(json.dumps(event) + "\n" for event in events)
    (logs / f"{cell.name}.jsonl").write_text(text)


@pytest.fixture
def logs(tmp_path) -> Path:
    """Logs of one setting at all rates: by arm, another rate is best, and the highest one fails."""
    folder = tmp_path / "sweep"
    for number, arm in enumerate(ARMS):
        for k, rate in enumerate(RATES):
            end = 98 - abs(k - number - 1)
            failed = "at 10.00 % after 2 epochs" if rate == RATES[-1] else None
            write_log(folder, Cell(*SETTING, arm, rate), *[90.0] * 11, end, failed=failed)
    return folder


# ---------------------------------------------------------------------------- the arms


@pytest.mark.parametrize("net", SMALL_NETWORKS)
def test_arms_differ_in_their_steps_alone(net) -> None:
    trainings = {}
    for arm in ARMS:
        torch.manual_seed(0)
        model = SMALL_NETWORKS[net].recipe.network()
        made = Cell(net, "mnist", 2, arm, 3e-3).make_arm()
        full = [p.detach().clone() for p in model.parameters() if p.dim() > 1]
        training = arms.training_of("alq", made, SMALL_NETWORKS[net], model, 0, 10)
        trainings[arm] = training, made
        assert [epoch.lr for epoch in made.epochs[:10]] == pytest.approx(
            [3e-3 * 0.8**k for k in range(1, 11)]
        )
        assert len(made.epochs) == sweep.EPOCHS
        for weight, w in zip(training.weights, full, strict=True):
            w0 = training.optimizers[0].state[weight.parameter]["w0"]
            assert w0 is None if arm == "alq" else torch.equal(w0, weight.grouping.to_groups(w))
    first, *others = (training for training, _ in trainings.values())
    for other in others:  # one start: the sketch, with the same biases
        for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)
    kinds = {arm: {epoch.kind for epoch in made.epochs} for arm, (_, made) in trainings.items()}
    assert kinds == {"reconstruction": {"ste"}, "ste": {"ste"}, "alq": {"basis", "coordinate"}}
    quantizers = [type(training.optimizers[0]) for training, _ in trainings.values()]
    assert quantizers == [changed.Reconstruction, alq.ALQ, alq.ALQ]


def test_the_coordinate_epochs_have_a_rate_of_their_own() -> None:
    cell = Cell(*SETTING, "alq", 3e-2)
    last = cell.make_arm().epochs[-sweep.COORDINATE_EPOCHS :]
    assert [(e.kind, e.lr) for e in last] == [
        ("coordinate", pytest.approx(sweep.COORDINATE * 0.8**k)) for k in (1, 2)
    ]
    none = replace(cell, coordinate=0.0)
    assert {epoch.kind for epoch in none.make_arm().epochs} == {"basis"}
    assert len(none.make_arm().epochs) == sweep.EPOCHS and none.name != cell.name


def test_a_step_of_the_reconstruction_arm_is_a_sketch_of_the_moved_copy() -> None:
    """It does not ask what an error costs; the loss-aware step does, and moves the copy alike."""
    found = {}
    for arm in ("reconstruction", "ste"):
        torch.manual_seed(0)
        model = SMALL_NETWORKS["lenet5"].recipe.network()
        made = Cell(*SETTING, arm, 3e-3).make_arm()
        training = arms.training_of("alq", made, SMALL_NETWORKS["lenet5"], model, 0, 10)
        x, y = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
        F.cross_entropy(model(x), y).backward()
        training.steps["ste"]()
        weight = training.weights[1]
        w0 = training.optimizers[0].state[weight.parameter]["w0"]
        found[arm] = w0.clone(), weight.w_hat().clone()
        if arm == "reconstruction":
            groups = weight.grouping.to_groups(weight.w_hat())
            nearest = w0.sign() * w0.abs().mean(1, keepdim=True)
            torch.testing.assert_close(groups, nearest)
    torch.testing.assert_close(found["ste"][0], found["reconstruction"][0])
    assert not torch.allclose(found["ste"][1], found["reconstruction"][1])


# ---------------------------------------------------------------------------- the choice


def test_the_best_rate_is_chosen_on_validation_never_on_the_test_set(logs) -> None:
    for number, arm in enumerate(ARMS):
        assert sweep_report.best(SETTING, arm, logs).rate == RATES[number + 1]
    cell = Cell(*SETTING, "ste", RATES[5])
    log = logs / f"{cell.name}.jsonl"
    log.write_text(log.read_text().replace('"top1": 94', '"top1": 100'))
    assert cell.result(logs)["top1"] == 100
    assert sweep_report.best(SETTING, "ste", logs).rate == RATES[2]


def test_a_failed_run_is_never_the_best(logs) -> None:
    cell = Cell(*SETTING, "ste", RATES[-1])
    write_log(logs, cell, 99.9, failed="the loss is not finite")
    assert sweep_report.best(SETTING, "ste", logs).rate == RATES[2]
    for rate in RATES:
        write_log(logs, replace(cell, rate=rate), 99.9, failed="the loss is not finite")
    assert sweep_report.best(SETTING, "ste", logs) is None


def test_no_best_rate_before_all_rates_are_done(logs) -> None:
    (logs / f"{Cell(*SETTING, 'ste', RATES[0]).name}.jsonl").unlink()
    assert sweep_report.best(SETTING, "ste", logs) is None
    assert list(sweep_report.settings(logs)) == []


def test_while_the_highest_rate_is_the_best_higher_ones_are_tried(logs) -> None:
    flags = ["plan", "--out", str(logs), "--net", "lenet5", "--dataset", "mnist", "--bits", "1"]
    args = sweep.parse(flags)
    best = Cell(*SETTING, "alq", RATES[-1])
    for rate in (*sweep.HIGHER, 0.0):
        write_log(logs, best, *[90.0] * 11, 98.0 + best.rate)
        to_do = [cell for cell in sweep.planned(args) if cell.result(logs) is None]
        higher = [cell for cell in to_do if cell.arm == "alq" and not cell.seed]
        higher = [cell for cell in higher if cell.coordinate == sweep.COORDINATE]
        if rate:
            assert [cell.rate for cell in higher] == [rate]
            assert sweep_report.best(SETTING, "alq", logs) is None
            best = higher[0]
    assert not higher and sweep_report.best(SETTING, "alq", logs) == best


def test_seeds_follow_the_best_rates_and_a_killed_run_counts_for_nothing(logs) -> None:
    args = sweep.parse(["plan", "--out", str(logs), "--net", "lenet5", "--dataset", "mnist"])
    later = [cell for cell in sweep.planned(args) if cell.seed]
    assert {(cell.arm, cell.rate) for cell in later} == {
        (arm, RATES[number + 1]) for number, arm in enumerate(ARMS)
    }
    assert len(later) == 2 * len(ARMS)  # all of 1 bit, as 2 bits have no best rate yet
    write_log(logs, later[0], 90.0)
    log = logs / f"{later[0].name}.jsonl"
    assert later[0].result(logs)["val_accuracy"] == 90.0
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    assert later[0].result(logs) is None


def test_tables_say_what_the_logs_say(logs) -> None:
    rows = sweep_report.rates_table(logs).splitlines()[2:]
    assert len(rows) == len(ARMS)
    assert "| 97.00 | **98.00** | 97.00 | 96.00 | 95.00 | 94.00 | fails |" in rows[0]
    write_log(logs, Cell(*SETTING, "reconstruction", RATES[1], seed=1), *[90.0] * 11, 96.0)
    faster_at_first = Cell(*SETTING, "reconstruction", RATES[3])
    write_log(logs, faster_at_first, 92.0, *[90.0] * 10, 96.0)
    row = sweep_report.best_table(logs).splitlines()[2]
    span = f"3: {RATES[0]:g} to {RATES[2]:g}"
    losses = "0.8000 | 1.0000 | 0.3333 | 0.0250"
    assert f"| {RATES[1]:g} | {losses} | 96.00 ± 1.41 | 2 | {span} |" in row


def test_other_rates_of_the_coordinate_epochs_stand_beside_the_sweeps_own(logs) -> None:
    assert sweep_report.coordinate_table(logs) == ""
    best = sweep_report.best(SETTING, "alq", logs)
    for number, rate in enumerate(sweep.COORDINATES):
        write_log(logs, replace(best, coordinate=rate), *[90.0] * 11, 95.0 + number)
    head, _, row = sweep_report.coordinate_table(logs).splitlines()
    assert head == "| setting | basis to the end | 3e-05 | 0.0001 | 0.0003 | 0.001 |"
    assert row == "| LeNet5, MNIST, 1 bit | 95.00 | 96.00 | 98.00 | 97.00 | 98.00 |"
    chosen = sweep_report.best(SETTING, "alq", logs)
    assert chosen == best  # they are not among what the best rate is chosen from


# ---------------------------------------------------------------------------- a run


@pytest.fixture
def few(tmp_path, monkeypatch) -> list[str]:
    """Flags for runs on 2 batches of MNIST, one epoch of pretraining."""
    train, test = read_mnist(ROOT / "data")
    small = tuple([part[:count] for part in pair] for pair, count in ((train, 344), (test, 50)))
    monkeypatch.setattr(mnist, "read_mnist", lambda root, dataset="mnist": small)
    monkeypatch.setattr(
        short_runs, "PRETRAIN", "--PRETRAIN --epoch_pretrain 1 --val_size 88".split()
    )
    monkeypatch.setattr(sweep, "RATES", (3e-3,))
    monkeypatch.setattr(sweep, "MIDDLE_FIRST", (3e-3,))
    monkeypatch.setattr(sweep, "HIGHER", ())
    monkeypatch.setattr(sweep, "EPOCHS", 3)
    short_runs.read_pictures.cache_clear()
    places = ["--out", str(tmp_path / "logs"), "--sources", str(tmp_path / "sources")]
    yield ["run", "--dataset", "mnist", "--bits", "1", "--phase", "rates", *places]
    short_runs.read_pictures.cache_clear()


@pytest.mark.parametrize("net", SMALL_NETWORKS)
def test_runs_are_logged_once_and_share_their_start(few, tmp_path, monkeypatch, net) -> None:
    monkeypatch.setattr(sweep, "CHANCE", 0.0)
    sweep.main([*few, "--net", net])
    logs = tmp_path / "logs"
    found = {arm: Cell(net, "mnist", 1, arm, 3e-3).events(logs) for arm in ARMS}
    assert all(events[-1]["failed"] is None for events in found.values())
    for events in found.values():
        assert [event["event"] for event in events] == [
            "start", "before", *["epoch"] * 3, "result"
        ]  # fmt: skip
        assert events[-1]["top1"] is not None and events[-1]["bitwidth"] == pytest.approx(1)
        first, second = found["ste"][0], events[0]
        alike = {"arm", "time"}
        assert all(first[key] == second[key] for key in first if key not in alike)
        assert events[1]["val_loss"] == found["ste"][1]["val_loss"]  # all start at one sketch
    before = {log: log.stat().st_mtime_ns for log in logs.glob("*.jsonl")}
    assert len(before) == 4  # with the full-precision network's
    sweep.main([*few, "--net", net])
    assert before == {log: log.stat().st_mtime_ns for log in logs.glob("*.jsonl")}


@pytest.mark.parametrize(
    "rate, why", [(1e3, "after 2 epochs"), (1e30, "finite")], ids=["chance", "not finite"]
)
def test_a_run_that_does_not_train_is_stopped_and_marked(few, tmp_path, monkeypatch, rate, why):
    monkeypatch.setattr(sweep, "RATES", (rate,))
    monkeypatch.setattr(sweep, "MIDDLE_FIRST", (rate,))
    monkeypatch.setattr(sweep, "CHANCE", 50.0)
    sweep.main([*few, "--net", "lenet5"])
    for arm in ARMS:
        result = Cell(*SETTING, arm, rate).result(tmp_path / "logs")
        assert why in result["failed"] and result["top1"] is None and result["epochs"] < 3


def test_the_published_sweep_was_run_as_the_script_says() -> None:
    published = ROOT / sweep.LOGS
    for setting in sweep_report.settings(published):
        for arm in ARMS:
            for cell in sweep.rates_of(Cell(*setting, arm, RATES[0]), published):
                start, *_ = cell.events(published)
                assert start["flags"]["train_size"] == sweep.TRAIN_SIZE
                assert {key: start[key] for key in vars(cell)} == vars(cell)
