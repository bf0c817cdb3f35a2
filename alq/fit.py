"""Adaptive quantization and post-training of any network, with any loss and any form of batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .command.report import expectation, format_bytes, layer_table
from .errors import InputError
from .extras.compiled import quantizer_kind
from .files.runlog import RunLog
from .machine.arithmetic import settle_cpu
from .method.weight import MultiBitWeight
from .training.epoch import LossFunction, classification, evaluate
from .training.loop import Training, describe, quantized_training, score, size_of, train_through
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
    """The stages --ALQ and --POSTTRAIN of the scripts, on a model that `quantize` has sketched.

    `weights` are trained by `alq.ALQ`, all other parameters by Adam. The model is left in eval
    mode, it and `weights` as they were after the best post-training epoch on `val_loader` (by
    accuracy, or by the loss where it counts no answers); without post-training, as pruning left
    them.

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
    settle_cpu()
    _check(weights, train_loader, val_loader)
    write = RunLog(Path(log)).write if log else _no_log
    loss = _loss_function(loss, weights[0].parameter.device)
    plan = pruning_plan(schedule, weights, len(train_loader))
    size = expected_size(plan, weights)
    write("plan", plan=str(plan), rounds=plan.rounds, expected=size)
    if progress:
        print(expectation(plan, size))
    bars = None if progress else False  # None: on a terminal
    go = partial(train_through, train=train_loader, val=val_loader, log=write, progress=bars)

    kind = quantizer_kind(compile)
    make = partial(quantized_training, model, weights, schedule, loss, kind=kind)
    training = make(plan=plan)
    go("alq", training, alq_schedule(schedule, plan.rounds), after_epoch=lambda epoch, val: None)
    seconds = training.seconds + _posttrain(make(), schedule, go)
    val = evaluate(model.eval(), val_loader, loss)
    result = {
        **size_of(weights),
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "rounds": plan.rounds,
        "seconds": round(seconds, 1),
    }
    write("result", **result)
    if progress:
        print(layer_table(weights), summary(weights, val), sep="\n\n")
    return result


def _posttrain(training: Training, schedule: Schedule, go: Callable) -> float:
    """Post-train and go back to the best epoch; the seconds it took."""
    model, weights = training.model, training.weights
    best = _snapshot(model, weights)

    def keep_best(epoch: Epoch, val: dict) -> None:
        nonlocal best
        if score(val) > training.best:
            training.best, best = score(val), _snapshot(model, weights)

    go("posttrain", training, posttrain_schedule(schedule), after_epoch=keep_best)
    _put_back(best, model, weights)
    return training.seconds


def _check(weights: list[MultiBitWeight], train: Iterable, val: Iterable) -> None:
    if not weights:
        raise InputError("weights: none given; pass what alq.quantize(model) returned")
    for name, loader in (("train_loader", train), ("val_loader", val)):
        if not isinstance(loader, Sized) or not len(loader):
            raise InputError(f"{name}: needs a length, its number of batches, of at least 1")


def _no_log(event: str, **fields: object) -> None:
    pass


def summary(weights: list[MultiBitWeight], val: dict) -> str:
    """One line: bitwidth, storage beside float32, score."""
    size = size_of(weights)
    full = 4 * sum(weight.grouping.numel for weight in weights)
    return (
        f"{size['bitwidth']:.3f} bit a weight, {format_bytes(size['storage_bytes'])} "
        f"(float32: {format_bytes(full)}), validation {describe(val)}"
    )


def _snapshot(model: nn.Module, weights: list[MultiBitWeight]) -> tuple[dict, list[dict]]:
    """Copies of all that makes the model."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [weight.state_dict() for weight in weights]


def _put_back(snapshot: tuple[dict, list[dict]], model: nn.Module, weights: list) -> None:
    model.load_state_dict(snapshot[0])
    for weight, state in zip(weights, snapshot[1], strict=True):
        weight.load_state_dict(state)


def _loss_function(loss: Callable, device: torch.device) -> LossFunction:
    """`loss` as the training loop calls it, on batches moved to `device`."""

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
    """The length of the batch's first tensor, 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, dict) else batch
    for part in parts if isinstance(parts, Iterable) else ():
        if isinstance(part, (Tensor, dict, tuple, list)):
            return _samples(part)
    return 1
