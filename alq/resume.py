"""Going on after an interruption: the state of a stage, saved after each of its epochs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from .checkpoint import load_checkpoint, save_checkpoint
from .errors import InputError
from .loop import Training
from .runlog import plain_flags

# Flags that may differ between a run and its resumption: none of them changes what is computed.
MAY_CHANGE = {
    "PRETRAIN", "ALQ", "POSTTRAIN", "DOWNLOAD", "EVAL", "resume",
    "data", "model_ori", "model", "device", "threads", "workers",
}  # fmt: skip


def resume_path(args: Namespace, stage: str) -> Path:
    """Where `stage` saves what --resume needs. Stays until the whole command has finished."""
    return args.model.with_name(f"{args.model.stem}_{stage}.resume")


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU, contiguous."""
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def save_resume_point(args: Namespace, net: str, stage: str, training: Training) -> None:
    """Save all that the stage's next epoch depends on.

    The order and the augmentation of an epoch follow from the seed and its number.
    """
    state = {
        "net": net,
        "flags": plain_flags(args),
        "epochs_done": training.epochs_done,
        "seconds": training.seconds,
        "best": training.best,
        "model": plain_state(training.model),
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
    }
    save_checkpoint(resume_path(args, stage), state)


def resume(args: Namespace, net: str, stage: str, training: Training) -> None:
    """With --resume, put `training` back to the end of the last epoch that `stage` finished.

    Raises: InputError names a flag that differs from the interrupted run's.
    """
    path = resume_path(args, stage)
    if not (args.resume and path.exists()):
        return
    state = load_checkpoint(path, net)
    for flag, value in plain_flags(args).items():
        saved = state["flags"].get(flag)
        if flag not in MAY_CHANGE and value != saved:
            raise InputError(
                f"--{flag} {value}: the run to resume had {saved}; give that, or start anew "
                "without --resume"
            )
    training.model.load_state_dict(state["model"])
    for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    training.epochs_done, training.seconds = state["epochs_done"], state["seconds"]
    training.best = state["best"]
