"""Losses and gradients that are NaN or infinite: named by epoch, batch and layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lenet5
from alq.errors import NotFinite
from alq.files.checkpoint import load_checkpoint
from alq.machine.finite import Watch

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--val_size 100 --batch_size 50 --epoch_pretrain 3 --R 1 --epoch_basis 2 --epoch_coord 1 "
    "--top_k 0.5 --max_bit 3 --threads 1 --device cpu"
).split()


class Poisoned(lenet5.LeNet5):
    """From training batch `bad` on, the loss or conv2's gradient is NaN."""

    what, bad = "", 0

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        if self.what == "gradient":
            self.conv2.weight.register_hook(
                lambda g: g * torch.nan if self.batches >= self.bad else g
            )

    def forward(self, x):
        self.batches += torch.is_grad_enabled()
        logits = super().forward(x)
        bad = self.what == "loss" and self.batches >= self.bad and torch.is_grad_enabled()
        return logits * torch.nan if bad else logits


@pytest.mark.parametrize(
    ("stage", "what", "message"),
    [
        ("PRETRAIN", "loss", "pretrain 2/3 pretrain, batch 3: the loss is not finite; try a lower"),
        ("PRETRAIN", "gradient", "pretrain 2/3 pretrain, batch 3: the gradient of conv2.weight, "),
        ("ALQ", "loss", "alq 2/4 basis, batch 3: the loss is not finite; try a lower"),
        ("ALQ", "gradient", "alq 2/4 basis, batch 3: the gradient of conv2.weight, or its"),
    ],
)
@pytest.mark.parametrize("save_every", ["0", "1e-9"])
def test_the_run_stops_with_the_last_good_files(
    sliver, tmp_path, monkeypatch, capsys, stage, what, message, save_every
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["--model_ori", "ori.pth", "--model", "model.pth", "--data", str(ROOT / "data")]
    if stage == "ALQ":
        lenet5.main(["--PRETRAIN", *SHORT, *files, "--epoch_pretrain", "1"])
    poisoned = type("Network", (Poisoned,), {"what": what, "bad": 7})  # an epoch has 4 batches
    recipe = type(lenet5.RECIPE)(**{**vars(lenet5.RECIPE), "network": poisoned})
    monkeypatch.setattr(lenet5, "RECIPE", recipe)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        lenet5.main([f"--{stage}", *SHORT, *files, "--save_every", save_every])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 3 and message in said, said
    assert said.endswith(" in the data. The files hold what was good before")
    best = "ori.part.pth" if stage == "PRETRAIN" else "ori.pth"
    for name in (best, "model.resume"):
        content = load_checkpoint(name, "lenet5")
        assert all(tensor.isfinite().all() for tensor in content["model"].values())
    assert (content["epochs_done"], content["batches"]) == (1, 2 if save_every == "1e-9" else 0)
    log = [json.loads(line) for line in Path("model.jsonl").read_text().splitlines()]
    epochs = [e["epoch"] for e in log if e["event"] == "epoch" and e["stage"] == stage.lower()]
    assert epochs == [1]


def test_a_watch_tells_the_first_bad_batch() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[0].bias.requires_grad_(False)
    watch = Watch(model, "epoch", "stop")
    one = torch.tensor(1.0)
    for p in model.parameters():
        p.grad = None if p is model[0].bias else torch.full_like(p, 1e15)
    watch.note(1, one)
    watch.check()
    model[1].weight.grad[0, 1] = 1e30  # its square overflows
    watch.note(2, one)
    watch.note(3, one * torch.nan)
    with pytest.raises(NotFinite, match=r"epoch, batch 2: the gradient of 1\.weight, or"):
        watch.check()
    watch = Watch(model, "epoch", "stop")
    nn.init.constant_(model[0].bias, torch.nan)
    watch.check()  # is no parameter that is trained
    nn.init.constant_(model[0].weight, torch.inf)
    with pytest.raises(NotFinite, match=r"epoch: a step made 0\.weight infinite; stop"):
        watch.check()


class Operations(TorchDispatchMode):
    """Counts the operations within `with`: on a device, at least a launch each."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("layers", [1, 50])
def test_a_watch_takes_as_many_operations_for_many_layers_as_for_one(layers) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    for parameter in model.parameters():
        parameter.grad = torch.ones(parameter.shape)
    model[0].bias.grad = None
    watch = Watch(model, "", "")
    watch.note(1, torch.tensor(0.0))
    with Operations() as operations:
        watch.note(2, torch.tensor(0.0))
    assert operations.count < 20
    watch.check()


def test_a_loss_in_half_does_not_make_gradients_infinite() -> None:
    """The square of 1000 is no float16."""
    model = nn.Linear(2, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1000.0)
    watch = Watch(model, "epoch", "stop")
    watch.note(1, torch.tensor(1.0, dtype=torch.float16))
    watch.check()
