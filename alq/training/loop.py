"""Training through a schedule: what the scripts' stages and `alq.fit` stand on."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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
from .epoch import EpochSoFar, LossFunction, classification, evaluate, train_epoch
from .pruning import PruningPlan
from .schedule import FIRST_ORDER, Epoch, Schedule


@dataclass
class Training:
    """What a stage trains: the network, its optimizers, and the step each kind of epoch takes."""

    model: nn.Module
    optimizers: list[Optimizer]
    steps: dict[str, Callable[[], None]]
    weights: list[MultiBitWeight] = field(default_factory=list)
    loss: LossFunction = classification
    best: float = -float("inf")  # score of the best epoch so far (`score`)
    epochs_done: int = 0
    seconds: float = 0.0
    epoch: EpochSoFar = field(default_factory=EpochSoFar)  # the one under way

    def check_finite(self) -> None:
        """NotFinite if a loss, gradient or parameter of the epoch so far is none to go on from."""
        if self.epoch.watch:
            self.epoch.watch.check()

    def check_same_everywhere(self, when: str) -> None:
        """Of several processes: give all the same running statistics, compare all the rest."""
        processes.copy_buffers_from_main(self.model)
        states = [list(optimizer.state.values()) for optimizer in self.optimizers]
        weights = [vars(weight) for weight in self.weights]
        processes.check_same([self.model.state_dict(), states, weights], when)


def quantized_training(
    model: nn.Module,
    weights: list[MultiBitWeight],
    schedule: Schedule | Namespace,
    loss: LossFunction = classification,
    plan: PruningPlan | None = None,
    kind: type[ALQ] = ALQ,
) -> Training:
    """ALQ for the multi-bit weights, Adam for all other parameters. Without `plan`, no pruning."""
    quantizer = kind(
        weights,
        lr=schedule.lr,
        weight_decay=schedule.wd,
        generator=torch.Generator().manual_seed(schedule.seed),
    )
    quantized = {id(weight.parameter) for weight in weights}
    rest = [p for p in model.parameters() if id(p) not in quantized]
    optimizers = [quantizer, torch.optim.Adam(rest, lr=schedule.lr)] if rest else [quantizer]

    def all_of(step: Callable[[], None]) -> Callable[[], None]:
        def take() -> None:
            with processes.sum_in_fixed_order():
                step()
                for optimizer in optimizers[1:]:
                    optimizer.step()

        return take

    steps = {
        "basis": quantizer.basis_step,
        "coordinate": quantizer.coordinate_step,
        "ste": quantizer.ste_step,
    }
    if plan is not None:
        steps["prune"] = lambda: plan.step(quantizer)
    steps = {name: all_of(step) for name, step in steps.items()}
    return Training(model, optimizers, steps, weights, loss)


def train_through(
    stage: str,
    training: Training,
    epochs: list[Epoch],
    train: Iterable,
    val: Iterable,
    log: Callable[..., None],
    after_epoch: Callable[[Epoch, dict], None],
    after_step: Callable[[], None] = lambda: None,
    progress: bool | None = None,
) -> None:
    """Train through what is left of `epochs`; after each: evaluate, log, `after_epoch`.

    Arguments:
        train, val: batches, in the form that `training.loss` takes; `train` has a length.
        log: called with an event's name and its fields.
        after_epoch: called with the epoch and its means on `val` (`training.evaluate`).
        after_step: called after every step, with `training` at that point.
        progress: shows a bar; None shows it where the output is a terminal.

    Raises: NotFinite names the epoch, batch and layer.
    """
    network = processes.average_gradients(training.model)
    if not processes.is_main():
        progress = False
    while training.epochs_done < len(epochs):
        epoch, so_far = epochs[training.epochs_done], training.epoch
        title = f"{stage} {training.epochs_done + 1}/{len(epochs)} {epoch.kind}"
        with progress_bar(title, len(train), so_far.batches, progress) as bar:
            so_far.watch = Watch(training.model, title, advice(epoch))
            order = FIRST_ORDER.get(stage, 0) + training.epochs_done
            set_epoch(train, order, so_far.batches)
            means = rest_of_epoch(network, training, epoch, train, bar, after_step)
            training.check_finite()
            training.check_same_everywhere(title)
            val_means = evaluate(training.model, val, training.loss)
            size = size_of(training.weights)
            bar.set_postfix_str(
                f"loss {means['loss']:.4f}, val {describe(val_means)}"
                + (f", {size['bitwidth']:.3f} bit" if training.weights else "")
            )
        if not math.isfinite(val_means["loss"]):
            raise NotFinite(f"{title}: the validation loss is {val_means['loss']}; {advice(epoch)}")
        seconds = so_far.elapsed()
        training.seconds += seconds
        training.epochs_done += 1
        training.epoch = EpochSoFar()
        log(
            "epoch",
            stage=stage,
            epoch=training.epochs_done,
            **dataclasses.asdict(epoch),
            loss=means["loss"],
            train_accuracy=means["accuracy"],
            val_loss=val_means["loss"],
            val_accuracy=val_means["accuracy"],
            **size,
            bitwidths={w.name: w.bitwidth for w in training.weights},
            seconds=round(seconds, 2),
        )
        after_epoch(epoch, val_means)


def rest_of_epoch(
    network: nn.Module,
    training: Training,
    epoch: Epoch,
    train: Iterable,
    bar: tqdm,
    after_step: Callable[[], None],
) -> dict[str, float | None]:
    """Train what is left of the epoch under way; the means over all of it."""
    so_far = training.epoch
    prepare(training, epoch)
    shares = getattr(train, "shares", None)  # of each batch's loss: `parallel.Share`
    weights = shares and [share.weight for share in shares[so_far.batches :]]

    def then() -> None:
        bar.update()
        after_step()

    step = training.steps[epoch.kind]
    return train_epoch(network, train, step, training.loss, weights, so_far, then)


def progress_bar(title: str, total: int, done: int, progress: bool | None) -> tqdm:
    """A bar over an epoch's batches; it stays open for what `evaluate` then finds."""
    disable = None if progress is None else not progress
    return tqdm(total=total, initial=done, desc=title, unit="batch", disable=disable)


def prepare(training: Training, epoch: Epoch) -> None:
    """The epoch's rate, and the network's mode."""
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = epoch.lr
    training.model.train(epoch.kind != "prune")  # a pruning epoch keeps the running statistics


def advice(epoch: Epoch) -> str:
    """What to do when an epoch's numbers are none to go on from."""
    return f"try a lower rate (it was {epoch.lr:g}). The files hold what was good before"


def set_epoch(loader: Iterable, number: int, first: int) -> None:
    """Tell a loader, or its sampler, which order is next and which batch, if it wants to know."""
    for owner in (loader, getattr(loader, "sampler", None)):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(number, first) if first else owner.set_epoch(number)


def score(means: dict) -> float:
    """What "best by validation" ranks by: the accuracy, or the loss where there is none."""
    return -means["loss"] if means["accuracy"] is None else means["accuracy"]


def describe(means: dict) -> str:
    """The accuracy, or the loss where there is none, for a reader."""
    if means["accuracy"] is None:
        return f"loss {means['loss']:.4f}"
    return f"{means['accuracy']:.2f} %"


def size_of(weights: list[MultiBitWeight]) -> dict:
    """The network's average bitwidth and its storage in bytes; None where nothing is quantized."""
    if not weights:
        return {"bitwidth": None, "storage_bytes": None}
    return {"bitwidth": average_bitwidth(weights), "storage_bytes": storage_bytes(weights)}
