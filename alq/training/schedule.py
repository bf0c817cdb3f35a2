"""The three stages as lists of epochs: what each epoch does, and at what rate (docs/method.md)."""

import math
from argparse import Namespace
from dataclasses import dataclass, fields
from numbers import Integral, Real

from ..errors import InputError

# With what number a stage's first epoch shuffles and crops the training data. Each stage counts on
# from its own, so that none repeats the orders of another.
FIRST_ORDER = {"pretrain": 0, "alq": 300_000, "posttrain": 600_000}
# Numbers of a `Schedule` that are above 0, and those that are at most 1, too.
POSITIVE = ("lr", "R", "epoch_prune", "lr_post_coord")
SHARES = ("pr", "top_k", "ld_basis", "ld_coord", "ld_ste", "ld_post_coord")


@dataclass(frozen=True)
class Epoch:
    """One epoch of a stage.

    Attributes:
        kind: the step that it takes: pretrain, basis, coordinate, prune or ste.
        lr: its learning rate.
        round: counts from 1 within the ALQ stage and is 0 elsewhere.
        part: which of its round's pruning epochs it is, from 0.
    """

    kind: str
    lr: float
    round: int = 0
    part: int = 0


@dataclass(frozen=True)
class Schedule:
    """The numbers of quantization and post-training; the defaults are LeNet5's of the paper.

    The scripts' flags have the same names, and they are passed where a `Schedule` is asked for.

    Attributes:
        lr: learning rate at the start of each round, and of post-training; Adam has the same on
            all parameters that are not quantized.
        R: rounds of basis, coordinate and pruning epochs; not used with a target.
        epoch_basis, ld_basis: epochs a round that optimise the bases; the rate is multiplied by
            `ld_basis` before each.
        epoch_coord, ld_coord: likewise of the coordinates.
        wd: weight decay of the coordinates, in coordinate and pruning epochs.
        epoch_prune: pruning epochs a round, at the rate reached.
        pr: pruning ratio; a round leaves about exp(-pr) of the coordinates.
        top_k: share of a layer's coordinates that are candidates at a batch; None takes 0.005, or
            more where `pr` and the number of batches need it.
        epoch_ste, ld_ste: post-training epochs of straight-through steps.
        epoch_post_coord, ld_post_coord: coordinate epochs after them.
        lr_post_coord: the rate that those start from; None goes on from the last.
        seed: of the rounding in pruning.
        target_bit: prune to this average bitwidth of the quantized weights; or
        target_kb: to this storage of theirs, in 1e3 bytes; or
        file_kb: to a packed file of 1e3 bytes, which `alq.fold_constant_units`, where it takes such
            a model, `alq.round_floats(model, weights, "6bit")` and
            `alq.save_packed(..., "6bit", coded=True)` make of the result.
    """

    lr: float = 1e-3
    R: int = 4
    epoch_basis: int = 20
    ld_basis: float = 0.8
    epoch_coord: int = 10
    ld_coord: float = 0.8
    wd: float = 0.0
    epoch_prune: int = 1
    pr: float = 0.8
    top_k: float | None = None
    epoch_ste: int = 50
    ld_ste: float = 0.95
    epoch_post_coord: int = 20
    ld_post_coord: float = 0.9
    lr_post_coord: float | None = None
    seed: int = 0
    target_bit: float | None = None
    target_kb: float | None = None
    file_kb: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is field.default is None:
                continue
            kind, what = (Integral, "whole") if type(field.default) is int else (Real, "finite")
            low = "above 0" if name in POSITIVE + SHARES else "at least 0"
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf or (value == 0 and low == "above 0"):
                raise InputError(f"{name} {value!r}: must be {low}, a {what} number", name)
            if name == "seed" and value >= 2**64:
                raise InputError(f"seed {value}: must be below 2**64", name)
            if value > 1 and name in SHARES:
                raise InputError(f"{name} {value}: is a share, at most 1", name)


def pretrain_schedule(args: Namespace) -> list[Epoch]:
    """Return epochs whose rate first rises linearly, then is cut at each milestone."""
    epochs = []
    for epoch in range(args.epoch_pretrain):
        cuts = sum(epoch >= milestone for milestone in args.milestones_pretrain)
        warm_up = min(1.0, (epoch + 1) / args.warmup_pretrain) if args.warmup_pretrain else 1.0
        epochs.append(Epoch("pretrain", args.lr_pretrain * args.ld_pretrain**cuts * warm_up))
    return epochs


def alq_schedule(args: Schedule | Namespace, rounds: int) -> list[Epoch]:
    """Return `rounds` times: basis epochs, coordinate epochs, pruning epochs at the last rate."""
    epochs = []
    for number in range(1, rounds + 1):
        lr = args.lr
        for _ in range(args.epoch_basis):
            lr *= args.ld_basis
            epochs.append(Epoch("basis", lr, number))
        for _ in range(args.epoch_coord):
            lr *= args.ld_coord
            epochs.append(Epoch("coordinate", lr, number))
        epochs += [Epoch("prune", lr, number, part) for part in range(args.epoch_prune)]
    return epochs


def posttrain_schedule(args: Schedule | Namespace) -> list[Epoch]:
    """Return STE epochs, then coordinate epochs."""
    epochs, lr = [], args.lr
    for _ in range(args.epoch_ste):
        lr *= args.ld_ste
        epochs.append(Epoch("ste", lr))
    if args.lr_post_coord is not None:
        lr = args.lr_post_coord
    for _ in range(args.epoch_post_coord):
        lr *= args.ld_post_coord
        epochs.append(Epoch("coordinate", lr))
    return epochs
