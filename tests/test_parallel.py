"""Several processes: their shares, their common result, and what happens when they differ."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import few_digits
import fit_on_shares
import resnet
from alq.errors import InputError
from alq.machine import processes
from alq.machine.processes import share_batches
from compare import assert_same_levels
from narrow import RESNET_FLAGS, prepare_resnet
from small_sets import write_cifar10, write_imagenet

ROOT = Path(__file__).parents[1]
# 65 training pictures in batches of 32, 32 and 1: the last leaves one of two processes without.
COUNT = 100
FLAGS = shlex.split(
    "--PRETRAIN --ALQ --POSTTRAIN --val_size 35 --batch_size 32 --epoch_pretrain 1 --R 1 "
    "--epoch_basis 2 --epoch_coord 1 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1 --device cpu "
    f"--data {ROOT / 'data'}"
)


def torchrun(script: str, *flags: str) -> None:
    """A script of tests/ in two processes. After `--` torchrun takes no flag for its own."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    own = [str(ROOT / "tests" / script), *flags]
    subprocess.run([sys.executable, *command, *own], check=True, timeout=1500)


def events(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "model.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "batch_size"), [(64, 16), (67, 16), (65, 16), (5, 16)])
def test_shares_cover_every_batch_once_with_its_mean(processes, count, batch_size) -> None:
    for training in (True, False):
        found = [share_batches(count, batch_size, training, k, processes) for k in range(processes)]
        places = [list(range(count)[s.part]) for own in found for s in own if s.weight]
        assert sorted(sum(places, start=[])) == list(range(count))  # noqa: RUF017
    values = torch.rand(count, dtype=torch.float64)
    trained = [share_batches(count, batch_size, True, k, processes) for k in range(processes)]
    for number, start in enumerate(range(0, count, batch_size)):
        own = [process[number] for process in trained]
        mean = sum(values[s.part].mean() * s.weight for s in own) / processes
        torch.testing.assert_close(mean, values[start : start + batch_size].mean())


def test_two_processes_give_the_result_of_one(tmp_path, capfd) -> None:
    """All four steps, through the whole script under torchrun; LeNet5 has no batch norm.

    With two bases a group no levels tie, so that rounding decides nothing.
    """
    folders = {name: tmp_path / name for name in ("one", "two")}
    files = {
        name: ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
        for name, folder in folders.items()
    }
    flags = [*FLAGS, "--max_bit", "2"]
    few_digits.main(COUNT, [*flags, *files["one"]])
    capfd.readouterr()
    torchrun("few_digits.py", str(COUNT), *flags, *files["two"])
    assert capfd.readouterr().out.count("published (paper)") == 1

    for file in ("ori.pth", "model.pth", "model_posttrained.pth"):
        one, two = (torch.load(folder / file, weights_only=True) for folder in folders.values())
        for key, value in one["model"].items():
            torch.testing.assert_close(two["model"][key], value, atol=1e-8, rtol=0, msg=key)
        for a, b in zip(one["weights"], two["weights"], strict=True):
            assert_same_levels(a, b, atol=1e-8)
    one, two = (events(folder, "epoch") for folder in folders.values())
    assert [e["kind"] for e in one] == [
        *["pretrain", "basis", "basis", "coordinate", "prune", "ste", "coordinate"]
    ]
    for a, b in zip(one, two, strict=True):  # every sample counted once
        assert (a["bitwidth"], a["val_accuracy"]) == (b["bitwidth"], b["val_accuracy"])
        assert a["train_accuracy"] == b["train_accuracy"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-6)


@pytest.mark.parametrize("loop", ["fit", "own"])
def test_training_in_two_processes_gives_the_result_of_one(tmp_path, loop) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    fit_on_shares.main(alone, loop)
    torchrun("fit_on_shares.py", str(both), loop)
    one, first, second = (
        torch.load(path, weights_only=True)
        for path in (alone / "0.pth", both / "0.pth", both / "1.pth")
    )
    assert any(not weight["mask"].all() for weight in one)
    for a, b, c in zip(one, first, second, strict=True):
        assert all(torch.equal(b[key], c[key]) for key in ("codes", "alpha", "mask"))
        assert_same_levels(a, b, atol=1e-8)
    if loop == "own":
        return
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (alone, both)]
    results = [json.loads(lines[-1]) for lines in logs]
    assert len(logs[0]) == len(logs[1])
    for key in ("val_accuracy", "bitwidth"):
        assert results[0][key] == results[1][key]


# 45 training pictures in batches of 20, 20 and 5, of which no share is a single one.
SHORT = shlex.split(
    "--PRETRAIN --ALQ --POSTTRAIN --batch_size 20 --epoch_pretrain 1 --epoch_basis 1 "
    "--epoch_coord 1 --pr 1 --top_k 0.5 --epoch_ste 1 --epoch_post_coord 1 --max_bit 2 --device cpu"
)


def train_towards(flag: str, value: float, script: str, folder: Path, *flags: str) -> dict:
    """The three stages in two processes, pruning to a target; the result."""
    files = ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
    data = str(folder / "data")
    torchrun("narrow.py", script, data, *SHORT, flag, str(value), *files, *flags)
    assert events(folder, "start")[0]["processes"] == 2
    kinds = [epoch["kind"] for epoch in events(folder, "epoch")]
    assert kinds[:4] == ["pretrain", "basis", "coordinate", "prune"]
    return events(folder, "result")[-1]


def test_vgg_in_two_processes(tmp_path, capfd) -> None:
    """Batch norm and augmentation; pruned to the coordinate."""
    write_cifar10(tmp_path / "data", 60)
    result = train_towards("--target_bit", 1.3, "vgg", tmp_path, "--val_size", "15")
    assert 1.29 < result["bitwidth"] <= 1.3
    assert capfd.readouterr().out.count("published (paper)") == 1


def test_resnet_in_two_processes_and_its_file_tested_by_two(tmp_path, monkeypatch, capfd) -> None:
    """--EVAL needs the test pictures alone, and counts each of an odd number once."""
    write_imagenet(tmp_path / "data", 55, classes=2)
    flags = ["--workers", "0", *RESNET_FLAGS]
    result = train_towards("--target_kb", 28, "resnet", tmp_path, "--val_size", "10", *flags)
    assert 27.8e3 < result["storage_bytes"] <= 28e3
    shutil.rmtree(tmp_path / "data" / "train")
    flags += ["--EVAL", str(tmp_path / "model_posttrained.alq"), "--device", "cpu"]
    capfd.readouterr()
    torchrun("narrow.py", "resnet", str(tmp_path / "data"), *flags)
    lines = capfd.readouterr().out.splitlines(keepends=True)
    by_two = "".join(line for line in lines if not line.startswith("[Gloo]"))  # as torch 2.9 does
    prepare_resnet(monkeypatch.setattr)
    resnet.main(["--data", str(tmp_path / "data"), *flags])
    assert by_two == capfd.readouterr().out
    assert f"{result['top1']:.2f}" in by_two


def failing(script: str, *flags: str) -> list[str]:
    """The lines on stderr that a script of tests/ prints itself in two processes; it fails."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    own = [str(ROOT / "tests" / script), *flags]
    done = subprocess.run(
        [sys.executable, *command, *own], capture_output=True, text=True, timeout=900
    )
    assert done.returncode
    return [line for line in done.stderr.splitlines() if line.startswith(script)]


def test_what_is_wrong_for_all_processes_is_said_once() -> None:
    (line,) = failing("lenet5_on_a_sliver.py", *FLAGS, "--R", "0")
    assert "--R: 0 is out of range" in line


def test_what_is_wrong_in_process_1_alone_is_said(tmp_path) -> None:
    """A damaged picture that it is to train on; the other waits for it, and is ended."""
    write_imagenet(tmp_path / "data", 55, classes=2)
    flags = ["--data", str(tmp_path / "data"), "--workers", "0", "--val_size", "10"]
    args = resnet.command_line("resnet18").parse_args([*flags, *SHORT])
    data, _ = resnet.imagenet.load_splits(args, None)
    order, _ = data.train.draw_order()
    share = share_batches(data.train.count, args.batch_size, True, 1, 2)[0]
    path = Path(data.train.pictures.samples[int(order[share.part][0])][0])
    path.write_bytes(path.read_bytes()[:500])
    files = ["--model_ori", str(tmp_path / "ori.pth"), "--model", str(tmp_path / "model.pth")]
    own = [*SHORT, *files, "--workers", "0", "--val_size", "10"]
    (line,) = failing("narrow.py", "resnet", str(tmp_path / "data"), *own)
    assert f"{path} is no whole picture" in line


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is asked of torch in process 1 of two, on a machine with one GPU."""
    made: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(processes, "launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: made.append(f"cuda:{number}"))
    monkeypatch.setattr(processes.dist, "init_process_group", made.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: made.append("destroy"))
    return made


def test_two_processes_beside_one_gpu_may_use_the_cpu(calls) -> None:
    processes.claim_device()
    with (
        pytest.raises(InputError, match="more processes than the 1 GPUs"),
        processes.join_processes(torch.device("cuda")),
    ):
        pass
    with processes.join_processes(torch.device("cpu")):
        pass
    assert calls == ["gloo", "destroy"]


def test_a_process_with_a_gpu_takes_its_own(calls, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes.claim_device()
    with processes.join_processes(torch.device("cuda")):
        pass
    with (
        pytest.raises(InputError, match="--device cuda:0: under torchrun give --device cuda"),
        processes.join_processes(torch.device("cuda:0")),
    ):
        pass
    assert calls == ["cuda:1", "cpu:gloo,cuda:nccl", "destroy"]


def test_after_an_error_nobody_is_waited_for(calls) -> None:
    with pytest.raises(InputError, match="damaged"), processes.join_processes(torch.device("cpu")):
        raise InputError("damaged")
    assert calls == ["gloo"]


def test_a_batch_that_leaves_one_picture_to_a_process_is_refused(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for number, count, size, advice in (
        (1, 65, 32, "--batch_size 31"),
        (1, 65, 1, "--batch_size 3"),
        (2, 65, 31, "--batch_size 30"),
        (2, 64, 3, "--batch_size 4"),
        (4, 7, 4, "more images"),
    ):
        monkeypatch.setattr(processes, "process_count", lambda number=number: number)
        with pytest.raises(InputError, match=f"--batch_size {size}: .* use {advice}$"):
            processes.check_batch_norm(model, count, size)
        processes.check_batch_norm(model[0], count, size)  # without batch norm one is enough
        if advice[0] == "-":
            good = int(advice.split()[1])
            sizes = [
                len(range(count)[s.part])
                for k in range(number)
                for s in share_batches(count, good, True, k, number)
            ]
            assert min(sizes) > 1
            processes.check_batch_norm(model, count, good)


def test_processes_that_differ_are_found(monkeypatch) -> None:
    column = torch.arange(6).view(3, 2)[:, :1]  # as the places of live coordinates may be
    state = {"m": [torch.ones(5), torch.zeros(3, dtype=torch.uint8)], "t": 3, "order": column}
    changed = copy.deepcopy(state)
    changed["m"][0][2] += torch.finfo(torch.float32).eps
    sums = []
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes, "gather_from_all", lambda own: sums.append(own) or [sums[0], own]
    )
    processes.check_same(state, "epoch 1")
    processes.check_same(state, "epoch 2")
    with pytest.raises(RuntimeError, match=r"epoch 3: processes 0 and 0 differ in 1 of 3 tensors"):
        processes.check_same(changed, "epoch 3")
