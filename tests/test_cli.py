"""The script end to end on a sliver of real digits: stages, files, logs, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alq.training.loop
import lenet5
import resnet
from alq.command.flags import MAY_CHANGE
from alq.data.loaders import TensorLoader
from alq.files.checkpoint import save_checkpoint
from alq.training.epoch import evaluate

pytestmark = pytest.mark.usefixtures("sliver")
ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--val_size 100 --batch_size 50 --epoch_pretrain 2 --R 2 --epoch_basis 1 --epoch_coord 1 "
    "--epoch_ste 2 --epoch_post_coord 1 --top_k 0.5 --threads 1"
).split()


def files(folder: Path) -> list[str]:
    return ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]


def run(folder: Path, *flags: str) -> None:
    lenet5.main([*flags, *SHORT, *files(folder), "--data", str(ROOT / "data")])


def run_process(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tests" / "lenet5_on_a_sliver.py", *flags, *SHORT]
    return subprocess.run([*command, *files(folder)], cwd=ROOT, capture_output=True, text=True)


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "model.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def finished(sliver, tmp_path_factory) -> Path:
    """All three stages in one process."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, "--PRETRAIN", "--ALQ", "--POSTTRAIN")
    return folder


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    a, b = load(one), load(other)
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    for x, y in zip(a["weights"], b["weights"], strict=True):
        for key in ("codes", "alpha", "mask"):
            assert torch.equal(x[key], y[key]), (x["name"], key)
    assert torch.equal(a["val_indices"], b["val_indices"])


def test_each_stage_alone_in_its_own_process_gives_the_same_files(finished, tmp_path) -> None:
    for stage in ("--PRETRAIN", "--ALQ", "--POSTTRAIN"):
        done = run_process(tmp_path, stage)
        assert done.returncode == 0, done.stderr
    for name in ("ori.pth", "model.pth", "model_posttrained.pth"):
        assert_equal_checkpoints(finished / name, tmp_path / name)
    assert "published (paper)" in done.stdout and "conv1.weight" in done.stdout


def test_the_log_holds_the_evidence(finished) -> None:
    (start,) = events(finished, "start")
    assert start["flags"]["R"] == 2 and start["seed"] == 0 and start["versions"]["torch"]
    epochs = events(finished, "epoch")
    kinds = [epoch["kind"] for epoch in epochs]
    assert kinds == [
        *["pretrain"] * 2, *["basis", "coordinate", "prune"] * 2, *["ste"] * 2, "coordinate"
    ]  # fmt: skip
    lr = [epoch["lr"] for epoch in epochs]
    assert lr[2:5] == lr[5:8] == pytest.approx([8e-4, 6.4e-4, 6.4e-4])
    assert lr[8:] == pytest.approx([9.5e-4, 1e-3 * 0.95**2, 1e-3 * 0.95**2 * 0.9])
    for epoch in epochs[2:]:
        assert list(epoch["bitwidths"]) == [
            "conv1.weight",
            "conv2.weight",
            "fc1.weight",
            "fc2.weight",
        ]
        assert 0 <= epoch["val_accuracy"] <= 100 and epoch["seconds"] >= 0
    bits = [epoch["bitwidth"] for epoch in epochs if epoch["kind"] == "prune"]
    assert 6 > bits[0] > bits[1] > 0
    results = events(finished, "result")
    assert [result["stage"] for result in results] == ["pretrain", "alq", "posttrain"]
    fields = {
        "event",
        "time",
        "stage",
        "top1_fp",
        "top1",
        "bitwidth",
        "storage_bytes",
        "file_bytes",
    }
    for result in results:
        assert set(result) == fields | {"seconds"}
        assert result["top1_fp"] == results[0]["top1_fp"]
    assert results[0]["top1"] is None and results[0]["bitwidth"] is None
    assert results[2]["bitwidth"] == pytest.approx(bits[1])
    lines = (finished / "model.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "result"


def test_the_checkpoint_holds_what_the_network_computes_with(finished) -> None:
    content = load(finished / "model_posttrained.pth")
    model = lenet5.LeNet5()
    model.load_state_dict(content["model"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = alq.restore(model, content["weights"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert alq.average_bitwidth(weights) == events(finished, "result")[-1]["bitwidth"]


def test_the_split_is_drawn_once(finished) -> None:
    held_out = [load(finished / name)["val_indices"] for name in ("ori.pth", "model.pth")]
    assert torch.equal(*held_out) and len(held_out[0].unique()) == 100


@pytest.mark.parametrize(
    ("stage", "stop_after"), [("pretrain", 1), ("alq", 2), ("alq", 4), ("posttrain", 2)]
)
def test_resume_goes_on_as_if_never_interrupted(finished, tmp_path, monkeypatch, stage, stop_after):
    """Interrupted between two epochs of a stage, the run ends in the same files."""
    begin, count = (
        alq.training.loop.begin_epoch,
        {"alq": 2, "posttrain": 8}.get(stage, 0) + stop_after,
    )

    def interrupted(*args, **kwargs):
        nonlocal count
        if count == 0:
            raise KeyboardInterrupt
        count -= 1
        return begin(*args, **kwargs)

    monkeypatch.setattr(alq.training.loop, "begin_epoch", interrupted)
    stages = ("--PRETRAIN", "--ALQ", "--POSTTRAIN")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *stages)
    assert stop.value.code == 130
    monkeypatch.undo()
    run(tmp_path, *stages, "--resume")
    for name in ("ori.pth", "model.pth", "model_posttrained.pth"):
        assert_equal_checkpoints(finished / name, tmp_path / name)
    assert len(events(tmp_path, "epoch")) == len(events(finished, "epoch"))  # none was run twice
    assert not list(tmp_path.glob("*.resume")) and not list(tmp_path.glob("*.tmp"))


def test_resuming_with_other_flags_is_refused(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(alq.training.loop, "evaluate", interrupt := Interrupt(after=1))
    with pytest.raises(SystemExit):
        run(tmp_path, "--PRETRAIN")
    assert interrupt.calls == 2
    monkeypatch.undo()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--PRETRAIN", "--resume", "--seed", "5")
    assert stop.value.code == 2
    assert "--seed 5: the run to resume had 0" in capsys.readouterr().err


class Interrupt:
    """`evaluate` that is interrupted after some calls."""

    def __init__(self, after: int) -> None:
        self.after, self.calls = after, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return evaluate(*args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ALQ"], "--PRETRAIN makes it"),
        (["--POSTTRAIN"], "--ALQ makes it"),
        ([], "nothing to do"),
        (["--PRETRAIN", "--lr", "0"], "--lr: 0 is out of range; it must be above 0"),
        (["--PRETRAIN", "--R", "two"], "--R: invalid whole number value: 'two'"),
        (["--PRETRAIN", "--max_bit", "9"], "--max_bit: 9 is out of range"),
        (["--PRETRAIN", "--val_size", "300"], "--val_size 300: must leave images"),
        (["--PRETRAIN", "--device", "cuda:77"], "--device: 'cuda:77' cannot be used here"),
        (["--PRETRAIN", "--structure", "rowwise"], "--structure: invalid choice: 'rowwise'"),
    ],
)
def test_bad_input_is_one_line_with_the_flag_and_the_fix(tmp_path, capsys, flags, message) -> None:
    with pytest.raises(SystemExit) as stop:
        lenet5.main([*SHORT, *files(tmp_path), *flags])
    assert stop.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subc", "0", "0", "3", "1"], "fc1.weight: subc 3 does not divide its rows of 800"),
        (["--structure", "pixelwise"], "fc1.weight: structure 'pixelwise' needs a convolution"),
        (["--max_bit", "6", "6"], "max_bit: 2 values for 4 quantized layers"),
        (["--top_k", "0.005"], "top_k 0.005: too few candidates"),
    ],
)
def test_a_request_that_does_not_fit_the_network(
    finished, tmp_path, capsys, flags, message
) -> None:
    (tmp_path / "ori.pth").write_bytes((finished / "ori.pth").read_bytes())
    with pytest.raises(SystemExit) as stop:
        lenet5.main(["--ALQ", *SHORT, *files(tmp_path), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other network"])
def test_a_file_that_is_no_checkpoint_is_refused(finished, tmp_path, capsys, damage) -> None:
    whole = (finished / "ori.pth").read_bytes()
    path = tmp_path / "ori.pth"
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        torch.save({**load(finished / "ori.pth"), "net": "vgg"}, path)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--ALQ")
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_damaged_data_is_named(tmp_path) -> None:
    from alq.data import read_mnist

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for source in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        content = source.read_bytes()
        half = content[: len(content) // 2] if "t10k-images" in source.name else content
        (raw / source.name).write_bytes(half)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged or half"):
        read_mnist(tmp_path)


def test_each_stage_has_its_own_orders(tmp_path, monkeypatch) -> None:
    orders = []
    monkeypatch.setattr(
        TensorLoader, "set_epoch", lambda self, number, first=0: orders.append(number)
    )
    run(tmp_path, "--PRETRAIN", "--ALQ", "--POSTTRAIN")
    assert len(orders) == len(events(tmp_path, "epoch")) == len(set(orders))


def test_help_names_the_flags_that_may_change_before_resuming(capsys) -> None:
    with pytest.raises(SystemExit):
        lenet5.main(["-h"])
    (text,) = re.findall(
        r"--resume +go on from (.*?);\s+stages", capsys.readouterr().out, re.DOTALL
    )
    assert set(re.findall(r"--(\w+)", text)) == set(MAY_CHANGE)


PUBLISHED = (
    "data val_size model_ori model PRETRAIN ALQ POSTTRAIN lr R epoch_prune epoch_basis ld_basis "
    "epoch_coord ld_coord wd pr top_k structure subc max_bit batch_size"
).split()


@pytest.mark.parametrize(
    ("script", "own", "more"),
    [(lenet5, [], ["augment"]), (resnet, ["net", "DOWNLOAD", "model_ori_urls"], [])],
)
def test_help_explains_the_published_flags_first(script, own, more, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["-h"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = re.split(r"^(\w[^:\n]*):$", text, flags=re.MULTILINE)
    flags = {
        title: re.findall(r"^  --(\w+)", shown, re.MULTILINE)
        for title, shown in zip(groups[1::2], groups[2::2], strict=True)
    }
    assert list(flags) == [
        *("options", "published flags", "numbers that the published scripts bury in their code"),
        *("beyond the paper", "machine"),
    ]
    assert flags["published flags"] == PUBLISHED + own
    assert {"EVAL", "target_bit", "target_kb", "file_kb", *more} <= set(flags["beyond the paper"])


def test_post_training_of_no_epochs_keeps_the_model(finished, tmp_path) -> None:
    for name in ("ori.pth", "model.pth", "model_posttrained.pth"):  # the last of another run
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    lenet5.main(
        ["--POSTTRAIN", *SHORT, *files(tmp_path), "--epoch_ste", "0", "--epoch_post_coord", "0"]
    )
    model, posttrained = (load(tmp_path / f"model{end}.pth") for end in ("", "_posttrained"))
    for a, b in zip(model["weights"], posttrained["weights"], strict=True):
        assert torch.equal(a["codes"], b["codes"]) and torch.equal(a["alpha"], b["alpha"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--POSTTRAIN", "--model", "ori.pth", "--model_ori", "x.pth"],
            "holds what --PRETRAIN saved; give what --ALQ",
        ),
        (["--ALQ", "--model_ori", "model.pth", "--model", "x.pth"], "holds what --ALQ saved"),
        (["--ALQ", "--model", "ori.pth"], "--model and --model_ori would be one file"),
        (["--PRETRAIN", "--model", "ori.pth/x.pth"], "cannot be written"),
    ],
)
def test_a_file_of_another_stage_is_refused(finished, tmp_path, capsys, flags, message) -> None:
    for name in ("ori.pth", "model.pth"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    flags = [str(tmp_path / flag) if ".pth" in flag else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        lenet5.main([*SHORT, *files(tmp_path), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_files_from_before_a_key_was_added(finished, tmp_path, capsys) -> None:
    content = load(finished / "model.pth")
    for key in ("finished", "top1_fp", "val_indices"):
        del content[key]
    save_checkpoint(tmp_path / "model.pth", content)
    run(tmp_path, "--POSTTRAIN", "--epoch_ste", "0", "--epoch_post_coord", "0")
    assert "interrupted" not in capsys.readouterr().err
    del content["stage"]
    save_checkpoint(tmp_path / "model.pth", content)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--POSTTRAIN")
    assert stop.value.code == 2
    assert "model.pth: has no 'stage'; make it again by --ALQ" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path, capsys) -> None:
    (tmp_path / "ori.pth").write_bytes((finished / "ori.pth").read_bytes())
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--ALQ", "--lr", "1e30", "--ld_basis", "1")
    assert stop.value.code == 3
    captured = capsys.readouterr().err
    assert "alq 1/6 basis, batch 2: the loss is not finite; try a lower rate" in captured
    sketched = load(tmp_path / "model.part.pth")["weights"]
    assert all(w["alpha"].isfinite().all() for w in sketched)


def test_a_network_without_a_published_row(tmp_path, monkeypatch, capsys) -> None:
    run(tmp_path, "--PRETRAIN", "--ALQ")
    assert "published" in capsys.readouterr().out
    recipe = dataclasses.replace(lenet5.RECIPE, published=None)
    monkeypatch.setattr(lenet5, "RECIPE", recipe)
    run(tmp_path, "--ALQ")
    printed = capsys.readouterr().out
    assert "after alq" in printed and "published" not in printed
