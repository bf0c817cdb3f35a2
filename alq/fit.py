"""Adaptive quantization and post-training of any network, with any loss and any form of batch."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .command.report import expectation, layer_table, network_lines
from .errors import InputError, NotFinite
from .extras.compiled import quantizer_class
from .extras.unit_sources import sources_to_fold
from .files.floats import FLOATS
from .files.runlog import RunLog
from .files.scalars import Scalars
from .machine.processes import tensors_in
from .method.checks import check_of_model, check_weights, list_of
from .method.weight import MultiBitWeight
from .training.calibration import calibrate
from .training.epoch import (
    Batches,
    LossFunction,
    check_probabilities,
    classification,
    describe,
    evaluate,
    score,
)
from .training.file_size import FileSize
from .training.loop import Counted, Training, quantized_training, rate_start, size_of, train
from .training.plan import expected_size, pruning_plan
from .training.progress import Progress
from .training.schedule import Epoch, Schedule, alq_schedule, posttrain_schedule

FILE_FLOATS = "6bit"  # of the file that `Schedule.file_kb` is about


def fit(
    model: nn.Module,
    weights: list[MultiBitWeight],
    train_loader: Batches,
    val_loader: Batches,
    loss: Callable = classification,
    schedule: Schedule | None = None,
    log: str | Path | None = None,
    progress: bool = True,
    compile: bool = False,
    tensorboard: str | Path | None = None,
) -> dict:
    """Run the stages --ALQ and --POSTTRAIN on a model that `quantize` has sketched.

    `weights` are trained by `alq.ALQ`, all other parameters by Adam. The model is left in eval
    mode, it and `weights` as they were after the best post-training epoch on `val_loader` (by
    accuracy, or by the loss where it counts no answers); without post-training, as pruning left
    them. Activations that `quantize_activations` has put there fit themselves to the first batches
    of each stage, before its first step. The process is left as it was; on a CPU
    `alq.machine.arithmetic.settle_cpu()`, called once before, changes it so that the steps take a
    fraction of the time (as the scripts do).

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
        compile: compile the quantizer's steps (`CompiledALQ`); to compile the model too, do so
            before the call.
        tensorboard: a folder that gets the log's numbers for TensorBoard.

    Returns: bitwidth, storage_bytes, val_loss, val_accuracy (percent, None if not counted), rounds,
    seconds.
    Raises: InputError for what cannot be done as asked; it names the layer or the value. NotFinite
    where numbers become NaN or infinite. After an error, or Ctrl-C, model and weights are as after
    the last good epoch.
    """
    schedule = Schedule() if schedule is None else schedule
    weights = list_of(weights)
    check_weights(weights)
    _check(model, weights, train_loader, val_loader, schedule)
    train_loader = Counted(train_loader, "train_loader")
    val_loader = Counted(val_loader, "val_loader")
    write = _writer(log, tensorboard)
    loss = _loss_function(loss, weights[0].parameter.device)
    file = None
    if schedule.file_kb is not None:
        file = _file_size(model, weights, loss, next(iter(train_loader)))
    plan = pruning_plan(schedule, weights, len(train_loader), rounded=False, file=file)
    write("plan", plan=str(plan), rounds=plan.rounds, expected=expected_size(plan, weights))
    bars = Progress(None if progress else False)  # None: on a terminal
    bars.stages = {
        "alq": alq_schedule(schedule, plan.rounds),
        "posttrain": posttrain_schedule(schedule),
    }
    if progress:
        print(bars, expectation(plan, weights), sep="\n")

    quantizer = quantizer_class(compile)
    adaptive = quantized_training("alq", model, weights, schedule, loss, plan, quantizer)
    last = quantized_training("posttrain", model, weights, schedule, loss, None, quantizer)
    _train_both(adaptive, last, train_loader, val_loader, write, bars)

    val = evaluate(model, val_loader, loss)
    result = {
        **size_of(weights),
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "rounds": plan.rounds,
        "seconds": round(adaptive.seconds + last.seconds, 1),
    }
    write("result", stage="posttrain", **result)
    if progress:
        print(layer_table(weights), network_lines(model, weights), sep="\n\n")
        print(f"validation {describe(val)}")
    return result


def _train_both(
    adaptive: Training, last: Training, train_loader: Batches, val_loader: Batches,
    write: Callable[..., None], bars: Progress,
) -> None:  # fmt: skip
    """Train through the epochs of both stages, which `bars` holds.

    However it ends, model and weights are as they were last good.
    """
    kept, loaders = _Kept(adaptive.model, adaptive.weights), (train_loader, val_loader)
    alq_epochs, posttrain_epochs = bars.stages["alq"], bars.stages["posttrain"]
    try:
        calibrate(adaptive, train_loader)
        train(adaptive, alq_epochs, *loaders, write, kept.after(adaptive), progress=bars)
        if posttrain_epochs:
            calibrate(last, train_loader)
        rate_start(last, val_loader, write)
        kept.copy(kept.when)  # with its levels as they were rated
        train(last, posttrain_epochs, *loaders, write, kept.after(last), progress=bars)
    except NotFinite as error:
        raise NotFinite(f"{error}. Model and weights are as they were {kept.when}") from error
    finally:
        kept.put_back()


def _file_size(
    model: nn.Module, weights: list[MultiBitWeight], loss: LossFunction, batch: object
) -> FileSize:
    """Return how large the packed file will be, of which `loss` on a batch shows the layers."""
    sources = sources_to_fold(model, weights, lambda: loss(model, batch))
    return FileSize.of(model, weights, FLOATS[FILE_FLOATS]).knowing(sources)


def _writer(log: str | Path | None, tensorboard: str | Path | None) -> Callable[..., None]:
    """Return what writes an event wherever it is asked for."""
    scalars = Scalars(tensorboard) if tensorboard else None
    if log:
        return RunLog(Path(log), scalars).write
    return scalars or (lambda event, **fields: None)


class _Kept:
    """A network and its multi-bit weights as they were last good, which is said in `when`."""

    def __init__(self, model: nn.Module, weights: list[MultiBitWeight]) -> None:
        self.model, self.weights = model, weights
        self.copy("before the first epoch")

    def after(self, training: Training) -> Callable[[Epoch, dict], None]:
        """Return what copies them after an epoch, in post-training only if it is the best."""

        def keep(epoch: Epoch, val: dict) -> None:
            if training.stage == "alq" or score(val) > training.best:
                training.best = score(val)
                self.copy(f"after epoch {training.epochs_done} of {training.stage}")

        return keep

    def put_back(self) -> None:
        """Make them again what they were, in eval mode."""
        self.model.load_state_dict(self.state)
        for weight, state in zip(self.weights, self.states, strict=True):
            weight.load_state_dict(state)
        self.model.eval()

    def copy(self, when: str) -> None:
        """Take them as they are now for the last good ones."""
        self.when, self.state = when, copy.deepcopy(self.model.state_dict())
        self.states = [weight.state_dict() for weight in self.weights]


def _check(
    model: nn.Module, weights: list, train: Batches, val: Batches, schedule: Schedule
) -> None:
    """Raise InputError for what can be seen to be wrong before any work."""
    for weight in weights:
        check_of_model(weight, model.parameters())
    if not isinstance(schedule, Schedule):
        raise InputError(f"schedule: is a {type(schedule).__name__}, no alq.Schedule", "schedule")
    for name, loader in (("train_loader", train), ("val_loader", val)):
        try:
            length = 0 if isinstance(loader, Iterator) else len(loader)
        except TypeError:  # also of a DataLoader over a data set without length
            length = 0
        if not length:
            raise InputError(
                f"{name}: needs a length, its number of batches, of at least 1, and to give them "
                "anew each time; pass a list, or a DataLoader over a data set with a length",
                name,
            )


def _loss_function(loss: Callable, device: torch.device) -> LossFunction:
    """Return `loss` as the training loop calls it, on batches moved to `device`."""
    if not callable(loss) or isinstance(loss, nn.modules.loss._Loss):
        raise InputError(
            f"loss: is a {type(loss).__name__}; give a function (model, batch) -> loss, such as "
            "lambda model, batch: criterion(model(batch[0]), batch[1])",
            "loss",
        )
    seen = False

    def on_device(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None, int]:
        nonlocal seen
        batch = _moved(batch, device)
        sizes = [tensor.numel() for tensor in tensors_in(batch)]
        if sizes and not any(sizes):
            raise InputError("a loader gave a batch of no samples; let it leave such batches out")
        result = loss(model, batch)
        if loss is classification and not seen:
            _, y = batch
            check_probabilities(y)  # of the first batch alone: it waits for the device
        seen = True
        if not isinstance(result, (tuple, list)):
            result = result, None, _samples(batch)
        fits = len(result) == 3 and isinstance(result[0], Tensor) and result[2] is not None
        fits = fits and all(x is None or torch.as_tensor(x).numel() == 1 for x in result)
        if not fits or (torch.is_grad_enabled() and not result[0].requires_grad):
            raise InputError(
                "loss: must return the mean loss, a tensor of one number that depends on what is "
                "trained; or it, the number of correct answers and that of samples",
                "loss",
            )
        return result[0].reshape(()), *result[1:]

    return on_device


def _moved(batch: Any, device: torch.device) -> Any:
    if callable(move := getattr(batch, "to", None)):  # also packed sequences, and other libraries'
        return move(device)
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)  # of its class, which may have its items as attributes, too
        attributes = getattr(moved, "__dict__", {})
        for key, value in batch.items():
            moved[key] = _moved(value, device)
            if key in attributes:
                attributes[key] = moved[key]
        return moved
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        same: Any = copy.copy(batch)
        for name in (field.name for field in dataclasses.fields(batch)):
            if hasattr(batch, name):
                value = _moved(getattr(batch, name), device)
                object.__setattr__(same, name, value)  # also of frozen ones
        return same
    if isinstance(batch, (tuple, list)):
        parts = [_moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _samples(batch: object) -> int:
    """Return the length of the batch's first tensor that has one, 1 where there is none."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)
