"""What an epoch is measured by: the loss of a batch, the means of an epoch, evaluation."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..machine.finite import Watch
from ..machine.modes import eval_mode
from ..machine.processes import combine_over_processes

# (model, batch) -> mean loss, number of correct answers (None: nothing to count), number of samples
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, "Tensor | None", "Tensor | int"]]


class Batches(Protocol):
    """What is trained and evaluated on: mini-batches in the form that the loss takes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


NO_LABEL = -100  # what F.cross_entropy leaves out


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean cross entropy, number of correct answers and of labels of one batch (x, y).

    The logits are (batch, classes, ...); y holds classes (batch, ...), or their probabilities in
    the logits' shape. Each place of a picture that has a label counts; -100 is none, as in torch.

    Raises: InputError for numbers in the place of classes, as of a regression, where it can tell.
    """
    x, y = batch
    logits = model(x)
    if y.is_floating_point() and (y.shape != logits.shape or logits.shape[1:2] == (1,)):
        raise no_classes(y)
    labels = y.argmax(dim=1) if y.is_floating_point() else y
    correct = (logits.argmax(dim=1) == labels).sum()
    return F.cross_entropy(logits, y), correct, (labels != NO_LABEL).sum()


def check_probabilities(y: Tensor) -> None:
    """Raise InputError if y are numbers that do not add up to 1 over classes; waits for them."""
    if y.is_floating_point() and not bool(((y.sum(dim=1) - 1).abs() < 1e-2).all()):
        raise no_classes(y)


def no_classes(y: Tensor) -> InputError:
    """Return the error for y (batch, ...) that cross entropy would misread."""
    return InputError(
        "loss: cross entropy takes classes, or probabilities of two or more that add up to 1 for "
        f"each sample; y is {y.dtype} of shape {tuple(y.shape)}. For a regression, or for several "
        "labels a sample, give alq.fit a loss",
        "loss",
    )


def compute_in_bfloat16(model: nn.Module, device: torch.device) -> None:
    """Autocast the forward pass, and with it the backward pass; outputs and gradients: float32.

    Only the network's own products are computed in bfloat16. Its parameters, and all that the
    quantizer does with them, keep their type.
    """
    forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    model.forward = lambda *inputs: forward(*inputs).float()


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, loss_function: LossFunction = classification
) -> dict[str, float | None]:
    """Return the means {"loss", "accuracy"} of the model in eval mode; its modes are restored.

    The accuracy is in percent, None where the loss function counts no answers.
    """
    totals = Totals()
    with eval_mode(model):
        for batch in batches:
            totals.add(*loss_function(model, batch))
    return totals.means()


def score(means: dict) -> float:
    """Return what "best by validation" ranks by: the accuracy, or the loss where there is none."""
    return -means["loss"] if means["accuracy"] is None else means["accuracy"]


def describe(means: dict) -> str:
    """Return the accuracy, or the loss where there is none, for a reader."""
    if means["accuracy"] is None:
        return f"loss {means['loss']:.4f}"
    return f"{means['accuracy']:.2f} %"


class Totals:
    """Running sums of loss and correct answers, kept on the device.

    They are this process's; `means` are over all processes. The losses are summed in float64,
    whatever type they come in.
    """

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.correct: Tensor | int | None = 0
        self.count: Tensor | int = 0

    def add(self, loss: Tensor, correct: Tensor | None, count: Tensor | int) -> None:
        """Count in a batch of `count` samples: its mean loss, its number of correct answers."""
        wide = torch.float32 if loss.device.type == "mps" else torch.float64  # mps has no float64
        self.loss = self.loss + loss.to(wide) * count
        self.correct = None if self.correct is None or correct is None else self.correct + correct
        self.count += count

    def means(self) -> dict[str, float | None]:
        """Return {"loss", "accuracy"} over all samples of all processes; InputError if of none."""
        counted = self.correct is not None
        sums = [float(self.loss), float(self.correct or 0), float(self.count)]
        loss, correct, count = combine_over_processes(sum, sums)
        if not count > 0:
            raise InputError("no samples were counted: loaders must give batches anew each time")
        return {"loss": loss / count, "accuracy": 100 * correct / count if counted else None}


@dataclass
class EpochSoFar:
    """How far an epoch has come.

    Attributes:
        batches: how many have been trained on.
        totals: their sums.
        round, batches_before: of the epoch, and batches of the round's pruning epochs before it.
        watch: finds what in them was not finite; None until the epoch begins.
        seconds: of training in the processes before this one, if it was interrupted.
        began: when this process went on with it.
    """

    batches: int = 0
    totals: Totals = field(default_factory=Totals)
    round: int = 0
    batches_before: int = 0
    watch: Watch | None = None
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def note_backward(self, loss: Tensor) -> None:
        """Count a batch whose backward pass is done, and note what in it was not finite.

        Raises: NotFinite if it is the first: a step would spoil the network.
        """
        self.batches += 1
        assert self.watch is not None, "begin_epoch comes first"
        self.watch.note(self.batches, loss)
        if self.batches == 1:
            self.watch.check()

    @property
    def place(self) -> tuple[int, int]:
        """The round, and which of its pruning batches is under way, from 0."""
        return self.round, self.batches_before + self.batches - 1

    def elapsed(self) -> float:
        """Return the seconds of training, those before an interruption included."""
        return self.seconds + time.monotonic() - self.began
