"""What shows a run while it goes on: the time left, and its numbers for TensorBoard."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import alq
import lenet5
from alq.errors import InputError
from alq.files.checkpoint import load_checkpoint
from alq.files.scalars import Scalars
from alq.training.progress import RECENT, Progress
from alq.training.schedule import Epoch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "published" / "demo" / "lenet5_seed0.jsonl"
SCRIPT = (
    "--val_size 100 --batch_size 100 --epoch_pretrain 1 --R 1 --epoch_basis 1 --epoch_coord 0 "
    "--epoch_ste 1 --epoch_post_coord 0 --top_k 0.5 --max_bit 2 --threads 1"
).split()
SHORT = alq.Schedule(
    R=2, epoch_basis=1, epoch_coord=1, pr=0.5, top_k=0.5, epoch_ste=1, epoch_post_coord=1
)


def fit(**options: object) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(4, 16, 6)]
    weights = alq.quantize(model, max_bit=2)
    return alq.fit(model, weights, batches, batches, schedule=SHORT, **options)


# ---------------------------------------------------------------------------- the time left


def epochs(*kinds: str) -> list[Epoch]:
    return [Epoch(kind, 0.1) for kind in kinds]


def test_nothing_is_said_before_an_epoch_of_each_kind_or_one_like_it_was_seen() -> None:
    progress = Progress(False)
    progress.stages = {
        "pretrain": epochs("pretrain", "pretrain"),
        "alq": epochs("basis", "coordinate", "prune"),
        "posttrain": epochs("ste", "coordinate"),
    }
    assert progress.left("pretrain", progress.stages["pretrain"]) == ""
    progress.note(Epoch("pretrain", 0.1), 60)
    assert progress.left("pretrain", epochs("pretrain")) == "left: stage 01:00"
    assert progress.left("alq", progress.stages["alq"]) == ""
    progress.note(Epoch("basis", 0.1), 100)
    progress.note(Epoch("coordinate", 0.1), 50)  # like which pruning is taken to be
    assert progress.left("alq", epochs("prune")) == "left: stage 00:50, all 03:20"
    progress.note(Epoch("ste", 0.1), 3600)
    assert progress.left("posttrain", epochs("ste", "coordinate")) == "left: stage 1:00:50"


def test_an_epoch_lasts_as_long_as_the_last_ones_of_its_kind() -> None:
    progress = Progress(False)
    for seconds in (500, *[10] * RECENT, 90):  # the first compiles, the last was disturbed
        progress.note(Epoch("basis", 0.1), seconds)
    assert progress.left("alq", epochs("basis", "basis")) == "left: stage 00:20"


def test_fit_says_what_will_happen_and_shows_the_time_left(capsys, monkeypatch) -> None:
    fit(progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown: list[str] = []
    note = Progress.left
    monkeypatch.setattr(Progress, "left", lambda *given: shown.append(note(*given)) or shown[-1])
    fit()
    out, err = capsys.readouterr()
    assert out.startswith("epochs: alq 6, posttrain 2\n2 rounds at pr 0.5: ")
    assert shown[:2] == ["", ""] and len(shown) == 8
    assert all(", all " in text for text in shown[3:6])
    assert "left: stage " in err


# ---------------------------------------------------------------------------- TensorBoard


class Writer:
    """What SummaryWriter is asked for, kept as {folder: [(tag, step, value)]}."""

    points: ClassVar[dict[str, list[tuple]]] = {}

    def __init__(self, folder: str, purge_step: int) -> None:
        own = self.points.setdefault(Path(folder).name, [])
        own[:] = [point for point in own if point[1] < purge_step]  # as TensorBoard does
        self.own = own

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.own.append((tag, step, value))

    def flush(self) -> None:
        pass

    close = flush


@pytest.fixture
def points(monkeypatch):
    """What stand-in writers hold, by run, tag and step."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "points", {})

    def found(run: str, tag: str) -> list[tuple]:
        return [(step, value) for name, step, value in Writer.points[run] if name == tag]

    return found


@pytest.fixture
def real_points(tmp_path):
    """What TensorBoard itself shows of `tmp_path`, likewise."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def found(run: str, tag: str) -> list[tuple]:
        shown = module.EventAccumulator(str(tmp_path / run)).Reload()
        return [(point.step, pytest.approx(point.value)) for point in shown.Scalars(tag)]

    return found


def demo() -> list[dict]:
    return [json.loads(line) for line in DEMO.read_text().splitlines()]


def feed(scalars: Scalars, events: list[dict]) -> None:
    for event in events:
        scalars(**event)


@pytest.mark.parametrize("found", ["points", "real_points"])
def test_a_run_that_was_interrupted_leaves_no_point_twice(found, tmp_path, request) -> None:
    found, events = request.getfixturevalue(found), demo()
    (cut,) = [k for k, e in enumerate(events) if e.get("stage") == "alq" and e.get("epoch") == 2]
    feed(Scalars(tmp_path), events[: cut + 1])
    feed(Scalars(tmp_path), events[cut - 1 :])  # both epochs again
    for stage in ("pretrain", "alq", "posttrain"):
        own = [e for e in events if e["event"] == "epoch" and e["stage"] == stage]
        before = [e for e in events if e["event"] == "before" and e["stage"] == stage]
        for key in ("loss", "val_accuracy", "lr", "seconds"):
            first = [(0, e[key]) for e in before if key in e]
            assert [*first, *((e["epoch"], e[key]) for e in own)] == found(stage, key)
    bits = [(e["epoch"], e["bitwidths"]["fc1.weight"]) for e in own]
    assert bits == found("posttrain", "bits/fc1.weight")
    rounds = [e["top1"] for e in events if e["event"] == "round"]
    assert [(2 * k, top1) for k, top1 in enumerate(rounds, 1)] == found("alq", "top1")
    results = [e for e in events if e["event"] == "result"]
    assert [(k, e["seconds"]) for k, e in enumerate(results, 1)] == found("result", "seconds")


def test_fit_writes_the_numbers_of_its_log(points, tmp_path) -> None:
    result = fit(progress=False, log=tmp_path / "a.jsonl", tensorboard=tmp_path / "board")
    events = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (before,) = [e for e in events if e["event"] == "before"]
    own = [e for e in events if e["event"] == "epoch" and e["stage"] == "posttrain"]
    values = [(0, before["val_loss"]), *((e["epoch"], e["val_loss"]) for e in own)]
    assert points("posttrain", "val_loss") == values
    assert points("result", "bitwidth") == [(3, result["bitwidth"])]
    without_log = fit(progress=False, tensorboard=tmp_path / "board")
    assert {**without_log, "seconds": 0} == {**result, "seconds": 0}


def script(folder: Path, *flags: str) -> None:
    files = ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
    lenet5.main([*SCRIPT, *files, "--data", str(ROOT / "data"), *flags])


def test_the_scripts_write_theirs_and_say_what_will_happen(
    sliver, points, tmp_path, capsys
) -> None:
    stages = ("--PRETRAIN", "--ALQ", "--POSTTRAIN")
    script(tmp_path, *stages, "--tensorboard", str(tmp_path / "board"))
    out = capsys.readouterr().out
    assert out.startswith("epochs: pretrain 1, alq 2, posttrain 1\n--ALQ, 1 round at pr 0.8: ")
    events = [json.loads(line) for line in (tmp_path / "model.jsonl").read_text().splitlines()]
    own = [e for e in events if e["event"] == "epoch" and e["stage"] == "alq"]
    assert points("alq", "loss") == [(1, own[0]["loss"]), (2, own[1]["loss"])]
    tops = [e["top1"] for e in events if e["event"] == "result" and e["stage"] != "pretrain"]
    assert points("result", "top1") == [(2, tops[0]), (3, tops[1])]

    (tmp_path / "plain").mkdir()
    script(tmp_path / "plain", *stages)  # and the results hold no trace of it
    small = "model_posttrained.alq"
    assert (tmp_path / small).read_bytes() == (tmp_path / "plain" / small).read_bytes()
    assert "tensorboard" not in load_checkpoint(tmp_path / "model.pth", "lenet5")["flags"]


def test_the_scripts_name_a_missing_package(sliver, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as ended:
        script(tmp_path, "--PRETRAIN", "--tensorboard", str(tmp_path / "board"))
    assert ended.value.code == 2
    assert "--tensorboard: needs the package of that name" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl")) and not list(tmp_path.glob("*.pth"))


def test_a_missing_package_is_named_before_any_work(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"tensorboard: .* pip install tensorboard"):
        fit(progress=False, log=tmp_path / "a.jsonl", tensorboard=tmp_path / "board")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(points, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be written"):
        fit(progress=False, tensorboard=tmp_path / "file")
