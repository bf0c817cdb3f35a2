"""The documents' numbers come from the logs in checkpoints/published/, and the files keep them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import activations
import alq
import lenet5
import performance_tables
from alq.__main__ import main
from alq.data import mnist, read_mnist
from alq.data.loaders import EVAL_BATCH, TensorLoader
from alq.files.checkpoint import load_checkpoint
from alq.training.epoch import evaluate
from evidence_tables import evidence_tables
from networks import NETWORKS
from published_runs import has_default_flags, read_run, read_runs
from tables import results_table, stages_table

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "checkpoints" / "published"
SEED0 = RUNS / "lenet5_seed0.jsonl"
FIGURES = ROOT / "benchmarks" / "results"
EPOCHS = ("epoch", "epoch_compiled", "epoch_one_thread", "epoch_one_thread_compiled")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def figures(name: str) -> dict:
    return json.loads((FIGURES / name).read_text())


# ---------------------------------------------------------------------------- documents


def test_the_readme_holds_the_table_of_the_logs() -> None:
    assert results_table(read_runs(RUNS)) in text("README.md")


def test_the_evidence_holds_the_tables_of_the_logs() -> None:
    evidence = text("docs/evidence.md")
    for table in [stages_table(read_runs(RUNS)), *evidence_tables(RUNS).values()]:
        assert table in evidence, table


def test_the_activations_hold_the_table_of_the_logs(capsys) -> None:
    document = text("docs/activations.md")
    commands = re.findall(r"`python benchmarks/activations.py (table .*)`", document)
    assert len(commands) == 2
    for command in commands:
        activations.main(command.replace("checkpoints", str(ROOT / "checkpoints")).split())
        assert capsys.readouterr().out in document


def test_the_performance_holds_the_tables_of_the_benchmarks() -> None:
    performance = text("docs/performance.md")
    scaling = figures("scaling.json")
    tables = [
        *performance_tables.steps_tables(figures("steps.json")["rows"]).values(),
        performance_tables.share_table(training_steps()),
        *performance_tables.epoch_tables([figures(f"{name}.json") for name in EPOCHS]),
        performance_tables.compile_table(scaling),
        performance_tables.scaling_table(scaling),
    ]
    for table in tables:
        assert table in performance, table


def training_steps() -> list[dict]:
    return [row for net in NETWORKS for row in figures(f"training_step_{net}.json")["rows"]]


def test_shares_are_those_of_the_scripts_own_batches() -> None:
    rows = training_steps()
    assert {row["network"] for row in rows} == set(NETWORKS)
    for row in rows:
        assert row["batch"] == NETWORKS[row["network"]].default_flags().batch_size


@pytest.mark.parametrize(
    "name, end", [("epoch_one_thread", ""), ("epoch_one_thread_compiled", " compiled")]
)
def test_two_ways_to_measure_the_share_of_a_basis_step_agree(name, end) -> None:
    """In whole epochs of LeNet5 on real digits, and in single steps on random pictures."""
    row = training_steps()[0]
    parts = figures(f"{name}.json")["seconds"]["basis"]
    in_epoch = 100 * parts["optimizer"] / sum(parts.values())
    assert row["network"] == "lenet5"
    assert performance_tables.share_of_step(row, end) == pytest.approx(in_epoch, rel=0.2)


# ---------------------------------------------------------------------------- default schedules


@pytest.fixture
def edited(tmp_path):
    """Makes a log with `old` in the place of `new`, in the lines of some event."""

    def make(log: Path, old: str, new: str) -> Path:
        lines = log.read_text()
        assert old in lines
        changed = tmp_path / "changed.jsonl"
        changed.write_text(lines.replace(old, new))
        return changed

    return make


@pytest.mark.parametrize(
    "flag",
    [
        '"pr": 0.7', '"pr": 0.8, "distill": 0.5', '"pr": 0.8, "floats": "float16"',
        '"pr": 0.8, "compile": true', '"pr": 0.8, "amp": true', '"pr": 0.8, "coded": true',
        '"pr": 0.8, "not_a_flag": 0',
    ],
)  # fmt: skip
def test_only_default_schedules_make_the_row(edited, flag) -> None:
    run = read_run(edited(SEED0, '"pr": 0.8', flag))
    assert run.finished and not run.default
    assert "| here | not measured |" in results_table([run]).splitlines()[3]


@pytest.mark.parametrize(
    "flag",
    [
        '"pr": 0.8, "seed": 7', '"pr": 0.8, "threads": 4', '"pr": 0.8, "deterministic": true',
        '"pr": 0.8, "floats": "float32"', '"pr": 0.8, "distill": 0.0',
        '"pr": 0.8, "channels_last": false, "cudnn_benchmark": true',
    ],
)  # fmt: skip
def test_seed_and_machine_do_not_matter_nor_defaults_that_are_spelt_out(edited, flag) -> None:
    assert read_run(edited(SEED0, '"pr": 0.8', flag)).default


def test_every_scripts_own_defaults_are_default() -> None:
    from alq.files.runlog import plain_flags

    for net, network in NETWORKS.items():
        flags = plain_flags(network.default_flags())
        assert has_default_flags(net, flags)
        assert not has_default_flags(net, {**flags, "R": flags["R"] + 1})


# ---------------------------------------------------------------------------- other data


def test_runs_on_other_data_make_rows_of_their_own(edited) -> None:
    """A log of the time before data sets were told is of the paper's."""
    told = read_run(edited(SEED0, '"net": "lenet5"', '"net": "lenet5", "dataset": "mnist"'))
    own = '"net": "lenet5", "dataset": "fashion_mnist"'
    other = read_run(edited(SEED0, '"net": "lenet5"', own))
    found = [run.dataset for run in (read_run(SEED0), told, other)]
    assert found == ["mnist", "mnist", "fashion_mnist"]
    alone, both = (results_table(runs).splitlines() for runs in ([told], [told, other]))
    assert [line for line in both if "Fashion" not in line] == alone
    (row,) = set(both) - set(alone)
    mine = alone[3].replace("|  | here", "| LeNet5, Fashion-MNIST | here")
    assert row == mine and both.index(row) == 4


def test_stages_on_several_data_sets_make_no_row(tmp_path) -> None:
    flags = json.loads(SEED0.read_text().splitlines()[0])["flags"]
    log = write_log(
        tmp_path / "a.jsonl",
        command("start", "PRETRAIN", flags=flags),
        result("pretrain", 99.0),
        command("start", "ALQ", "POSTTRAIN", flags=flags, dataset="fashion_mnist"),
        result("alq", 98.0),
        result("posttrain", 99.0),
    )
    run = read_run(log)
    assert run.finished and run.dataset is None and not run.default


# ---------------------------------------------------------------------------- logs


def write_log(path: Path, *events: dict) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def command(event: str, *stages: str, **more: object) -> dict:
    own = {"net": "lenet5", "stages": stages, "flags": {}, "device": "cpu", "threads": 1}
    return {"event": event, **own, "time": "2026-01-01T00:00:00+0000", **more}


def result(stage: str, top1: float) -> dict:
    fields = {"bitwidth": 1.0, "storage_bytes": 1.0, "top1_fp": 99.0, "seconds": 36.0}
    return {"event": "result", "stage": stage, "top1": top1, **fields}


def test_a_stage_is_described_by_the_command_that_ran_it(tmp_path) -> None:
    """The published run was one command; of two, each has its own threads and commit."""
    published = read_run(SEED0)
    assert published.default and "differ" not in results_table([published])
    flags = json.loads(SEED0.read_text().splitlines()[0])["flags"]
    log = write_log(
        tmp_path / "a.jsonl",
        command("start", "PRETRAIN", threads=2, commit="a", flags=flags),
        result("pretrain", 99.0),
        command("start", "ALQ", "POSTTRAIN", threads=1, commit="b", flags=flags),
        result("alq", 98.0),
        result("posttrain", 99.0),
    )
    run = read_run(log)
    assert run.default
    assert [stage.said("threads") for stage in run.stages.values()] == [[2], [1], [1]]
    assert "(stages differ in threads and commit)" in results_table([run])


def test_a_resumed_stage_is_described_by_both_its_commands(tmp_path) -> None:
    log = write_log(
        tmp_path / "a.jsonl",
        command("start", "PRETRAIN", "ALQ", "POSTTRAIN"),
        result("pretrain", 99.0),
        command("resume", "ALQ", "POSTTRAIN", threads=2, flags={"compile": True}),
        result("alq", 98.0),
        result("posttrain", 99.0),
    )
    run = read_run(log)
    threads = {name: stage.said("threads") for name, stage in run.stages.items()}
    assert threads == {"pretrain": [1], "alq": [1, 2], "posttrain": [2]}
    assert run.finished and not run.default
    assert "| alq | 2026-01-01 | cpu | 1, 2 |" in stages_table([run])


def test_a_stage_that_is_run_again_voids_what_followed_from_it(tmp_path) -> None:
    everything = [command("start", "PRETRAIN", "ALQ", "POSTTRAIN")]
    everything += [result(name, 99.0) for name in ("pretrain", "alq", "posttrain")]
    again = [command("start", "ALQ", threads=2), result("alq", 98.0)]
    run = read_run(write_log(tmp_path / "a.jsonl", *everything, *again))
    assert not run.finished and run.stages["pretrain"].said("threads") == [1]
    last = [command("start", "POSTTRAIN"), result("posttrain", 97.0)]
    run = read_run(write_log(tmp_path / "a.jsonl", *everything, *again, *last))
    assert run.finished and run.final["top1"] == 97.0
    assert run.stages["alq"].said("threads") == [2]


def test_logs_of_other_programs_make_no_row() -> None:
    assert not read_run(RUNS / "ablations" / "mnist_adaptive_uniform_seed0.jsonl").stages


# ---------------------------------------------------------------------------- the command


def table_error(capsys, *arguments: object) -> str:
    """The one line that `python -m alq table ARGUMENTS` ends with."""
    with pytest.raises(SystemExit) as ended:
        main(["table", *map(str, arguments)])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and not captured.out and captured.err.count("\n") == 1
    return captured.err


def test_the_table_is_found_from_any_folder(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    main(["table"])
    assert results_table(read_runs(RUNS)) in capsys.readouterr().out


def test_a_folder_without_logs_is_refused(capsys, tmp_path) -> None:
    assert f"{tmp_path / 'none'}: no such folder" in table_error(capsys, tmp_path / "none")
    assert f"{tmp_path}: no logs" in table_error(capsys, tmp_path)


@pytest.mark.parametrize(
    "content, line",
    [
        (b"hello\n", 1), (b"hello", 1), (b"\xff\xfe\x00\n", 1), (b"[]\n", 1), (b"", 1),
        (b'{"event": "epoch"}\n{"event"\n', 2), (b'{"event": "start", "stages": ["ALQ"]}\n', 1),
    ],
)  # fmt: skip
def test_a_file_that_is_no_log_is_named_with_its_line(capsys, tmp_path, content, line) -> None:
    log = tmp_path / "no_log.jsonl"
    log.write_bytes(content)
    assert f"{log}, line {line}: " in table_error(capsys, tmp_path)


def test_a_folder_under_a_logs_name_is_refused(capsys, tmp_path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl cannot be read" in table_error(capsys, tmp_path)


def test_an_installed_package_says_that_the_table_needs_the_checkout(tmp_path) -> None:
    shutil.copytree(ROOT / "alq", tmp_path / "alq")
    ended = subprocess.run(
        [sys.executable, "-m", "alq", "table"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2 and not ended.stdout
    assert "needs the checkout" in ended.stderr and ended.stderr.count("\n") == 1


# ---------------------------------------------------------------------------- published files


@pytest.fixture(scope="module")
def test_set() -> TensorLoader:
    _, (images, labels) = read_mnist(ROOT / "data")
    kind = mnist.SETS["mnist"]
    return TensorLoader(images, labels, EVAL_BATCH, kind.mean, kind.std)


@pytest.mark.parametrize("name, log", [("lenet5", "lenet5_seed0"), ("lenet5_10kb", "lenet5_10kb")])
def test_a_published_small_file_has_the_accuracy_of_its_log(test_set, name, log) -> None:
    model = lenet5.LeNet5().to(memory_format=torch.channels_last)
    weights = alq.load_packed(RUNS / f"{name}.alq", model)
    logged = read_run(RUNS / f"{log}.jsonl").final
    assert alq.average_bitwidth(weights) == pytest.approx(logged["bitwidth"])
    assert alq.storage_bytes(weights) == pytest.approx(logged["storage_bytes"])
    # Convolutions round differently on other machines: a picture in 10 000 may change sides.
    assert evaluate(model, test_set)["accuracy"] == pytest.approx(logged["top1"], abs=0.02)


def test_the_published_full_precision_network_has_the_accuracy_of_its_log(test_set) -> None:
    model = lenet5.LeNet5().to(memory_format=torch.channels_last)
    content = load_checkpoint(RUNS / "lenet5_model_ori.pth", "lenet5")
    model.load_state_dict(content["model"])
    logged = read_run(SEED0).stages["pretrain"].result
    assert evaluate(model, test_set)["accuracy"] == pytest.approx(logged["top1_fp"], abs=0.02)


def test_the_network_of_ten_kb_reaches_the_paper() -> None:
    final = read_run(RUNS / "lenet5_10kb.jsonl").final
    assert (RUNS / "lenet5_10kb.alq").stat().st_size == final["file_bytes"] <= 10e3
    assert final["top1"] >= lenet5.PUBLISHED["top1"]
