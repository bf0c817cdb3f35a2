"""Adaptive quantization and post-training of any network, with any loss and any form of batch."""

import copy
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .command.report import expectation, layer_table, network_lines
from .errors import InputError, NotFinite
from .extras.compiled import quantizer_class
from .extras.unit_sources import sources_to_fold
from .files.floats import FLOATS
from .files.runlog import RunLog
from .files.scalars import Scalars
from .method.checks import check_of_model, check_weights, list_of
from .method.weight import MultiBitWeight
from .training.batches import counted, loss_function
from .training.calibration import calibrate
from .training.epoch import Batches, LossFunction, classification, describe, evaluate, score
from .training.file_size import FileSize
from .training.loop import Training, quantized_training, rate_start, size_of, train
from .training.plan import expected_size, pruning_plan
from .training.progress import Progress
from .training.pruning import PruningPlan
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
    _check(model, weights, schedule)
    train_loader = counted(train_loader, "train_loader")
    val_loader = counted(val_loader, "val_loader")
    write = _writer(log, tensorboard)
    loss = loss_function(loss, weights[0].parameter.device)
    plan = _plan(schedule, model, weights, loss, train_loader)
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


def _plan(
    schedule: Schedule, model: nn.Module, weights: list[MultiBitWeight], loss: LossFunction,
    train_loader: Batches,
) -> PruningPlan:  # fmt: skip
    """Return all that will be pruned; for a `file_kb` `loss` on a batch shows the layers."""
    file = None
    if schedule.file_kb is not None:
        batch = next(iter(train_loader))
        sources = sources_to_fold(model, weights, lambda: loss(model, batch))
        file = FileSize.of(model, weights, FLOATS[FILE_FLOATS]).knowing(sources)
    return pruning_plan(schedule, weights, len(train_loader), rounded=False, file=file)


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


def _check(model: nn.Module, weights: list, schedule: Schedule) -> None:
    """Raise InputError for what can be seen to be wrong before any work."""
    check_weights(weights)
    for weight in weights:
        check_of_model(weight, model.parameters())
    if not isinstance(schedule, Schedule):
        raise InputError(f"schedule: is a {type(schedule).__name__}, no alq.Schedule", "schedule")
