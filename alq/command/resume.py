"""Going on after an interruption: a stage's state, saved while it runs.

A command has one resume point, the last: saved when a stage begins, after each of its epochs, every
--save_every minutes within one, and when the run is asked to stop. It holds all that the rest of
the stage depends on, so that whatever was done since is done again, and comes out the same.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..files.checkpoint import load_checkpoint, load_model, read_checksum, save_checkpoint
from ..files.paths import RunFiles, part
from ..files.runlog import plain_flags
from ..machine import processes
from ..machine.interruption import Stopped
from ..training.epoch import EpochSoFar
from ..training.loop import Training
from .checks import check_dataset
from .flags import MAY_CHANGE, NOT_COMPARED
from .recipe import Recipe
from .shared import Run, plain_state

OFF = {"act_bit": 0, "fold": False}  # what flags were before there were such
SAVE = 1  # what a process wishes after a step: this, an exit code (above 128), or nothing


def what_is_left(
    files: RunFiles, args: Namespace, recipe: Recipe, stages: list[str]
) -> tuple[dict | None, list[str]]:
    """Return the resume point of the interrupted run, None without one, and what it has to do.

    Raises: InputError names what differs from that run, or from one that has finished.
    """
    path, last = files.resume_point, stages[-1].lower()
    if path.exists():
        point = load_checkpoint(path, recipe.net)
        if "target" not in point:  # older versions' have none
            raise InputError(f"{path} is no resume point; delete it to start anew")
        check_dataset(recipe, point.get("dataset"), f"--resume: {path}")
        stage, target = point["stage"].upper(), name_of_target(files, point["stage"])
        if stage not in stages:
            raise or_anew(f"--resume: the run to resume was in --{stage}; name that stage")
        if point["target"] != target:
            theirs = f"{path} is of a run that writes {point['target']}, not {target}"
            raise or_anew(f"--resume: {theirs}; name that, give another --model")
        check_same_run(point, files, args, "the run to resume", MAY_CHANGE)
        return point, stages[stages.index(stage) :]
    made = files.target(last)
    found = load_checkpoint(made, recipe.net) if made.exists() else {}
    if found.get("stage") != last or not found.get("finished"):
        note(f"no resume point {path}; starting anew")
        return None, stages
    check_dataset(recipe, found.get("dataset"), f"--resume: {made}")
    may_change = {*MAY_CHANGE, "processes"} - {"floats", "coded", "fold"}
    check_same_run(found, files, args, f"the run that made {made}", may_change)
    note(f"nothing to resume: {made} is finished; without --resume it is made anew")
    return None, []


def name_of_target(files: RunFiles, stage: str) -> str:
    """Return what `stage` writes, seen from the resume point, with which it may be moved."""
    return os.path.relpath(files.target(stage), files.resume_point.parent)


def check_same_run(
    saved: Mapping, files: RunFiles, args: Namespace, whose: str, but: Collection[str]
) -> None:
    """Raise InputError unless the run that `saved` this had these flags, `but` some, and files."""
    stage, flags = saved["stage"], saved.get("flags", {})
    but = {*but, *NOT_COMPARED, *(["DOWNLOAD"] if stage != "pretrain" else [])}
    if stage == "alq" and args.file_kb is not None:
        but -= {"floats"}  # which its pruning counts
    for flag, value in compared_flags(args).items():
        theirs = flags.get(flag, OFF.get(flag))
        if flag not in but and value != theirs:
            raise or_anew(f"--{flag} {value}: {whose} had {theirs}; give that")
    sources = files.sources(stage)
    for path, checksum in zip(sources, saved.get("sources", ()), strict=False):
        if path.exists() and read_checksum(path) != checksum:
            raise or_anew(f"{path} is not the file that {whose} started from; put that back")


def or_anew(text: str) -> InputError:
    """Return the error that ends in the way out which always works."""
    return InputError(f"{text}, or start anew without --resume")


def note(text: str) -> None:
    """Print a line on stderr, of several processes in the main one."""
    if processes.is_main():
        print(f"note: {text}", file=sys.stderr)


def compared_flags(args: Namespace) -> dict:
    """Return the flags and the number of processes, as plain values."""
    return {**plain_flags(args), "processes": processes.process_count()}


class ResumePoints:
    """Saves the resume points of one stage, and puts it back to one.

    Attributes:
        sources: the checksum of the checkpoint that the stage reads, if it reads one.
    """

    def __init__(self, run: Run, training: Training) -> None:
        self.run, self.training = run, training
        self.part = part(run.files.target(training.stage))
        self.sources = [read_checksum(path) for path in run.files.sources(training.stage)]
        self.saved = time.monotonic()

    def save_if_due(self, between_epochs: bool) -> None:
        """Save between epochs, where it is time to and where the run is asked to stop.

        Raises: Stopped in the last case.
        """
        minutes = (time.monotonic() - self.saved) / 60
        due = between_epochs or 0 < self.run.args.save_every <= minutes
        wish = processes.largest_over_processes(self.run.interruption.code or due * SAVE)
        if wish:
            self.save()
        if wish > SAVE:
            raise Stopped(wish)

    def save(self) -> None:
        """Save all that the rest of the stage depends on; NotFinite if that is none to go on from.

        The order and the augmentation of an epoch follow from the seed and its number.
        """
        self.training.check_finite()
        run, stage, main = self.run, self.training.stage, processes.is_main()
        state = {
            "net": run.recipe.net,
            "dataset": run.recipe.dataset,
            "stage": stage,
            "target": name_of_target(run.files, stage),
            "part": load_checkpoint(self.part, None) if main and self.part.exists() else None,
            "flags": compared_flags(run.args),
            "sources": self.sources,
            "log_size": run.log.size() if main else 0,
            "generators": generator_states(run.args.device),
            **training_state(self.training),
        }
        save_checkpoint(run.files.resume_point, state)
        self.saved = time.monotonic()

    def restore(self) -> bool:
        """Put training, generators, log and part file back to where the run's point was saved.

        Returns: whether they were; without a point of this stage it begins anew.
        """
        point = self.run.point
        if point is not None and point["stage"] != self.training.stage:
            point = None
        if point is not None and point["part"] is not None:
            save_checkpoint(self.part, point["part"])
        elif processes.is_main():
            self.part.unlink(missing_ok=True)
        if point is None:
            return False
        load_training(self.training, point)
        torch.set_rng_state(point["generators"]["cpu"])
        if "cuda" in point["generators"] and self.run.args.device.type == "cuda":
            torch.cuda.set_rng_state(point["generators"]["cuda"], self.run.args.device)
        if processes.is_main():
            self.run.log.truncate(point["log_size"])
        return True


def training_state(training: Training) -> dict:
    """Return tensors and plain values on the CPU, of the stage and of the epoch under way."""
    totals = training.epoch.totals
    sums = [totals.loss, totals.correct, totals.count]
    sums = [x.cpu() if isinstance(x, Tensor) else x for x in sums]
    return {
        "epochs_done": training.epochs_done,
        "seconds": training.seconds,
        "best": training.best,
        "batches": training.epoch.batches,
        "epoch_seconds": training.epoch.elapsed() if training.epoch.batches else 0.0,
        "sums": processes.gather_from_all(sums),  # of each process
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
    sums = (x.to(device) if isinstance(x, Tensor) else x for x in state["sums"][processes.rank()])
    totals.loss, totals.correct, totals.count = sums


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's own generators: the host's, and that of `device` if on CUDA.

    No other device is touched, which a forked process may not even do.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
