"""What can be refused before any work: flags that do not fit each other, the network or the files.

All raise InputError, whose message names the flag, the value, what is allowed and what to do.
"""

import os
from argparse import Namespace
from collections.abc import Sized
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from ..data.loaders import Split
from ..errors import InputError
from ..files.floats import FLOATS
from ..files.packed import check_floats
from ..files.paths import PACKED_ENDING, RunFiles, packed, part
from ..method.network import groupings, quantizable
from ..training.file_size import FileSize
from ..training.plan import pruning_plan, read_target
from ..training.pruning import PruningPlan
from ..training.sizes import Layers, SketchedLayer
from .flags import grouping_options
from .recipe import Recipe

OWN_ENDINGS = {PACKED_ENDING: "the packed file", ".jsonl": "the log", ".resume": "a resume point"}


def check_flags(args: Namespace, recipe: Recipe, stages: list[str]) -> None:
    """Check all that follows from the flags alone; `stages` are those that they name."""
    check_task(args, stages)
    check_milestones(args)
    if args.act_from and not args.act_bit:
        raise InputError(f"--act_from {args.act_from}: goes with --act_bit, which is 0")
    check_packing(args)
    if stages:
        check_files(args, stages)
        layers = sketched_layers(args, recipe)
        read_target(args, layers, file_size(args, recipe.shapes(), layers))


def check_task(args: Namespace, stages: list[str]) -> None:
    """Check that there is something to do, and one thing at a time."""
    if not stages and not args.EVAL:
        raise InputError(
            "nothing to do: give one or more of --PRETRAIN --ALQ --POSTTRAIN, or --EVAL FILE"
        )
    if stages and args.EVAL:
        raise InputError(
            f"--EVAL {args.EVAL}: tests a finished file; give it without --{stages[0]}"
        )
    if args.packed and not args.EVAL:
        raise InputError("--packed: goes with --EVAL FILE, which it tests; training needs floats")
    if getattr(args, "DOWNLOAD", False) and not args.PRETRAIN:
        raise InputError("--DOWNLOAD goes with --PRETRAIN: it fetches what that would train")
    if args.resume and args.EVAL:
        raise InputError("--resume: goes with the stages; --EVAL has nothing to go on with")


def check_packing(args: Namespace) -> None:
    """Check that the packed file can be what the flags ask for."""
    check_floats(args.floats, args.coded)
    if args.fold and not args.coded:
        raise InputError("--fold: goes with --coded, which stores nothing of folded units")
    if args.file_kb is not None and not (args.coded and args.fold):
        raise InputError("--file_kb: goes with --coded --fold, which make the file that it counts")
    if args.fold and (args.act_bit or args.amp):
        other = "act_bit" if args.act_bit else "amp"
        raise InputError(f"--fold: goes with activations in float32, not with --{other}")


def check_milestones(args: Namespace) -> None:
    """Check that the milestones of pretraining rise."""
    cuts = args.milestones_pretrain
    if any(a >= b for a, b in pairwise(cuts)):
        raise InputError(
            f"--milestones_pretrain {' '.join(map(str, cuts))}: must rise; give each epoch once, "
            "in order"
        )


def sketched_layers(args: Namespace, recipe: Recipe) -> list[SketchedLayer]:
    """Return every layer as the sketch will leave it at most.

    Raises: InputError if structure, subc or max_bit do not fit the network's layers.
    """
    asked = groupings(recipe.shapes(), **grouping_options(args))
    return [SketchedLayer(*layer) for layer in asked.values()]


def file_size(args: Namespace, model: nn.Module, layers: Layers) -> FileSize | None:
    """Return the size of the smallest packed file if --file_kb asks for it.

    It is of a model of which `layers` are quantized.
    """
    return None if args.file_kb is None else FileSize.of(model, layers, FLOATS[args.floats])


def counted_plan(
    args: Namespace, recipe: Recipe, batches: int
) -> tuple[list[SketchedLayer], PruningPlan]:
    """Return the layers that --ALQ sketches and what it prunes of them, known from the counts.

    `batches` are those of an epoch. Raises: InputError as `pruning_plan` and `sketched_layers`.
    """
    layers = sketched_layers(args, recipe)
    file = file_size(args, recipe.shapes(), layers)
    return layers, pruning_plan(args, layers, batches, file=file)


def check_same_layers(args: Namespace, recipe: Recipe, states: list[dict], held_out: Sized) -> None:
    """Check that the flags name what the checkpoint --model holds, which --POSTTRAIN goes on with.

    `states` are its multi-bit weights, `held_out` its validation images.
    """
    layers = groupings(recipe.shapes(), **grouping_options(args))
    for state in states:
        name, (grouping, max_bit) = state["name"], layers.get(state["name"], (None, None))
        if grouping is None:
            raise InputError(
                f"--model {args.model}: holds another network: it has {name}; give a checkpoint "
                f"of {recipe.net}"
            )
        found = (state["structure"], state["subc"], state["mask"].shape[1])
        asked = (grouping.structure, grouping.subc, max_bit)
        for flag, there, here in zip(("structure", "subc", "max_bit"), found, asked, strict=True):
            if there != here:
                raise InputError(
                    f"--{flag} {here}: {name} in --model {args.model} has {there}; give that"
                )
    if (there := len(held_out)) not in (0, args.val_size):
        raise InputError(
            f"--val_size {args.val_size}: --model {args.model} holds {there} images out; give that"
        )


def check_dataset(recipe: Recipe, found: str | None, source: str) -> None:
    """Check that `source` is of the recipe's data set; `found` is the one it records, if any."""
    found = found or recipe.paper_dataset or recipe.dataset
    if found != recipe.dataset:
        raise InputError(
            f"{source}: is of data set {found}, not {recipe.dataset}; give --dataset {found}, or "
            "another file"
        )


def check_files(args: Namespace, stages: list[str]) -> None:
    """Check that no file of the run takes another's place, and that they can be written."""
    files = RunFiles(args.model_ori, args.model)
    if kind := OWN_ENDINGS.get(args.model.suffix):
        raise InputError(
            f"--model {args.model}: {args.model.suffix} is {kind}'s ending, and the two would be "
            "one file; use .pth"
        )
    own = [files.model, packed(files.model), files.posttrained, packed(files.posttrained)]
    own += [part(files.model), part(files.posttrained), files.log, files.resume_point]
    theirs = {os.path.abspath(path) for path in (args.model_ori, part(args.model_ori))}
    for path in own:
        if os.path.abspath(path) in theirs:
            what = "--model" if path == files.model else f"{path}, which goes with --model,"
            raise InputError(
                f"--model_ori {args.model_ori}: {what} and --model_ori would be one file; give "
                "another name"
            )
    if "PRETRAIN" in stages:
        check_writable("--model_ori", args.model_ori)
    check_writable("--model", args.model)  # in whose folder all else goes


def check_writable(flag: str, path: Path) -> None:
    """Check that `path` can be made or replaced. Nothing is created."""
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


def check_data(args: Namespace, recipe: Recipe, data: Split) -> None:
    """Check that the network can learn from the data in such batches, and ALQ prune in them."""
    model = recipe.shapes().eval()
    outputs = list(quantizable(model).values())[-1].shape[0]
    if not 0 <= data.labels.start < data.labels.stop <= outputs:
        raise InputError(
            f"--data {args.data}: has labels {data.labels.start} to {data.labels.stop - 1}, but "
            f"the network tells 0 to {outputs - 1} apart; give the data it is made for"
        )
    try:
        model(torch.empty(1, *data.shape, device="meta"))
    except RuntimeError as error:
        raise InputError(
            f"--data {args.data}: pictures of shape {data.shape} do not fit the network; give the "
            "data it is made for"
        ) from error
    if args.ALQ:
        counted_plan(args, recipe, len(data.train))
