"""lenet5.py on a GPU: files that the CPU reads, and the same bits each time where promised."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest
import torch

import alq
import lenet5
from alq.command import resume
from alq.files.checkpoint import load_model

SHORT = shlex.split(
    "--val_size 100 --batch_size 50 --epoch_pretrain 2 --R 1 --epoch_basis 2 --epoch_coord 1 "
    "--pr 0.5 --top_k 0.5 --epoch_ste 1 --epoch_post_coord 1 --max_bit 3"
)


def run(folder: Path, device: torch.device, *flags: str) -> list[dict]:
    """All stages, and the three checkpoints that they make."""
    files = ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
    stages = ["--PRETRAIN", "--ALQ", "--POSTTRAIN", "--device", str(device)]
    lenet5.main([*stages, *SHORT, *files, *flags])
    names = ("ori.pth", "model.pth", "model_posttrained.pth")
    return [torch.load(folder / name, weights_only=True) for name in names]


def test_files_of_the_device_serve_on_the_host(sliver, tmp_path, device, capsys) -> None:
    """The small file holds the very weights, and the CPU comes to the same answers."""
    *_, last = run(tmp_path, device)
    assert all(value.device.type == "cpu" for value in last["model"].values())
    model, saved = lenet5.LeNet5(), lenet5.LeNet5()
    alq.load_packed(tmp_path / "model_posttrained.alq", model)
    load_model(saved, last["model"], "the checkpoint")
    for (name, a), b in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        there = saved.to(device)(x.to(device)).cpu()
        torch.testing.assert_close(there, model(x), rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    lenet5.main(["--EVAL", str(tmp_path / "model_posttrained.alq"), "--device", "cpu"])
    assert "after packing" in capsys.readouterr().out


def same(one: list[dict], other: list[dict]) -> bool:
    return all(
        torch.equal(value, b["model"][key])
        for a, b in zip(one, other, strict=True)
        for key, value in a["model"].items()
    )


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_the_same_bits_each_time_and_after_an_interruption(
    sliver, tmp_path, monkeypatch, device
) -> None:
    """With --deterministic; SIGTERM comes in the middle of every third epoch or so."""
    try:
        first = run(tmp_path / "a", device, "--deterministic")
        assert same(first, run(tmp_path / "b", device, "--deterministic"))
        save_if_due, steps = resume.ResumePoints.save_if_due, 0

        def interrupted(self, between_epochs: bool) -> None:
            nonlocal steps
            steps += not between_epochs
            if steps % 10 == 0 and not between_epochs:
                os.kill(os.getpid(), signal.SIGTERM)
            save_if_due(self, between_epochs)

        monkeypatch.setattr(resume.ResumePoints, "save_if_due", interrupted)
        last, stops = None, 0
        while last is None:
            try:
                last = run(tmp_path / "c", device, "--deterministic", "--resume")
            except SystemExit as stop:
                assert stop.code == 143
                stops += 1
        assert stops > 1 and same(first, last)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
