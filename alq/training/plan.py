"""The plan of all pruning that a schedule asks for, and the size that it leaves.

A batch removes the share M_p*top_k = pr/b of the live coordinates, b being the batches of a round's
pruning epochs. A round therefore leaves the factor (1 - pr/b)^b, about exp(-pr), and R rounds leave
its R-th power. The scripts round each batch's count down, as published, which leaves more: all of
them where a batch should remove less than one. `alq.fit` prunes to the number that is asked for.
"""

import math
from argparse import Namespace

from ..errors import InputError
from .file_size import FileSize
from .pruning import PruneByRatio, PruneToFile, PruneToTarget, PruningPlan, counted_rounds
from .schedule import Schedule
from .sizes import Layers, Unit, bits_of_one, coordinate_prices, size_in

# Where none is given: LeNet5's of the paper, or candidates for each coordinate to remove. With one,
# every layer would lose the same share.
TOP_K, CANDIDATES = 0.005, 2
TARGETS: dict[Unit, str] = {"target_bit": "bit", "target_kb": "KB", "file_kb": "KB"}


def pruning_plan(
    schedule: Schedule | Namespace, weights: Layers, batches: int, rounded: bool = True,
    file: FileSize | None = None,
) -> PruningPlan:  # fmt: skip
    """Return what `schedule` asks of the sketched `weights`; `batches` are those of an epoch.

    Rounds at ratio `pr` round each batch's count down, as published, unless `rounded` is False.
    A `file_kb` needs the network's `file`.

    Raises: InputError for a target that cannot be had, for too small a `top_k`, and for a `pr` that
    leaves nothing.
    """
    R, pr, top_k, b = schedule.R, schedule.pr, schedule.top_k, schedule.epoch_prune * batches
    if top_k is None:
        top_k = min(1.0, max(TOP_K, CANDIDATES * pr / b))
    factor, target = max(0.0, 1 - pr / b) ** b, read_target(schedule, weights, file)
    if target is not None:
        unit, value, start = target
        fixed = file.fixed / 1e3 if file and unit == "file_kb" else 0.0
        left = math.log((value - fixed) / (start - fixed))
        if factor == 1:
            raise InputError(f"pr {pr}: prunes nothing, so {unit} is never reached; use more", "pr")
        R = max(1, math.ceil(left / math.log(factor) - 1e-9)) if factor else 1
    else:
        M_p = removed_share(pr, top_k, b)
        if rounded:
            return PruneByRatio(R, pr, top_k, M_p, b)
        unit, start = "coordinates", size_in("coordinates", weights)
        value, fixed = start * factor**R, 0.0
        if value < 1:
            raise InputError(
                f"pr {pr}: of {start:.0f} coordinates not one would be left after "
                f"{counted_rounds(R)}; use less, or fewer rounds (R)",
                "pr",
            )
    plan = PruneToTarget(
        unit, value, start, rounds=R, pr=pr, factor=factor, top_k=top_k, prune_batches=b,
        fixed=fixed,
    )  # fmt: skip
    return PruneToFile(**vars(plan), file=file) if file and unit == "file_kb" else plan


def removed_share(pr: float, top_k: float, b: int) -> float:
    """Return the share M_p of the candidates that each of a round's `b` pruning batches removes.

    Raises: InputError if `top_k` is too small for `pr`.
    """
    M_p = (pr / top_k) / b
    if M_p > 1:
        raise InputError(
            f"top_k {top_k}: too few candidates to prune a share pr {pr} in {b} batches; "
            f"use top_k {min(1.0, 1.05 * top_k * M_p):.2g} or more",
            "top_k",
        )
    return M_p


def read_target(
    schedule: Schedule | Namespace, layers: Layers, file: FileSize | None
) -> tuple[Unit, float, float] | None:
    """Return (unit, value, size before pruning) of the target that `schedule` names, if it does.

    Raises: InputError if pruning the sketched `layers` cannot end there.
    """
    values = {unit: getattr(schedule, unit) for unit in TARGETS}
    asked = {unit: value for unit, value in values.items() if value is not None}
    if len(asked) > 1:
        both = ", ".join(f"{unit} {value:g}" for unit, value in asked.items())
        raise InputError(f"{both}: give one of them", next(iter(asked)))
    if not asked:
        return None
    ((unit, value),) = asked.items()
    if unit == "file_kb":
        assert file is not None
        start, least = file.counted_kb(layers), file.least_kb(layers)
    else:
        start = size_in(unit, layers)
        least = min(coordinate_prices(unit, layers)) / bits_of_one(unit, layers)
    if not value >= least:
        raise InputError(
            f"{unit} {value:g}: not one coordinate would be left; the least that a network of "
            f"one takes is {least:.2g} {TARGETS[unit]}",
            unit,
        )
    if value > start:
        raise InputError(
            f"{unit} {value:g}: the network has {start:.4g} {TARGETS[unit]} before any "
            "pruning; ask for less, or give it more with max_bit",
            unit,
        )
    return unit, value, start


def expected_size(plan: PruningPlan, layers: Layers) -> dict[str, float]:
    """Return the size that `plan` leaves of the freshly sketched `layers`, from the counts alone.

    It takes every layer to lose the same share. Layers of large groups have so far always lost
    more than others (docs/schedules.md), which leaves fewer bits of as many coordinates. Of a plan
    for the file's size it is that alone: its bits can be of many groups or of few.
    """
    if isinstance(plan, PruneToFile):
        return {"file_bytes": 1e3 * plan.value}
    share = plan.share_left(sum(layer.live_total for layer in layers))
    return {
        "bitwidth": share * size_in("target_bit", layers),
        "storage_bytes": share * size_in("target_kb", layers) * 1e3,
    }
