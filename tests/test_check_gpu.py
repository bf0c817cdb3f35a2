"""`make check-gpu` on a machine without a GPU: its own code, with tiny networks and data."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import check_gpu
from gpu_part import Part, Places
from gpu_parts import PARTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def places(tmp_path) -> Places:
    return Places(tmp_path, tmp_path, "cpu", small=True)


def part(lines: str, **more: object) -> Part:
    """A part that runs these lines."""
    more.setdefault("read", lambda places: (places.output / "a.txt").read_text())
    return Part("a", "title", lambda places: ["-c", lines], **more)


def test_a_part_tells_what_it_ran_on_and_what_came_out(places) -> None:
    report = check_gpu.run(part("print(17)"), places, left=99)
    assert (report["status"], report["result"], report["title"]) == ("ok", "17\n", "title")
    assert report["command"] == "python3 -c print(17)"
    assert report["device"] and report["torch"] and 0 <= report["seconds"] < 99


@pytest.mark.parametrize(
    ("lines", "more"),
    [
        ("raise SystemExit(2)", {}),
        ("raise SystemExit(143)", {}),
        ("import os; os.kill(os.getpid(), 9)", {}),
        ("", {"read": lambda places: places.output.joinpath("absent").read_text()}),
        ("", {"read": lambda places: {}["absent"]}),
    ],
)
def test_what_went_wrong_is_a_failure(places, lines, more) -> None:
    assert check_gpu.run(part(lines, **more), places, left=99)["status"] == "failed"


def test_a_part_without_time_is_left_out(places) -> None:
    assert check_gpu.run(part("1/0"), places, left=5)["status"] == "left out: no time"


WAITS = "import time; time.sleep(60)"
SAVES = f"import signal; signal.signal(signal.SIGTERM, lambda *_: exit(143)); {WAITS}"
IGNORES = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


@pytest.mark.parametrize(
    ("lines", "code"), [(SAVES, 143), (WAITS, -15), (IGNORES, None)], ids=["saves", "dies", "stays"]
)
def test_a_part_is_asked_to_stop_in_time(places, monkeypatch, lines, code) -> None:
    monkeypatch.setattr(check_gpu, "GRACE", 1)
    started = time.monotonic()
    with (places.output / "a.txt").open("w") as printed:
        assert check_gpu.finish([sys.executable, "-c", lines], 3, printed) == code
    assert time.monotonic() - started < 50


def test_only_what_goes_on_where_it_was_stopped_may_be_stopped() -> None:
    assert check_gpu.describe(143, resumable=True).startswith("stopped")
    assert check_gpu.describe(143, resumable=False) == "failed"
    assert check_gpu.describe(None, resumable=True) == "failed"
    assert [part.name for part in PARTS if part.resumable] == ["lenet5"]


def check(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    own = ["--device", "cpu", "--small", "--output", str(folder), "--work", str(folder)]
    command = [sys.executable, str(ROOT / "benchmarks" / "check_gpu.py"), *own, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)


def test_a_rehearsal_leaves_a_result_for_every_part(tmp_path) -> None:
    """A training before its data are there fails, and the others go on."""
    done = check(tmp_path, "--parts", "vgg_float32")
    assert done.returncode == 1 and "failed" in done.stdout
    parts = ["digits", "vgg_float32", "pictures", "loader"]
    done = check(tmp_path, "--parts", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert {report["status"] for report in reports.values()} == {"ok"}
    training = reports["vgg_float32"]["result"]
    assert training["epochs"] == 6 and len(training["results"]) == 3
    assert (tmp_path / "vgg_float32.jsonl").is_file()
    assert reports["loader"]["result"]["evaluation"] > 0
    assert all(name in done.stdout for name in parts) and "posttrain: " in done.stdout


def test_without_a_gpu_it_says_so(tmp_path) -> None:
    done = check(tmp_path, "--device", "cuda")
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr
