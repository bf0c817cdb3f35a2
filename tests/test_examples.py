"""The examples, as a user runs them, on a sliver of their data."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import alq

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(monkeypatch, folder: Path, name: str, count: int) -> dict:
    """Run an example in `folder` with `count` samples to train on; return what it leaves."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "0", str(count)])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize(
    "name, count, bits, least",
    [("vision_transformer", 1000, 1.5, 25), ("text", 1000, 1.0, 60), ("regression", 100, 1.0, 20)],
)
def test_an_example(name, count, bits, least, monkeypatch, tmp_path, capsys) -> None:
    if name == "regression":
        pytest.importorskip("sklearn")
    left = run(monkeypatch, tmp_path, name, count)
    printed = capsys.readouterr().out

    # The network that is evaluated last is not the trained one, but holds what that one held.
    state = left["model"].state_dict()
    assert all(torch.equal(state[key], own) for key, own in left["fresh"].state_dict().items())
    assert left["fresh"] is not left["model"]
    file = tmp_path / "checkpoints" / f"{name}.alq"
    again = alq.load_packed(file, left["model"])
    assert 0.95 * bits < alq.average_bitwidth(again) <= bits

    # Both are better than guessing: 10 % of the digits, 38 % of the categories, an R2 of 0.
    percentages = [float(match) for match in re.findall(r"([-\d.]+) %", printed)][-2:]
    assert percentages == pytest.approx([left["before"], left["after"]], abs=0.06)
    assert min(percentages) > least
    full, kept, size = (int(match) for match in re.findall(r"(\d+) bytes", printed))
    assert full == 4 * sum(value.numel() for value in left["fresh"].parameters())
    assert kept == round(alq.storage_bytes(again)) < size == file.stat().st_size < full / 5


def test_without_scikit_learn_an_example_says_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"scikit-learn.*pip install -e \"\.\[examples\]\""):
        run(monkeypatch, tmp_path, "regression", 100)
