"""One training epoch and one evaluation, whatever the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..machine.finite import Watch
from ..machine.processes import combine_over_processes

# (model, batch) -> mean loss, number of correct answers (None: nothing to count), number of samples
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, "Tensor | None", int]]


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
    """(mean cross entropy, number of correct answers, number of samples) of one batch (x, y)."""
    x, y = batch
    logits = model(x)  # (batch, classes)
    return F.cross_entropy(logits, y), (logits.argmax(dim=1) == y).sum(), len(y)


def compute_in_bfloat16(model: nn.Module, device: torch.device) -> None:
    """Autocast the forward pass, and with it the backward pass; outputs and gradients: float32.

    Only the network's own products are computed in bfloat16. Its parameters, and all that the
    quantizer does with them, keep their type.
    """
    forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    model.forward = lambda *inputs: forward(*inputs).float()


def train_epoch(
    model: nn.Module,
    batches: Iterable,
    step: Callable[[], None],
    loss_function: LossFunction = classification,
    weights: Iterable[float] | None = None,
    so_far: EpochSoFar | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """Run `step` once after every batch's backward pass.

    `weights` are the factors of the batches' losses (None: all are 1).
    `so_far` is a part of the epoch that was trained before, with `batches` and `weights` the rest;
    it is kept up to date. `after_step` is called when it is.

    Leaves the model in the train or eval mode it was given in (a pruning epoch runs in eval
    mode). Returns {"loss", "accuracy"}: means over the epoch's samples, accuracy in percent, None
    where the loss function counts no answers.
    Nothing is read back from the device before the epoch's end.
    """
    so_far = so_far or EpochSoFar()
    weighted = zip(batches, weights, strict=True) if weights else ((x, 1.0) for x in batches)
    for batch, weight in weighted:
        loss, correct, count = loss_function(model, batch)
        model.zero_grad(set_to_none=True)
        (loss * weight).backward()
        so_far.batches += 1
        if so_far.watch:
            so_far.watch.note(so_far.batches, loss)
        step()
        if weight:  # else the samples are another process's
            so_far.totals.add(loss.detach(), correct, count)
        after_step()
    return so_far.totals.means()


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, loss_function: LossFunction = classification
) -> dict[str, float | None]:
    """{"loss", "accuracy"} of the model in eval mode; its mode is restored."""
    was_training = model.training
    model.eval()
    totals = Totals()
    for batch in batches:
        totals.add(*loss_function(model, batch))
    model.train(was_training)
    return totals.means()


class Totals:
    """Running sums of loss and correct answers, kept on the device, over all processes."""

    def __init__(self) -> None:
        self.loss, self.correct, self.count = 0.0, 0, 0

    def add(self, loss: Tensor, correct: Tensor | None, count: int) -> None:
        self.loss = self.loss + loss * count
        self.correct = None if correct is None else self.correct + correct
        self.count += count

    def means(self) -> dict[str, float | None]:
        counted = self.correct is not None
        sums = [float(self.loss), float(self.correct) if counted else 0.0, self.count]
        loss, correct, count = combine_over_processes(sum, sums)
        return {"loss": loss / count, "accuracy": 100 * correct / count if counted else None}


@dataclass
class EpochSoFar:
    """How far an epoch has come: batches done, their sums, what in them was not finite."""

    batches: int = 0
    totals: Totals = field(default_factory=Totals)
    watch: Watch | None = None
    seconds: float = 0.0  # until the process began that goes on now
    began: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds + time.monotonic() - self.began
