"""What can be refused before any work: flags that do not fit each other, the network or the files.

All raise InputError, whose message names the flag, the value, what is allowed and what to do.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sized
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from ..data.loaders import Split
from ..errors import InputError
from ..files.packed import ENDING
from ..files.runlog import log_path
from ..method.network import groupings, quantizable
from ..method.structures import Grouping, coordinate_bytes
from ..training.pruning import removed_share
from .flags import one_or_each
from .resume import resume_path


def check_stages(args: Namespace, named: list[str]) -> None:
    """That there is something to do, and one thing at a time."""
    if not named and not args.EVAL:
        raise InputError(
            "nothing to do: give one or more of --PRETRAIN --ALQ --POSTTRAIN, or --EVAL FILE"
        )
    if named and args.EVAL:
        raise InputError(f"--EVAL {args.EVAL}: tests a finished file; give it without --{named[0]}")
    if getattr(args, "DOWNLOAD", False) and not args.PRETRAIN:
        raise InputError("--DOWNLOAD goes with --PRETRAIN: it fetches what that would train")
    if args.resume and args.EVAL:
        raise InputError("--resume: goes with the stages; --EVAL has nothing to go on with")


def check_numbers(args: Namespace) -> None:
    """Flags that do not fit each other."""
    cuts = args.milestones_pretrain
    if any(a >= b for a, b in pairwise(cuts)):
        raise InputError(
            f"--milestones_pretrain {' '.join(map(str, cuts))}: must rise; give each epoch once, "
            "in order"
        )
    if args.target_bit is not None and args.target_kb is not None:
        raise InputError(
            f"--target_bit {args.target_bit:g} --target_kb {args.target_kb:g}: give one of them"
        )


def asked_layers(
    args: Namespace, network: Callable[[], nn.Module]
) -> dict[str, tuple[Grouping, int]]:
    """By name, every layer's grouping and largest bitwidth as the flags ask for them."""
    with torch.device("meta"):
        model = network()
    return groupings(
        model, one_or_each(args.structure), one_or_each(args.subc), one_or_each(args.max_bit)
    )


def check_layers(args: Namespace, network: Callable[[], nn.Module]) -> None:
    """That structure, subc and max_bit fit the network's layers, and a target what they can be."""
    layers = asked_layers(args, network).values()
    numel = sum(grouping.numel for grouping, _ in layers)
    bits = sum(bit * grouping.numel for grouping, bit in layers)
    least = min(grouping.n for grouping, _ in layers)  # weights that share a coordinate
    limits = {
        "target_bit": (least / numel, bits / numel),
        "target_kb": (coordinate_bytes(least) / 1e3, 4 * numel / 1e3),
    }
    for unit, (low, high) in limits.items():
        value = getattr(args, unit)
        if value is not None and not low <= value <= high:
            raise InputError(
                f"--{unit} {value:g}: out of reach; one coordinate takes at least {low:.2g}, and "
                f"the network starts from at most {high:.4g}; give a value between"
            )


def check_same_layers(
    args: Namespace, network: Callable[[], nn.Module], states: list[dict], held_out: Sized
) -> None:
    """That the flags name what the checkpoint --model holds, which --POSTTRAIN goes on with.

    `states` are its multi-bit weights, `held_out` its validation images.
    """
    layers = asked_layers(args, network)
    for state in states:
        name, (grouping, bit) = state["name"], layers.get(state["name"], (None, None))
        if grouping is None:
            raise InputError(f"--model {args.model}: holds another network: it has {name}")
        found = (state["structure"], state["subc"], state["mask"].shape[1])
        asked = (grouping.structure, grouping.subc, bit)
        for flag, there, here in zip(("structure", "subc", "max_bit"), found, asked, strict=True):
            if there != here:
                raise InputError(
                    f"--{flag} {here}: {name} in --model {args.model} has {there}; give that"
                )
    if (there := len(held_out)) not in (0, args.val_size):
        raise InputError(
            f"--val_size {args.val_size}: --model {args.model} holds {there} images out; give that"
        )


def check_files(args: Namespace, named: list[str]) -> None:
    """That no file of the run takes another's place, and that they can be written."""
    if args.model.suffix == ENDING:
        raise InputError(f"--model {args.model}: {ENDING} is the packed file's ending; use .pth")
    posttrained = posttrained_path(args)
    own = {
        "--model": args.model,
        "--model_ori": args.model_ori,
        "the post-trained checkpoint": posttrained,
        "the packed file": args.model.with_suffix(ENDING),
        "the packed post-trained file": posttrained.with_suffix(ENDING),
        "the log": log_path(args),
        "the resume point": resume_path(args),
    }
    places: dict[Path, str] = {}
    for what, path in own.items():
        place = Path(os.path.abspath(path))
        if place in places:
            flag = "--model_ori" if "--model_ori" in (what, places[place]) else "--model"
            value = args.model_ori if flag == "--model_ori" else args.model
            raise InputError(
                f"{flag} {value}: {places[place]} and {what} would be one file, {path}; "
                "give another name"
            )
        places[place] = what
    for flag, path in written(args, named).items():
        check_writable(flag, path)


def written(args: Namespace, named: list[str]) -> dict[str, Path]:
    """By flag, the checkpoint that the named stages write in whose folder all else goes."""
    paths = {"--model_ori": args.model_ori} if "PRETRAIN" in named else {}
    return {**paths, "--model": args.model} if named else paths


def check_writable(flag: str, path: Path) -> None:
    """InputError unless `path` can be made or replaced. Nothing is created."""
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; give the name of a file in it")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(
            f"{flag} {path}: cannot be written, as {folder} is no folder; name another"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"{flag} {path}: cannot be written, as {folder} may not be written to; name another "
            "or change its permissions"
        )


def posttrained_path(args: Namespace) -> Path:
    """Where --POSTTRAIN saves: beside --model, which it leaves as --ALQ made it."""
    return args.model.with_name(f"{args.model.stem}_posttrained{args.model.suffix}")


def check_data(args: Namespace, network: Callable[[], nn.Module], data: Split) -> None:
    """That the network can learn from the data in such batches, and ALQ prune in them."""
    with torch.device("meta"):
        model, pictures = network().eval(), torch.empty(1, *data.shape)
    outputs = list(quantizable(model).values())[-1].shape[0]
    if not 0 <= data.labels.start < data.labels.stop <= outputs:
        raise InputError(
            f"--data {args.data}: has labels {data.labels.start} to {data.labels.stop - 1}, but "
            f"the network tells 0 to {outputs - 1} apart; give the data it is made for"
        )
    try:
        model(pictures)
    except RuntimeError as error:
        raise InputError(
            f"--data {args.data}: pictures of shape {data.shape} do not fit the network; give the "
            "data it is made for"
        ) from error
    if args.ALQ and args.target_bit is None and args.target_kb is None:
        removed_share(args, len(data.train))
