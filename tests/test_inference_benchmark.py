"""docs/inference.md holds the tables of the measurements; the script's tables, memory and files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inference
import inference_memory
import inference_ways
from inference_tables import inference_tables, memory_table, put_into, speed_table, times_table
from test_inference import ROOT, numba_works
from timing import read_rows

RESULTS = ROOT / "benchmarks" / "results"
FILES = [
    RESULTS / f"inference_{name}.json" for name in ("one_thread", "two_threads", "memory")
]  # those of the command in the document
SMALLER = ROOT / "checkpoints" / "published" / "lenet5_10kb.alq"


def test_the_document_holds_the_tables_of_the_measurements() -> None:
    document = (ROOT / "docs" / "inference.md").read_text()
    for title, table in inference_tables(read_rows(FILES)).items():
        assert f"<!-- table: {title} -->\n{table}\n\n" in document, title
    names = ",".join(file.stem.removeprefix("inference_") for file in FILES)
    assert f"--table benchmarks/results/inference_{{{names}}}.json" in document


ROWS = [
    {"network": "vgg", "batch": 1, "ms": {"float32": 10.0, "from bits": 4.0, "int16": 2.5}},
    {"network": "vgg", "batch": 16, "ms": {"float32": 90.0, "from bits": 45.0}},
]


def test_what_was_not_measured_is_told_and_what_nobody_measured_left_out() -> None:
    times = times_table(ROWS).splitlines()
    assert times[0] == "| network | batch | float32 ms | from bits ms | int16 ms |"
    assert times[3] == "| vgg | 16 | 90.00 | 45.00 | not measured |"
    assert speed_table(ROWS).splitlines()[2:] == [
        "| vgg | 1 | 2.50 | 4.00 |",
        "| vgg | 16 | 2.00 | not measured |",
    ]


def test_memory_is_told_for_each_network_and_its_batches() -> None:
    rows = [
        {"network": "vgg", "way": way, "libraries": 17e6, "loaded": 57e6 / k, "peaks": {"1": 8e7}}
        for k, way in ((1, "channels_last"), (10, "from bits"))
    ]
    assert memory_table(rows).splitlines()[2:] == [
        "| libraries | once | 17.0 | 17.0 |",
        "| vgg | loaded | 57.0 | 5.7 |",
        "| vgg | batch 1 | 80.0 | 80.0 |",
    ]


def test_tables_take_the_place_of_those_before(tmp_path, capsys) -> None:
    document = tmp_path / "document.md"
    document.write_text("A\n\n<!-- table: times -->\n| old |\n| --- |\n| 1 |\n\nB\n")
    put_into(document, {"times": "| new |\n| --- |", "other": "| x |"})
    assert document.read_text() == "A\n\n<!-- table: times -->\n| new |\n| --- |\n\nB\n"
    assert "has no comment <!-- table: other -->" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["vgg", "vgg=", "alexnet=file.alq"])
def test_a_file_belongs_to_a_network(capsys, text) -> None:
    with pytest.raises(SystemExit):
        inference.command_line().parse_args(["--file", text])
    assert f"'{text}' is not NETWORK=FILE, with lenet5, vgg, resnet18" in capsys.readouterr().err


def test_a_trained_file_is_taken_as_it_is() -> None:
    (name, file) = inference.named_file(f"lenet5={SMALLER}")
    with torch.no_grad():
        _, weights = inference_ways.quantized(name, {name: file})
    assert 0 < inference.average_bitwidth(weights) < 0.2
    assert all(torch.equal(weight.parameter, weight.w_hat()) for weight in weights)


@numba_works
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_of_its_own_holds_one_way_and_nothing_else(tmp_path) -> None:
    with torch.no_grad():
        inference_ways.prepare("lenet5", inference_ways.FILES, tmp_path / "lenet5")
    found = {
        way: inference_memory.of_process(tmp_path, "lenet5", way, [1, 256], 1)
        for way in ("contiguous", "from bits")
    }
    floats = 4 * 430_500
    # Only about: some of what is loaded finds room in pages that the process holds already.
    assert 1.5 * floats > found["contiguous"]["loaded"] > 0.75 * floats
    assert found["from bits"]["loaded"] < floats / 3
    for one in found.values():  # a picture's activations are small, and those of 256 are not
        assert one["peaks"]["1"] < one["loaded"] + 8e6 < one["peaks"]["256"]


def test_the_files_of_figures_were_measured_by_the_commands_of_the_document() -> None:
    document = (ROOT / "docs" / "inference.md").read_text()
    commands = re.findall(r"^    python benchmarks/inference.py (.*) --json (\S+)$", document, re.M)
    assert {ROOT / path for _, path in commands} == set(FILES)
    for command, path in commands:
        arguments = json.loads((ROOT / path).read_text())["arguments"]
        place = arguments.index("--json")
        del arguments[place : place + 2]
        assert sorted(arguments) == sorted(command.split()), path


def test_the_script_names_a_wrong_file() -> None:
    command = [sys.executable, str(Path(inference.__file__)), "--network", "vgg", "--threads", "1"]
    command += ["--file", f"vgg={SMALLER}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "lenet5_10kb.alq: holds another network" in done.stderr
