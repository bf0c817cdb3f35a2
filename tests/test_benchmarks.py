"""The benchmarks run, on what little tells that they do. Their figures are not looked at."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        "steps.py --network lenet5 --repeats 1 --naive --bits max",
        "training_step.py --network lenet5 --repeats 1 --batch 3 --at-once 2 --bits 2",
        "inference.py --network lenet5 --repeats 1 --batch 2 --threads 1",
        "epoch.py --repeats 1 --batches 2",
        "scaling.py --repeats 1 --largest 1e5 --weights 1e4 --threads 1",
    ],
)
def test_a_benchmark(command: str, tmp_path) -> None:
    script, *flags = shlex.split(command)
    path = tmp_path / "figures.json"
    plot = ["--plot", str(tmp_path / "plot.svg")] if script == "scaling.py" else []
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *flags, *plot, "--json", str(path)],
        check=True, capture_output=True, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    content = json.loads(path.read_text())
    assert content["machine"]
    assert not plot or (tmp_path / "plot.svg").read_text().startswith("<?xml")
