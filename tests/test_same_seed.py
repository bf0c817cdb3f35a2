"""One seed, one run: with any number of workers, with and without --deterministic, interrupted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

import resnet
from alq.command import resume
from alq.machine.interruption import Stopped
from narrow import RESNET_FLAGS, prepare_resnet
from small_sets import write_imagenet

SHORT = shlex.split(
    "--PRETRAIN --ALQ --POSTTRAIN --val_size 8 --batch_size 8 --epoch_pretrain 2 --R 1 "
    "--epoch_basis 1 --epoch_coord 1 --pr 0.2 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1 "
    "--max_bit 2 --threads 1 --device cpu"
)


def run(folder: Path, *flags: str) -> list[dict]:
    """The three checkpoints that resnet.py makes."""
    files = ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
    data = ["--data", str(folder.parent / "data")]
    resnet.main([*data, *RESNET_FLAGS, *SHORT, *files, *flags])
    names = ("ori.pth", "model.pth", "model_posttrained.pth")
    return [torch.load(folder / name, weights_only=True) for name in names]


def same(one: list[dict], other: list[dict]) -> bool:
    return all(
        torch.equal(value, b["model"][key])
        for a, b in zip(one, other, strict=True)
        for key, value in a["model"].items()
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_same_bits(tmp_path, monkeypatch) -> None:
    write_imagenet(tmp_path / "data", 40, classes=2)
    prepare_resnet(monkeypatch.setattr)
    threads = torch.get_num_threads()
    try:
        first = run(tmp_path / "a", "--workers", "0")
        assert same(first, run(tmp_path / "b", "--workers", "2"))
        assert same(first, run(tmp_path / "c", "--workers", "0", "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled()
        assert not same(first, run(tmp_path / "d", "--workers", "0", "--seed", "1"))
        assert not torch.are_deterministic_algorithms_enabled()

        save_if_due, steps = resume.ResumePoints.save_if_due, 0

        def stopping(self, between_epochs: bool) -> None:
            nonlocal steps
            steps += not between_epochs
            if steps % 5 == 0 and not between_epochs:  # the third batch of an epoch, and so on
                self.save()
                raise Stopped(143)
            save_if_due(self, between_epochs)

        monkeypatch.setattr(resume.ResumePoints, "save_if_due", stopping)
        for stops in range(99):
            try:
                last = run(tmp_path / "e", "--workers", str(2 * (stops % 2)), "--resume")
                break
            except SystemExit as stop:
                assert stop.code == 143
        assert stops > 3 and same(first, last)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
