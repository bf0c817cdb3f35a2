"""Several processes: their shares, their common result, and what happens when they differ."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import few_digits
from alq import parallel
from alq.parallel import shares

ROOT = Path(__file__).parents[1]
# 65 training pictures in batches of 32, 32 and 1: the last leaves one of two processes without.
COUNT = 100
FLAGS = shlex.split(
    "--PRETRAIN --ALQ --POSTTRAIN --val_size 35 --batch_size 32 --epoch_pretrain 1 --R 1 "
    "--epoch_basis 2 --epoch_coord 1 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1 --device cpu "
    f"--data {ROOT / 'data'}"
)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "batch_size"), [(64, 16), (67, 16), (65, 16), (5, 16)])
def test_shares_cover_every_batch_once_with_its_mean(processes, count, batch_size) -> None:
    for training in (True, False):
        found = [shares(count, batch_size, training, (k, processes)) for k in range(processes)]
        places = [list(range(count)[s.part]) for own in found for s in own if s.weight]
        assert sorted(sum(places, start=[])) == list(range(count))  # noqa: RUF017
    values = torch.rand(count, dtype=torch.float64)
    trained = [shares(count, batch_size, True, (k, processes)) for k in range(processes)]
    for number, start in enumerate(range(0, count, batch_size)):
        own = [process[number] for process in trained]
        mean = sum(values[s.part].mean() * s.weight for s in own) / processes
        torch.testing.assert_close(mean, values[start : start + batch_size].mean())


def test_two_processes_give_the_result_of_one(tmp_path, capfd) -> None:
    """All four steps, through the whole script under torchrun; LeNet5 has no batch norm."""
    folders = {name: tmp_path / name for name in ("one", "two")}
    files = {
        name: ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
        for name, folder in folders.items()
    }
    few_digits.main(COUNT, [*FLAGS, *files["one"]])
    capfd.readouterr()
    script = [str(ROOT / "tests" / "few_digits.py"), str(COUNT)]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    subprocess.run([sys.executable, *command, *FLAGS, *files["two"]], check=True, timeout=200)
    assert capfd.readouterr().out.count("published (paper)") == 1

    for file in ("ori.pth", "model.pth", "model_posttrained.pth"):
        one, two = (torch.load(folder / file, weights_only=True) for folder in folders.values())
        # 1e-5: where two bases of a group are almost alike, the solve for alpha multiplies errors
        for key, value in one["model"].items():
            torch.testing.assert_close(two["model"][key], value, atol=1e-5, rtol=0, msg=key)
        for a, b in zip(one["weights"], two["weights"], strict=True):
            assert torch.equal(a["codes"], b["codes"]) and torch.equal(a["mask"], b["mask"])
    one, two = (
        [
            json.loads(line)
            for line in (folder / "model.jsonl").read_text().splitlines()
            if json.loads(line)["event"] == "epoch"
        ]
        for folder in folders.values()
    )
    assert [e["kind"] for e in one] == [
        *["pretrain", "basis", "basis", "coordinate", "prune", "ste", "coordinate"]
    ]
    for a, b in zip(one, two, strict=True):  # every sample counted once
        assert (a["bitwidth"], a["val_accuracy"]) == (b["bitwidth"], b["val_accuracy"])
        assert a["train_accuracy"] == b["train_accuracy"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-6)


def test_processes_that_differ_are_found(monkeypatch) -> None:
    state = {"m": [torch.ones(5), torch.zeros(3, dtype=torch.uint8)], "t": 3}
    changed = copy.deepcopy(state)
    changed["m"][0][2] += torch.finfo(torch.float32).eps
    sums = []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "_gather", lambda own: sums.append(own) or [sums[0], own])
    parallel.check_same(state, "epoch 1")
    parallel.check_same(state, "epoch 2")
    with pytest.raises(RuntimeError, match=r"epoch 3: processes 0 and 0 differ in 1 of 2 tensors"):
        parallel.check_same(changed, "epoch 3")
