"""The training loop: one for all stages, for the scripts and for `alq.fit`."""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..errors import NotFinite
from ..machine import processes
from ..machine.finite import Watch
from ..method.network import average_bitwidth, storage_bytes
from ..method.optimizer import ALQ
from ..method.weight import MultiBitWeight
from .epoch import Batches, EpochSoFar, LossFunction, classification, describe, evaluate, score
from .progress import Progress
from .pruning import PruningPlan
from .schedule import FIRST_ORDER, Epoch, Schedule


@dataclass
class Training:
    """What a stage trains, and how far it has come.

    Attributes:
        stage: its name, for the log: pretrain, alq or posttrain.
        model: the network.
        optimizers: the first takes the step that the kind of epoch asks for, the others their own.
        steps: by kind of epoch, the step of the first optimizer.
        weights: the network's multi-bit weights, of which a full-precision network has none.
        loss: that of the network on a batch.
        best: score of the best epoch so far (`epoch.score`).
        epochs_done: how many of the stage's epochs are behind it.
        seconds: what they took.
        epoch: the epoch under way.
        frozen: modules that stay in eval mode, such as a frozen batch norm.
    """

    stage: str
    model: nn.Module
    optimizers: list[Optimizer]
    steps: dict[str, Callable[[], None]]
    weights: list[MultiBitWeight] = field(default_factory=list)
    loss: LossFunction = classification
    best: float = -float("inf")
    epochs_done: int = 0
    seconds: float = 0.0
    epoch: EpochSoFar = field(default_factory=EpochSoFar)
    frozen: list[nn.Module] = field(default_factory=list)

    @property
    def first_order(self) -> int:
        """Number of the order of batches that the stage's first epoch takes."""
        return FIRST_ORDER.get(self.stage, 0)

    def check_finite(self) -> None:
        """Raise NotFinite if a loss, gradient or parameter of the epoch so far is not finite."""
        if self.epoch.watch:
            self.epoch.watch.check()

    def check_same_everywhere(self, when: str) -> None:
        """Raise RuntimeError if network, weights or moments differ between processes."""
        states = [list(optimizer.state.values()) for optimizer in self.optimizers]
        weights = [vars(weight) for weight in self.weights]
        processes.check_same([self.model.state_dict(), states, weights], when)


def quantized_training(
    stage: str,
    model: nn.Module,
    weights: list[MultiBitWeight],
    schedule: Schedule | Namespace,
    loss: LossFunction = classification,
    plan: PruningPlan | None = None,
    optimizer: type[ALQ] = ALQ,
) -> Training:
    """Return the training of a quantized network, which has pruning epochs if there is a `plan`.

    `optimizer` trains the multi-bit weights, Adam all other parameters.
    """
    quantizer = optimizer(
        weights,
        lr=schedule.lr,
        weight_decay=schedule.wd,
        generator=torch.Generator().manual_seed(schedule.seed),
    )
    quantized = {id(weight.parameter) for weight in weights}
    others = [p for p in model.parameters() if id(p) not in quantized]
    steps = {
        "basis": quantizer.basis_step,
        "coordinate": quantizer.coordinate_step,
        "ste": quantizer.ste_step,
    }
    optimizers: list[Optimizer] = [quantizer]
    if others:
        optimizers.append(torch.optim.Adam(others, lr=schedule.lr))
    training = Training(stage, model, optimizers, steps, weights, loss)
    training.frozen = [m for m in model.modules() if model.training and not m.training]
    if plan is not None:
        steps["prune"] = lambda: plan.step(quantizer, *training.epoch.place)
    return training


def train(
    training: Training,
    epochs: Sequence[Epoch],
    train_batches: Batches,
    val_batches: Batches,
    log: Callable[..., None],  # takes an event's name and its fields
    after_epoch: Callable[[Epoch, dict], None],  # takes the epoch and its means on `val_batches`
    save: Callable[[bool], None] = lambda between_epochs: None,  # called also after every step
    progress: Progress | None = None,  # of all stages; None: a bar where output is a terminal
) -> None:
    """Train through what is left of `epochs`; raise NotFinite, which names epoch and batch."""
    network, progress = processes.average_gradients(training.model), progress or Progress()
    save(True)
    for epoch in epochs[training.epochs_done :]:
        title = f"{training.stage} {training.epochs_done + 1}/{len(epochs)} {epoch.kind}"
        begin_epoch(training, epoch, title, train_batches)
        so_far, seconds_before = training.epoch, training.seconds
        left = progress.left(training.stage, epochs[training.epochs_done :])
        with progress.bar(title, left, len(train_batches), so_far.batches) as bar:
            for batch, factor in batches_left(train_batches, so_far.batches):
                loss, correct, count = training.loss(network, batch)
                training.model.zero_grad(set_to_none=True)
                (loss * factor).backward()
                so_far.note_backward(loss)

                training.steps[epoch.kind]()
                for optimizer in training.optimizers[1:]:
                    optimizer.step()
                if factor:  # else the samples are another process's
                    so_far.totals.add(loss.detach(), correct, count)
                bar.update()
                save(False)
            val_means = end_epoch(training, epoch, title, val_batches, log, bar)
        progress.note(epoch, training.seconds - seconds_before)
        after_epoch(epoch, val_means)
        save(True)


def rate_start(training: Training, val_batches: Batches, log: Callable[..., None]) -> None:
    """Make the network as it is the best so far, for a stage that keeps its best epoch."""
    means = evaluate(training.model, val_batches, training.loss)
    training.best = score(means)
    fields = {"val_loss": means["loss"], "val_accuracy": means["accuracy"]}
    log("before", stage=training.stage, **fields)


def begin_epoch(training: Training, epoch: Epoch, title: str, train_batches: Batches) -> None:
    """Set the epoch's rate, the network's mode, the order of the batches; watch what is finite."""
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = epoch.lr
    training.model.train(epoch.kind != "prune")  # a pruning epoch keeps the running statistics
    for module in training.frozen:
        module.eval()
    order = training.first_order + training.epochs_done
    set_epoch(train_batches, order, training.epoch.batches)
    training.epoch.round = epoch.round
    training.epoch.batches_before = epoch.part * len(train_batches)
    advice = f"try a lower rate (it was {epoch.lr:g}), or look for such numbers in the data"
    training.epoch.watch = Watch(training.model, title, advice)


def end_epoch(
    training: Training, epoch: Epoch, title: str, val_batches: Batches, log: Callable[..., None],
    bar: tqdm,
) -> dict[str, float | None]:  # fmt: skip
    """Check, evaluate, log and show the epoch under way, which then is done.

    Returns: the means on `val_batches`.
    """
    so_far = training.epoch
    training.check_finite()
    processes.copy_buffers_from_main(training.model)
    training.check_same_everywhere(title)
    means = so_far.totals.means()
    val_means = evaluate(training.model, val_batches, training.loss)
    size = size_of(training.weights)
    bits = f", {size['bitwidth']:.3f} bit" if training.weights else ""
    bar.set_postfix_str(f"loss {means['loss']:.4f}, val {describe(val_means)}{bits}")
    val_loss, watch = val_means["loss"], so_far.watch
    if val_loss is None or not math.isfinite(val_loss):
        advice = watch.advice if watch else ""
        raise NotFinite(f"{title}: the validation loss is {val_loss}; {advice}")
    seconds = so_far.elapsed()
    training.seconds += seconds
    training.epochs_done += 1
    training.epoch = EpochSoFar()
    log(
        "epoch",
        stage=training.stage,
        epoch=training.epochs_done,
        kind=epoch.kind,
        lr=epoch.lr,
        round=epoch.round,
        loss=means["loss"],
        train_accuracy=means["accuracy"],
        val_loss=val_means["loss"],
        val_accuracy=val_means["accuracy"],
        **size,
        bitwidths={w.name: w.bitwidth for w in training.weights},
        seconds=round(seconds, 2),
    )
    return val_means


def batches_left(train_batches: Batches, done: int) -> Iterator[tuple[object, float]]:
    """Yield the epoch's batches after the first `done`, each with the factor of its loss.

    Only loaders that know the shares of several processes (`processes.Share`) begin in the middle.
    """
    shares = getattr(train_batches, "shares", None)
    if shares is None:
        return zip(train_batches, itertools.repeat(1.0))
    return zip(train_batches, (share.weight for share in shares[done:]), strict=True)


def set_epoch(loader: Any, number: int, first: int) -> None:
    """Tell a loader, or its sampler, which order is next and which batch, if it wants to know."""
    for owner in (loader, getattr(loader, "sampler", None)):
        if tell := getattr(owner, "set_epoch", None):
            tell(number, first) if first else tell(number)


def size_of(weights: list[MultiBitWeight]) -> dict:
    """Return the average bitwidth and the storage in bytes; None where nothing is quantized."""
    if not weights:
        return {"bitwidth": None, "storage_bytes": None}
    return {"bitwidth": average_bitwidth(weights), "storage_bytes": storage_bytes(weights)}
