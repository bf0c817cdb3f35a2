"""Training through a schedule: what the scripts' stages and `alq.fit` stand on."""

from __future__ import annotations

import dataclasses
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from . import parallel
from .errors import InputError
from .multibit import MultiBitWeight
from .network import average_bitwidth, storage_bytes
from .optimizer import ALQ
from .pruning import PruneByRatio, PruneToTarget
from .schedule import Epoch, Schedule
from .training import LossFunction, classification, evaluate, train_epoch


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

    def check_same_everywhere(self, when: str) -> None:
        """Of several processes: give all the same running statistics, compare all the rest."""
        parallel.share_buffers(self.model)
        states = [list(optimizer.state.values()) for optimizer in self.optimizers]
        weights = [vars(weight) for weight in self.weights]
        parallel.check_same([self.model.state_dict(), states, weights], when)


def quantized_training(
    model: nn.Module,
    weights: list[MultiBitWeight],
    schedule: Schedule | Namespace,
    loss: LossFunction = classification,
    plan: PruneByRatio | PruneToTarget | None = None,
) -> Training:
    """ALQ for the multi-bit weights, Adam for all other parameters. Without `plan`, no pruning."""
    quantizer = ALQ(
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
            with parallel.same_arithmetic():
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
    steps = {kind: all_of(step) for kind, step in steps.items()}
    return Training(model, optimizers, steps, weights, loss)


def train_through(
    stage: str,
    training: Training,
    epochs: list[Epoch],
    train: Iterable,
    val: Iterable,
    log: Callable[..., None],
    after_epoch: Callable[[Epoch, dict], None],
    progress: bool | None = None,
) -> None:
    """Train through what is left of `epochs`; after each: evaluate, log, `after_epoch`.

    Arguments:
        train, val: batches, in the form that `training.loss` takes; `train` has a length.
        log: called with an event's name and its fields.
        after_epoch: called with the epoch and its means on `val` (`training.evaluate`).
        progress: shows a bar; None shows it where the output is a terminal.
    """
    network = parallel.replicate(training.model)
    if not parallel.is_main():
        progress = False
    while training.epochs_done < len(epochs):
        started = time.monotonic()
        number, epoch = training.epochs_done, epochs[training.epochs_done]
        prepare(training, epoch)
        set_epoch(train, number)
        title = f"{stage} {number + 1}/{len(epochs)} {epoch.kind}"
        disable = None if progress is None else not progress
        with tqdm(total=len(train), desc=title, unit="batch", disable=disable) as bar:
            step = training.steps[epoch.kind]
            shares = getattr(train, "loss_shares", None)  # of each batch's loss: `parallel.Share`
            means = train_epoch(network, counted(train, bar), step, training.loss, shares)
            training.check_same_everywhere(title)
            val_means = evaluate(training.model, val, training.loss)
            size = size_of(training.weights)
            bar.set_postfix_str(
                f"loss {means['loss']:.4f}, val {describe(val_means)}"
                + (f", {size['bitwidth']:.3f} bit" if training.weights else "")
            )
        check_finite(title, epoch, means["loss"])
        seconds = time.monotonic() - started
        training.seconds += seconds
        training.epochs_done += 1
        log(
            "epoch",
            stage=stage,
            epoch=number + 1,
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


def prepare(training: Training, epoch: Epoch) -> None:
    """The epoch's rate, and the network's mode."""
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = epoch.lr
    training.model.train(epoch.kind != "prune")  # a pruning epoch keeps the running statistics


def counted(batches: Iterable, bar: tqdm) -> Iterator:
    """The batches; the bar stays open after the last one, for what `evaluate` then finds."""
    for batch in batches:
        yield batch
        bar.update()


def check_finite(title: str, epoch: Epoch, loss: float) -> None:
    """InputError if an epoch's loss is no number to go on from."""
    if not math.isfinite(loss):
        raise InputError(
            f"{title}: the loss is {loss}; try a lower rate (it was {epoch.lr:g}). "
            "The files hold the epochs before"
        )


def set_epoch(loader: Iterable, number: int) -> None:
    """Tell a loader, or its sampler, which order is next, if it wants to know."""
    for owner in (loader, getattr(loader, "sampler", None)):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(number)


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
