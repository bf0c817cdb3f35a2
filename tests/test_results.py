"""The README's numbers come from the logs in checkpoints/published/, and the files keep them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import alq
import lenet5
from alq.command.results import PUBLISHED, read_run, recipe_table, results_table
from alq.data import mnist, read_mnist
from alq.data.loaders import EVAL_BATCH, TensorLoader
from alq.files.checkpoint import load_checkpoint
from alq.training.epoch import evaluate

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "checkpoints" / "published"


def test_the_readme_holds_the_table_of_the_logs() -> None:
    assert results_table(RUNS.glob("*.jsonl")) in (ROOT / "README.md").read_text()


def test_only_default_schedules_make_the_row(tmp_path) -> None:
    lines = (RUNS / "lenet5_seed0.jsonl").read_text()
    for name, old, new in (
        ("pr", '"pr": 0.8', '"pr": 0.7'),
        ("extra", '"pr": 0.8', '"pr": 0.8, "distill": 0.5'),
    ):
        changed = tmp_path / f"{name}.jsonl"
        changed.write_text(lines.replace(old, new))
        assert not read_run(changed)["default"]
        assert "| here | not measured here" in results_table([changed]).splitlines()[3]
    assert read_run(RUNS / "lenet5_seed0.jsonl")["default"]


def test_the_readme_holds_the_gains_of_the_extras() -> None:
    assert recipe_table(RUNS / "ablations") in (ROOT / "README.md").read_text()


def test_the_readme_holds_the_tables_of_the_benchmark(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from steps_tables import markdown

    content = json.loads((ROOT / "benchmarks" / "results" / "steps.json").read_text())
    assert all(table in (ROOT / "README.md").read_text() for table in markdown(content))


def test_the_readme_holds_the_epochs_and_the_compile_times() -> None:
    text = (ROOT / "README.md").read_text()

    def result(name: str) -> dict:
        return json.loads((ROOT / "benchmarks" / "results" / name).read_text())

    for name, row in {"epoch": "eager", "epoch_compiled": "quantizer compiled"}.items():
        parts = result(f"{name}.json")["seconds"].values()
        cells = (f"{sum(part.values()):.2f}" for part in parts)
        assert f"| {' | '.join([row, *cells])} |" in text
    first = {}
    for row in result("scaling.json")["rows"]:
        if row["threads"] == 1:  # the first row with so many bits is the one that compiles
            first.setdefault(row["bits"], f"{row['first compiled step']:.0f}")
    seconds = [first[bits] for bits in range(1, 9)]
    assert f"for {', '.join(seconds[:-1])} and {seconds[-1]} s at L = 1 to 8" in text


@pytest.fixture(scope="module")
def test_set() -> TensorLoader:
    _, (images, labels) = read_mnist(ROOT / "data")
    return TensorLoader(images, labels, EVAL_BATCH, mnist.MEAN, mnist.STD)


@pytest.mark.parametrize("name, log", [("lenet5", "lenet5_seed0"), ("lenet5_10kb", "lenet5_10kb")])
def test_a_published_small_file_has_the_accuracy_of_its_log(test_set, name, log) -> None:
    model = lenet5.LeNet5().to(memory_format=torch.channels_last)
    weights = alq.load_packed(RUNS / f"{name}.alq", model)
    logged = read_run(RUNS / f"{log}.jsonl")["stages"]["posttrain"]
    assert alq.average_bitwidth(weights) == pytest.approx(logged["bitwidth"])
    assert alq.storage_bytes(weights) == pytest.approx(logged["storage_bytes"])
    # Convolutions round differently on other machines: a picture in 10 000 may change sides.
    assert evaluate(model, test_set)["accuracy"] == pytest.approx(logged["top1"], abs=0.02)


def test_the_published_full_precision_network_has_the_accuracy_of_its_log(test_set) -> None:
    model = lenet5.LeNet5().to(memory_format=torch.channels_last)
    content = load_checkpoint(RUNS / "lenet5_model_ori.pth", "lenet5")
    model.load_state_dict(content["model"])
    logged = read_run(RUNS / "lenet5_seed0.jsonl")["stages"]["pretrain"]
    assert evaluate(model, test_set)["accuracy"] == pytest.approx(logged["top1_fp"], abs=0.02)


def test_the_network_of_ten_kb_reaches_the_paper() -> None:
    result = read_run(RUNS / "lenet5_10kb.jsonl")["stages"]["posttrain"]
    assert (RUNS / "lenet5_10kb.alq").stat().st_size == result["file_bytes"] <= 10e3
    assert result["top1"] >= PUBLISHED["lenet5"]["top1"]
