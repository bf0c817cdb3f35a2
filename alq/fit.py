"""Adaptive quantization and post-training of any network, with any loss and any form of batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from pathlib import Path

import torch
from torch import Tensor, nn

from .command.report import expectation, format_bytes, layer_table
from .errors import InputError
from .extras.compiled import quantizer_class
from .files.runlog import RunLog
from .method.weight import MultiBitWeight
from .training.epoch import (
    LossFunction,
    classification,
    describe,
    evaluate,
    frozen_modules,
    score,
)
from .training.loop import Training, quantized_training, rate_start, size_of, train
from .training.pruning import expected_size, pruning_plan
from .training.schedule import Epoch, Schedule, alq_schedule, posttrain_schedule


def fit(
    model: nn.Module,
    weights: list[MultiBitWeight],
    train_loader: Iterable,
    val_loader: Iterable,
    loss: Callable = classification,
    schedule: Schedule | None = None,
    log: str | Path | None = None,
    progress: bool = True,
    compile: bool = False,
) -> dict:
    """Run the stages --ALQ and --POSTTRAIN on a model that `quantize` has sketched.

    `weights` are trained by `alq.ALQ`, all other parameters by Adam. The model is left in eval
    mode, it and `weights` as they were after the best post-training epoch on `val_loader` (by
    accuracy, or by the loss where it counts no answers); without post-training, as pruning left
    them. The process is left as it was; on a CPU `alq.machine.arithmetic.settle_cpu()`, called once
    before, changes it so that the steps take a fraction of the time (as the scripts do).

    Arguments:
        model: on its device; batches are moved there.
        weights: what `alq.quantize(model, ...)` returned.
        train_loader, val_loader: anything with a length that can be iterated over again and again,
            such as a `DataLoader`; a batch is a tuple, list or dict, as `loss` takes it.
        loss: (model, batch) -> mean loss over the batch; or -> (mean loss, number of correct
            answers, number of samples). The default takes batches (x, y) and is the cross entropy.
        schedule: epochs, rates, pruning and targets; None takes the paper's for LeNet5.
        log: a file that gets one JSON line per epoch.
        progress: shows bars and prints the result.
        compile: the quantizer's steps by `torch.compile` (`CompiledALQ`); the model is yours.

    Returns: bitwidth, storage_bytes, val_loss, val_accuracy (percent, None if not counted), rounds,
    seconds.
    Raises: InputError for what cannot be done as asked; it names the layer or the value.
    """
    schedule = schedule or Schedule()
    _check(weights, train_loader, val_loader)
    write = RunLog(Path(log)).write if log else _no_log
    bars = None if progress else False  # None: on a terminal
    loss = _loss_function(loss, weights[0].parameter.device)
    optimizer = quantizer_class(compile)

    plan = pruning_plan(schedule, weights, len(train_loader))
    size = expected_size(plan, weights)
    write("plan", plan=str(plan), rounds=plan.rounds, expected=size)
    if progress:
        print(expectation(plan, size))
    frozen = frozen_modules(model)
    adaptive = quantized_training("alq", model, weights, schedule, loss, plan, optimizer)
    adaptive.frozen = frozen
    epochs = alq_schedule(schedule, plan.rounds)
    train(adaptive, epochs, train_loader, val_loader, write, _do_nothing, progress=bars)

    last = quantized_training("posttrain", model, weights, schedule, loss, optimizer=optimizer)
    last.frozen = frozen
    rate_start(last, val_loader, write)
    best = _Best(last)
    epochs = posttrain_schedule(schedule)
    train(last, epochs, train_loader, val_loader, write, best.keep, progress=bars)
    best.put_back()

    val = evaluate(model.eval(), val_loader, loss)
    result = {
        **size_of(weights),
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "rounds": plan.rounds,
        "seconds": round(adaptive.seconds + last.seconds, 1),
    }
    write("result", **result)
    if progress:
        print(layer_table(weights), summary(weights, val), sep="\n\n")
    return result


class _Best:
    """The network and its multi-bit weights after the best epoch of `training` so far."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.copy = self._copy()

    def keep(self, epoch: Epoch, val: dict) -> None:
        """Copy them if the means `val` are the best so far."""
        if score(val) > self.training.best:
            self.training.best, self.copy = score(val), self._copy()

    def put_back(self) -> None:
        """Make them again what they were then."""
        state, states = self.copy
        self.training.model.load_state_dict(state)
        for weight, saved in zip(self.training.weights, states, strict=True):
            weight.load_state_dict(saved)

    def _copy(self) -> tuple[dict, list[dict]]:
        state = {key: value.clone() for key, value in self.training.model.state_dict().items()}
        return state, [weight.state_dict() for weight in self.training.weights]


def _check(weights: list[MultiBitWeight], train: Iterable, val: Iterable) -> None:
    if not weights:
        raise InputError("weights: none given; pass what alq.quantize(model) returned", "weights")
    for name, loader in (("train_loader", train), ("val_loader", val)):
        if not isinstance(loader, Sized) or not len(loader):
            raise InputError(f"{name}: needs a length, its number of batches, of at least 1", name)


def _no_log(event: str, **fields: object) -> None:
    pass


def _do_nothing(epoch: Epoch, val: dict) -> None:
    pass


def summary(weights: list[MultiBitWeight], val: dict) -> str:
    """Return one line: bitwidth, storage beside float32, score."""
    size = size_of(weights)
    full = 4 * sum(weight.grouping.numel for weight in weights)
    return (
        f"{size['bitwidth']:.3f} bit a weight, {format_bytes(size['storage_bytes'])} "
        f"(float32: {format_bytes(full)}), validation {describe(val)}"
    )


def _loss_function(loss: Callable, device: torch.device) -> LossFunction:
    """Return `loss` as the training loop calls it, on batches moved to `device`."""

    def on_device(model: nn.Module, batch: object) -> tuple[Tensor, Tensor | None, int]:
        batch = _moved(batch, device)
        result = loss(model, batch)
        if isinstance(result, Tensor):
            return result, None, _samples(batch)
        return result

    return on_device


def _moved(batch: object, device: torch.device) -> object:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _samples(batch: object) -> int:
    """Return the length of the batch's first tensor, 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, dict) else batch
    for part in parts if isinstance(parts, Iterable) else ():
        if isinstance(part, (Tensor, dict, tuple, list)):
            return _samples(part)
    return 1
