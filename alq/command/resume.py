"""Going on after an interruption: a stage's state, saved while it runs.

A command has one resume point, the last: saved when a stage begins, after each of its epochs, every
--save_every minutes within one, and when the run is asked to stop. Its result files are written
before it, so that whatever was killed in between is done again, and comes out the same.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.checkpoint import load_checkpoint, load_model, read_checksum, save_checkpoint
from ..files.runlog import RunLog, plain_flags
from ..machine import processes
from ..machine.interruption import Interruption, Stopped
from ..training.epoch import EpochSoFar
from ..training.loop import Training
from .flags import MAY_CHANGE, NOT_COMPARED

SAVE = 1  # what a process wishes after a step: this, an exit code (above 128), or nothing


def read_point(path: Path, args: Namespace, net: str, stages: list[str]) -> dict | None:
    """Return the resume point that the interrupted command left at `path`, None if there is none.

    Raises: InputError names what differs from the interrupted run.
    """
    if not path.exists():
        return None
    point = load_checkpoint(path, net)
    if "epochs_done" not in point:
        raise InputError(f"{path} is no resume point; delete it to start anew")
    if point["stage"].upper() not in stages:
        raise InputError(
            f"--resume: the run to resume was in --{point['stage'].upper()}; name that stage, or "
            "start anew without --resume"
        )
    for flag, value in compared_flags(args).items():
        saved = point["flags"].get(flag)
        if flag not in (*MAY_CHANGE, *NOT_COMPARED) and value != saved:
            raise InputError(
                f"--{flag} {value}: the run to resume had {saved}; give that, or start anew "
                "without --resume"
            )
    return point


def compared_flags(args: Namespace) -> dict:
    """Return the flags and the number of processes, as plain values."""
    return {**plain_flags(args), "processes": processes.process_count()}


class ResumePoints:
    """Saves the resume points of one stage, and puts it back to one."""

    def __init__(
        self,
        path: Path,
        args: Namespace,
        net: str,
        training: Training,
        log: RunLog,
        interruption: Interruption,
        source: Path | None,
    ) -> None:
        """`source` is the checkpoint that the stage started from, if from one."""
        self.path, self.args, self.net = path, args, net
        self.training, self.log, self.interruption = training, log, interruption
        self.source = source
        self.saved = time.monotonic()

    def save_if_due(self, between_epochs: bool) -> None:
        """Save between epochs, where it is time to and where the run is asked to stop.

        Raises: Stopped in the last case.
        """
        minutes = (time.monotonic() - self.saved) / 60
        due = between_epochs or 0 < self.args.save_every <= minutes
        wish = processes.largest_over_processes(self.interruption.code or due * SAVE)
        if wish:
            self.save()
        if wish > SAVE:
            raise Stopped(wish)

    def save(self) -> None:
        """Save all that the rest of the stage depends on; NotFinite if that is none to go on from.

        The order and the augmentation of an epoch follow from the seed and its number.
        """
        self.training.check_finite()
        state = {
            "net": self.net,
            "stage": self.training.stage,
            "flags": compared_flags(self.args),
            "source": self.source and read_checksum(self.source),
            "log_size": self.log.size() if processes.is_main() else 0,
            "generators": generator_states(),
            **training_state(self.training),
        }
        save_checkpoint(self.path, state)
        self.saved = time.monotonic()

    def restore(self, point: dict | None) -> bool:
        """Put training, generators and log back to where `point` was saved.

        Returns: whether it was; a point of another stage, or none, changes nothing.
        """
        if point is None or point["stage"] != self.training.stage:
            return False
        if point["source"] != (self.source and read_checksum(self.source)):
            raise InputError(
                f"{self.source} is not the file that the run to resume started from; put that "
                "back, or start anew without --resume"
            )
        load_training(self.training, point)
        torch.set_rng_state(point["generators"]["cpu"])
        if "cuda" in point["generators"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(point["generators"]["cuda"])
        if processes.is_main():
            self.log.truncate(point["log_size"])
        return True


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU, contiguous; InputError if it holds more than tensors."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: is no tensor, and a checkpoint holds nothing else")
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def training_state(training: Training) -> dict:
    """Return tensors and plain values on the CPU, of the stage and of the epoch under way."""
    totals = training.epoch.totals
    sums = [x.cpu() if isinstance(x, Tensor) else x for x in (totals.loss, totals.correct)]
    return {
        "epochs_done": training.epochs_done,
        "seconds": training.seconds,
        "best": training.best,
        "batches": training.epoch.batches,
        "epoch_seconds": training.epoch.elapsed() if training.epoch.batches else 0.0,
        "sums": processes.gather_from_all([*sums, totals.count]),  # of each process
        "model": plain_state(training.model),
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
    }


def load_training(training: Training, state: dict) -> None:
    """Put `training` back to where `training_state` gave `state`."""
    load_model(training.model, state["model"], "the resume point")
    for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    training.epochs_done, training.seconds = state["epochs_done"], state["seconds"]
    training.best = state["best"]
    training.epoch = EpochSoFar(batches=state["batches"], seconds=state["epoch_seconds"])
    totals, device = training.epoch.totals, next(training.model.parameters()).device
    *sums, totals.count = state["sums"][processes.rank()]
    totals.loss, totals.correct = (x.to(device) if isinstance(x, Tensor) else x for x in sums)


def generator_states() -> dict[str, Tensor]:
    """Return the states of torch's own generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
