"""What an epoch reports, what it leaves as it was, and which epoch of a stage is the best."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import alq
import lenet5
from alq.errors import InputError
from alq.training.epoch import Totals, classification, evaluate

SHORT = alq.Schedule(
    R=1, epoch_basis=1, epoch_coord=1, pr=0.5, top_k=0.5, epoch_ste=2, epoch_post_coord=1
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_few_bits_are_summed_exactly(dtype) -> None:
    totals, losses = Totals(), (torch.arange(4000) % 7 / 4 + 0.25).to(dtype)
    for loss in losses:
        totals.add(loss, None, 128)
    assert totals.means() == {"loss": losses.double().mean().item(), "accuracy": None}


def test_every_labelled_place_of_a_picture_counts() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(5, 3, 4, 6), torch.randint(3, (5, 4, 6))
    means = evaluate(nn.Identity(), [(logits[:2], y[:2]), (logits[2:], y[2:])])
    places = torch.ones_like(y).nonzero()
    right = sum(int(logits[i, :, j, k].argmax() == y[i, j, k]) for i, j, k in places)
    assert means["accuracy"] == pytest.approx(100 * right / 120)
    assert means["loss"] == pytest.approx(F.cross_entropy(logits, y).item())


def test_labels_may_be_probabilities() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(3, 3), torch.tensor([2, 0, 2])
    soft = 0.8 * F.one_hot(y, 3) + 0.2 / 3
    _, right, _ = classification(nn.Identity(), (logits, y))
    loss, correct, count = classification(nn.Identity(), (logits, soft))
    assert (correct, count) == (right, 3) and loss == F.cross_entropy(logits, soft)


@pytest.mark.parametrize(
    "y",
    [torch.rand(8, 1), torch.rand(8), torch.tensor([[1.0, 1, 0], [0, 1, 0]]).repeat(4, 1)],
    ids=["regression", "regression in one dimension", "several labels"],
)
def test_numbers_in_the_place_of_classes_are_refused(y: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, y.shape[1] if y.dim() > 1 else 1)
    batches = [(torch.randn(8, 4), y)]
    weights = alq.quantize(model, max_bit=2)
    with pytest.raises(InputError, match="loss: cross entropy takes classes"):
        alq.fit(model, weights, batches, batches, schedule=SHORT, progress=False)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_batch_norm_stays_frozen(frozen: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    norm = model[1]
    norm.running_mean.normal_()
    norm.train(not frozen)
    before = norm.running_mean.clone()
    batches = [(torch.randn(20, 6), torch.randint(2, (20,))) for _ in range(3)]
    alq.fit(model, alq.quantize(model), batches, batches, schedule=SHORT, progress=False)
    assert torch.equal(norm.running_mean, before) == frozen
    model.train()
    norm.train(not frozen)
    evaluate(model, batches)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, batches, lambda *_: 1 / 0)
    assert model.training and model[0].training and norm.training != frozen


def test_post_training_that_only_harms_keeps_its_start(tmp_path, sliver) -> None:
    command = (
        f"--model_ori {tmp_path}/ori.pth --model {tmp_path}/m.pth --val_size 100 --batch_size 50"
    ).split()
    short = "--epoch_pretrain 2 --R 1 --epoch_basis 1 --epoch_coord 1 --top_k 0.5".split()
    lenet5.main([*command, *short, "--PRETRAIN", "--ALQ"])
    ruin = "--epoch_ste 0 --epoch_post_coord 2 --lr_post_coord 30 --ld_post_coord 1".split()
    lenet5.main([*command, *short, *ruin, "--POSTTRAIN"])
    events = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    (before,) = [event for event in events if event["event"] == "before"]
    after = [e for e in events if e["event"] == "epoch" and e["stage"] == "posttrain"]
    assert len(after) == 2 and max(e["val_accuracy"] for e in after) < before["val_accuracy"]
    start, kept = (torch.load(tmp_path / f"{name}.pth") for name in ("m", "m_posttrained"))
    assert all(torch.equal(start["model"][key], value) for key, value in kept["model"].items())


def test_fit_keeps_the_start_where_post_training_only_harms(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(300, 6)
    batches = list(zip(x.split(50), (x[:, 0] > 0).long().split(50), strict=True))
    schedule = alq.Schedule(
        R=1, epoch_basis=3, epoch_coord=1, pr=0.1, top_k=0.5, epoch_ste=0, epoch_post_coord=2,
        lr=0.01, lr_post_coord=100.0,
    )  # fmt: skip
    weights, log = alq.quantize(model), tmp_path / "log.jsonl"
    result = alq.fit(model, weights, batches, batches, schedule=schedule, log=log, progress=False)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (before,) = [event for event in events if event["event"] == "before"]
    assert all(
        e["val_accuracy"] < before["val_accuracy"]
        for e in events
        if e["event"] == "epoch" and e["stage"] == "posttrain"
    )
    assert result["val_accuracy"] == before["val_accuracy"]
    assert result["val_loss"] == before["val_loss"]
