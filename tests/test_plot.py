"""`python -m alq plot`: which epochs of a log count, and what is drawn of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import alq
from alq.__main__ import main
from alq.command.plot import DECIMAL, draw, line_style
from alq.errors import InputError
from alq.files.history import History

RUNS = Path(__file__).resolve().parent.parent / "checkpoints" / "published"
SEEDS = [RUNS / f"lenet5_seed{seed}.jsonl" for seed in range(3)]


def epoch(stage: str, number: int, kind: str = "basis", **more: object) -> dict:
    bits = None if stage == "pretrain" else 4.0
    fields = {"loss": 0.5, "train_accuracy": 80.0, "val_loss": 0.4, "val_accuracy": 90.0}
    fields |= {"bitwidth": bits, "bitwidths": {"fc.weight": bits} if bits else {}}
    fields |= {"round": int(stage == "alq"), "kind": kind, **more}
    return {"event": "epoch", "stage": stage, "epoch": number, **fields}


def write_log(path: Path, *events: dict) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def numbers(history: History) -> dict[str, list[int]]:
    found: dict = {}
    for epoch in history.epochs:
        found.setdefault(epoch["stage"], []).append(epoch["epoch"])
    return found


# ---------------------------------------------------------------------------- the epochs


def test_a_stage_that_runs_again_voids_its_last_run_and_what_followed_from_it(tmp_path) -> None:
    start = {"event": "start", "stages": ["PRETRAIN", "ALQ", "POSTTRAIN"]}
    before = {"event": "before", "stage": "posttrain", "val_loss": 0.7, "val_accuracy": 60.0}
    plan = {"event": "plan", "rounds": 1}
    pretraining = [start, epoch("pretrain", 1), epoch("pretrain", 2)]
    rest = [plan, epoch("alq", 1), epoch("alq", 2, "prune"), before, epoch("posttrain", 1)]
    log = tmp_path / "a.jsonl"
    history = History(write_log(log, *pretraining, *rest))
    assert numbers(history) == {"pretrain": [1, 2], "alq": [1, 2], "posttrain": [0, 1]}

    again = [{**start, "stages": ["ALQ"]}, plan, epoch("alq", 1, loss=9.0)]
    history = History(write_log(log, *pretraining, *rest, *again))
    assert numbers(history) == {"pretrain": [1, 2], "alq": [1]}
    assert history.series("loss").tolist() == [[1, 2, 3], [0.5, 0.5, 9.0]]

    resumed = [{**start, "event": "resume"}, epoch("posttrain", 2)]
    history = History(write_log(log, *pretraining, *rest, *resumed))
    assert numbers(history)["posttrain"] == [0, 1, 2]
    history = History(write_log(log, *rest, *rest[:2]))  # alq.fit, into one file
    assert numbers(history) == {"alq": [1]}


def test_what_a_killed_process_left_of_a_line_is_no_event(tmp_path) -> None:
    log = write_log(tmp_path / "a.jsonl", epoch("alq", 1))
    log.write_text(log.read_text() + json.dumps(epoch("alq", 2))[:50])
    assert numbers(History(log)) == {"alq": [1]}


def test_tests_stand_where_round_or_stage_ended(tmp_path) -> None:
    x, accuracies = History(SEEDS[0]).series("test").tolist()
    assert x == [100, 131, 162, 193, 224, 294]
    events = [json.loads(line) for line in SEEDS[0].read_text().splitlines()]
    results = {event["stage"]: event for event in events if event["event"] == "result"}
    assert accuracies[0] == results["pretrain"]["top1_fp"]
    assert accuracies[-1] == results["posttrain"]["top1"]


def test_bits_by_layer_are_those_after_each_round() -> None:
    found = History(SEEDS[0]).bits_by_layer()
    assert list(found) == ["sketch", "1", "2", "3", "4"]
    assert list(found["4"]) == [
        "conv1.weight",
        "conv2.weight",
        "fc1.weight",
        "fc2.weight",
        "network",
    ]
    assert set(found["sketch"].values()) == {6.0} and found["4"]["network"] < 0.35


# ---------------------------------------------------------------------------- the picture


def picture(*logs: Path):
    pytest.importorskip("matplotlib")
    return draw([History(log) for log in logs])


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_one_run_has_its_rounds_and_layers() -> None:
    figure = picture(RUNS / "path_checks" / "resnet34_three_digits.jsonl")
    accuracy, loss, _, layers = figure.axes
    assert texts(accuracy) == ["pretraining", "round 1", "round 2", "post-training"]
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["accuracy (%)", "loss", "bitwidth (bit)", "layer"]
    assert [line.get_label() for line in accuracy.lines] == ["validation", "training", "test"]
    assert len(layers.get_yticks()) == 38  # of 37 layers and the network
    figure.canvas.draw()
    assert layers.get_window_extent().height / 38 > 10 and loss.get_window_extent().height > 100


def test_several_runs_are_compared_stage_by_stage(tmp_path) -> None:
    short = write_log(tmp_path / "short.jsonl", epoch("alq", 1), epoch("alq", 2, "prune"))
    figure = picture(SEEDS[0], short)
    accuracy, *_, layers = figure.axes
    assert [line.get_label() for line in accuracy.lines] == ["lenet5_seed0", "short"]
    assert list(accuracy.lines[1].get_xdata()) == [101, 102]
    assert texts(accuracy) == ["pretraining", "ALQ", "post-training"]
    columns = [label.get_text() for label in layers.get_xticklabels()]
    top1 = json.loads(SEEDS[0].read_text().splitlines()[-1])["top1"]
    assert columns == [f"lenet5_seed0\ntest {top1:.2f} %", "short"]


def test_a_loss_without_accuracies_is_drawn_alone(tmp_path) -> None:
    torch.manual_seed(0)
    model, log = nn.Linear(4, 2), tmp_path / "a.jsonl"
    batches = [(x, x[:, :2]) for x in torch.randn(3, 8, 4)]
    schedule = alq.Schedule(
        R=1, epoch_basis=0, epoch_coord=0, epoch_ste=0, epoch_post_coord=0, top_k=0.5, pr=0.5
    )
    alq.fit(
        model, alq.quantize(model, max_bit=2), batches, batches, schedule=schedule, log=log,
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]), progress=False,
    )  # fmt: skip
    loss, bits, _ = picture(log).axes
    assert loss.get_ylabel() == "loss" and len(loss.lines[0].get_xdata()) == 2  # and before it
    assert len(bits.lines[0].get_xdata()) == 1 and bits.lines[0].get_marker() == "."


@pytest.mark.parametrize("losses", [(-2.0, 3.0), (0.0, 0.0), (1.0, 1.0)])
def test_losses_of_any_sign_and_bits_of_none(losses, tmp_path) -> None:
    events = [epoch("alq", k, val_loss=x, bitwidth=0.0) for k, x in enumerate(losses, 1)]
    log = write_log(tmp_path / "a.jsonl", *events)
    figure = picture(log)
    figure.canvas.draw()
    low, high = figure.axes[1].get_ylim()
    assert low <= min(losses) and max(losses) <= high


def test_lines_differ_without_colours_and_ticks_are_round() -> None:
    looks = {(line_style(k)["linestyle"], line_style(k)["marker"]) for k in range(16)}
    assert len(looks) == 16
    accuracy = picture(*SEEDS).axes[0]
    ticks = [tick.get_text() for tick in accuracy.get_yticklabels()]
    assert 3 <= len(ticks) <= 8
    assert all(any(abs(100 - float(t) - d) < 1e-9 for d in DECIMAL[0]) for t in ticks)


# ---------------------------------------------------------------------------- the command


def test_the_picture_is_beside_the_log_or_where_it_is_asked_for(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "a.jsonl", epoch("alq", 1))
    main(["plot", str(log)])
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    main(["plot", str(log), str(log), "-o", str(tmp_path / "b.svg")])
    assert "<svg" in (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("hello\n", "line 1: no line of a run's log"),
        ('{"event": "start", "stages": ["ALQ"]}\n', "tells of no epoch"),
        ('{"event": "epoch", "stage": "alq"}\n', "line 1: is not as a run logs it"),
        (json.dumps(epoch("alq", 1)) + "\n", "'.jsonl' is no kind of picture"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, capsys, content, message) -> None:
    pytest.importorskip("matplotlib")
    log = tmp_path / "a.jsonl"
    if content is not None:
        log.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["plot", str(log), "-o", str(log)])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and not captured.out and captured.err.count("\n") == 1
    assert message in captured.err
    assert content is None or log.read_text() == content


def test_a_missing_matplotlib_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="plot needs matplotlib: pip install matplotlib"):
        picture(SEEDS[0])
