"""Whole scripts on a pretend CUDA device: the CPU's results to the bit, and who waits for it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

import alq.files.runlog
import alq.method.codes
import few_digits
import lenet5
import resnet
import vgg
from alq.data import mnist
from narrow import RESNET_FLAGS, prepare_resnet, prepare_vgg
from shadow_device import Shadow, ShadowDevice, Stats
from small_sets import write_cifar10, write_imagenet

ROOT = Path(__file__).parents[1]
SHORT = shlex.split(
    "--PRETRAIN --ALQ --POSTTRAIN --val_size 20 --batch_size 32 --epoch_pretrain 1 --R 1 "
    "--epoch_basis 1 --epoch_coord 1 --pr 0.4 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1 "
    "--max_bit 3 --channels_last"
)


@pytest.fixture
def waits(monkeypatch) -> dict[str, list[int]]:
    """How often the host waited for the device, in each step of each kind."""
    counts: dict[str, list[int]] = {}

    def counted(name: str):
        step = getattr(alq.ALQ, name)

        def take(self, *arguments, **named) -> None:
            before = Stats.syncs
            step(self, *arguments, **named)
            counts.setdefault(name, []).append(Stats.syncs - before)

        return take

    for name in ("basis_step", "coordinate_step", "ste_step", "prune_step"):
        monkeypatch.setattr(alq.ALQ, name, counted(name))
    # The accelerator's formulation on the CPU too, so that both sum in the same order.
    monkeypatch.setattr(alq.method.codes, "CPU", "none")
    monkeypatch.setattr(alq.files.runlog, "describe_device", str)
    # The pretend device has no generator of its own; this one leaves the host's alone.
    own = torch.Generator()
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: own.get_state())
    return counts


def check(main, flags: list[str], folder: Path, waits: dict[str, list[int]]) -> None:
    """`main` on both devices: the same files, and no waiting within the steps."""

    def run(device: str) -> None:
        own = ["--model_ori", str(folder / device / "ori.pth"), "--device", device]
        main([*SHORT, *flags, *own, "--model", str(folder / device / "model.pth")])

    run("cpu")
    waits.clear()
    with ShadowDevice("cuda"):
        run("cuda")
        assert Stats.ops > 1000
    prune = waits.pop("prune_step")
    assert prune and max(prune) == 1, prune
    assert sorted(waits) == ["basis_step", "coordinate_step", "ste_step"]
    assert not any(sum(counts) for counts in waits.values()), waits
    for file in ("ori.pth", "model.pth", "model_posttrained.pth"):
        cpu, cuda = (torch.load(folder / d / file, weights_only=True) for d in ("cpu", "cuda"))
        assert not any(isinstance(x, Shadow) for x in cuda["model"].values())
        assert all(torch.equal(cpu["model"][key], cuda["model"][key]) for key in cpu["model"])
        for a, b in zip(cpu["weights"], cuda["weights"], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in ("codes", "alpha", "mask"))


@pytest.mark.parametrize("target", [[], ["--target_bit", "1.5"]])
def test_lenet5(tmp_path, monkeypatch, waits, target) -> None:
    monkeypatch.setattr(mnist, "read_mnist", few_digits.few(60, mnist.read_mnist))
    check(lenet5.main, ["--data", str(ROOT / "data"), *target], tmp_path, waits)


def test_vgg(tmp_path, monkeypatch, waits) -> None:
    write_cifar10(tmp_path, 60)
    prepare_vgg(tmp_path, monkeypatch.setattr)
    check(vgg.main, ["--data", str(tmp_path)], tmp_path, waits)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_resnet(tmp_path, monkeypatch, waits) -> None:
    write_imagenet(tmp_path / "data", 50, classes=2)
    prepare_resnet(monkeypatch.setattr)
    flags = ["--data", str(tmp_path / "data"), "--workers", "0", *RESNET_FLAGS]
    check(resnet.main, [*flags, "--max_bit", "2"], tmp_path, waits)
