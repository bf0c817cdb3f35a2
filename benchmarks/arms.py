"""The arms of the comparisons (`ablations.py`, `sweep.py`): short schedules, what they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

import alq
import changed
from alq.training.loop import Training, quantized_training
from alq.training.pruning import PruneToTarget
from alq.training.schedule import Epoch, Schedule
from small_networks import SmallNetwork

LR, LD = 1e-3, 0.8  # the paper's rate and factor for LeNet5; the sweep's arms bring their own rates
MAX_BIT = 6  # of the sketches that are pruned


@dataclass(frozen=True)
class Arm:
    """What one run of a comparison does.

    Attributes:
        name: in the log's name and the figure.
        epochs: what each epoch does (`alq.training.schedule.Epoch.kind`).
        max_bit: of the sketch.
        kind: class of the quantizer.
        plan: (batches of an epoch) -> what a pruning epoch does.
        from_full: STE steps start from the full-precision weights, not from the sketch.
    """

    name: str
    epochs: Sequence[Epoch]
    max_bit: int = MAX_BIT
    kind: type[alq.ALQ] = alq.ALQ
    plan: Callable[[int], object] = lambda batches: None
    from_full: bool = False


def decaying(kinds: Sequence[str], round: int = 0, lr: float = LR) -> list[Epoch]:
    """Return epochs of these kinds, the rate `lr` multiplied by LD before each."""
    return [Epoch(kind, lr * LD ** (k + 1), round) for k, kind in enumerate(kinds)]


def training_of(
    stage: str, arm: Arm, network: SmallNetwork, model: nn.Module, seed: int, batches: int
) -> Training:
    """Sketch the full-precision `model` and return the training that `arm` asks for."""
    full = [parameter.detach().clone() for parameter in model.parameters() if parameter.dim() > 1]
    weights = alq.quantize(model, network.structure, network.subc, arm.max_bit)
    schedule, plan = Schedule(seed=seed), arm.plan(batches)  # the epochs bring their rates
    training = quantized_training(stage, model, weights, schedule, plan=plan, optimizer=arm.kind)
    if arm.from_full:
        for weight, w in zip(weights, full, strict=True):
            training.optimizers[0].state[weight.parameter]["w0"] = weight.grouping.to_groups(w)
    return training


ROUND = ["basis", "basis", "coordinate"]
ROUNDS, PR, TOP_K = 4, 0.9, 0.01
# Four rounds that end in a pruning epoch, then one that only trains.
PRUNING = [
    epoch for r in range(1, ROUNDS + 1) for epoch in decaying([*ROUND, "prune"], r)
] + decaying(ROUND, ROUNDS + 1)


def across_layers(batches: int) -> PruneToTarget:
    """Return the method's pruning: at each batch the cheapest of all layers' candidates.

    Each round ends at the bits that the share `PR`, taken at each batch, would leave.
    """
    left = (1 - PR / batches) ** batches
    aim = MAX_BIT * left**ROUNDS
    return PruneToTarget(
        "target_bit", aim, MAX_BIT, rounds=ROUNDS, pr=PR, factor=left, top_k=TOP_K,
        prune_batches=batches,
    )  # fmt: skip


def pruned(name: str, kind: type[alq.ALQ] = alq.ALQ) -> Arm:
    """Return the arm of the method's pruning, with a changed quantizer if one is given."""
    return Arm(name, PRUNING, kind=kind, plan=across_layers)


def adaptive() -> list[Arm]:
    """Return the arms that share out the bits in three ways."""
    return [
        pruned("across_layers"),
        Arm("within_layers", PRUNING, plan=lambda b: changed.WithinLayers(PR, b)),
        Arm("uniform", PRUNING, plan=lambda b: changed.Uniform((4, 3, 2, 1), b)),
    ]


def smooth() -> list[Arm]:
    """Return the arms that prune to the same bits at every batch, or at one batch of an epoch."""
    cut = Arm("one_cut", PRUNING, plan=lambda b: changed.OneCut(across_layers(b)))
    return [pruned("every_batch"), cut]


def defects() -> list[Arm]:
    """Return the arms without and with each of the authors' two defects."""
    return [
        pruned("none"),
        pruned("lost_flips", changed.LosingFlips),
        pruned("wrong_ranking", changed.RankingWrongly),
    ]


def ridge() -> list[Arm]:
    """Return the arms whose coordinate solve has a ridge relative to h, or the published one."""
    return [pruned("relative"), pruned("published", changed.PublishedRidge)]


# The same run under several claims' names: run once.
SAME = {
    ("smooth", "every_batch"): "adaptive_across_layers",
    ("defects", "none"): "adaptive_across_layers",
    ("ridge", "relative"): "adaptive_across_layers",
}


CLAIMS = {f.__name__: f for f in (adaptive, smooth, defects, ridge)}

# ---------------------------------------------------------------------------- whole commands

# One basis, one coordinate and one pruning epoch a round; five epochs of post-training.
SHORT = (
    "--ALQ --POSTTRAIN --epoch_basis 1 --epoch_coord 1 --pr 1 "
    "--epoch_ste 4 --ld_ste 0.7 --epoch_post_coord 1 --ld_post_coord 0.7"
)
SIZES = {
    "6bit": f"{SHORT} --R 1 --pr 1e-6",
    **{f"{bits:g}bit": f"{SHORT} --target_bit {bits}" for bits in (3, 1.5)},
    **{
        f"{bits:g}bit": f"{SHORT} --max_bit 3 --target_bit {bits}"
        for bits in (0.8, 0.41, 0.2, 0.1, 0.055)
    },
}
