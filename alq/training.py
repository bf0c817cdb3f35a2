"""One training epoch and one evaluation, whatever the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parallel import sum_over_processes

# (model, batch) -> mean loss, number of correct answers (None: nothing to count), number of samples
LossFunction = Callable[[nn.Module, object], tuple[Tensor, "Tensor | None", int]]


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
) -> dict[str, float | None]:
    """Run `step` once after every batch's backward pass.

    `weights` are the factors of the batches' losses, those of `alq.parallel` (None: all are 1).

    Leaves the model in the train or eval mode it was given in (a pruning epoch runs in eval
    mode). Returns {"loss", "accuracy"}: means over the epoch's samples, accuracy in percent, None
    where the loss function counts no answers.
    Nothing is read back from the device before the epoch's end.
    """
    totals = Totals()
    weighted = zip(batches, weights, strict=True) if weights else ((x, 1.0) for x in batches)
    for batch, weight in weighted:
        loss, correct, count = loss_function(model, batch)
        model.zero_grad(set_to_none=True)
        (loss * weight).backward()
        step()
        if weight:  # else the samples are another process's
            totals.add(loss.detach(), correct, count)
    return totals.means()


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
        loss, correct, count = sum_over_processes(sums)
        return {"loss": loss / count, "accuracy": 100 * correct / count if counted else None}
