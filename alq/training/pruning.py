"""What each batch of a pruning epoch removes: a share of the coordinates, or down to a size.

`alq.training.plan` makes these plans of a schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..method.optimizer import ALQ
from ..method.steps import choose_pruned
from .file_size import FileSize
from .sizes import BITS_OF_A_KB, Unit, bits_in, bits_of_one, coordinate_prices, size_in

TRIES = 4  # of a batch to end at a size of the file
CHOICE = 4  # candidates for each coordinate to remove, where these are told by bytes


@dataclass(frozen=True)
class PruneByRatio:
    """Removes the same share at each batch of all rounds: the paper's way."""

    rounds: int
    pr: float
    top_k: float
    M_p: float  # share of the candidates removed at each batch
    prune_batches: int  # of a round
    unit = "coordinates"  # that pr is a share of

    def __str__(self) -> str:
        return f"{counted_rounds(self.rounds)} at pr {self.pr}"

    def share_left(self, live: float) -> float:
        """Return the share of `live` coordinates that is left, rounded down batch by batch."""
        left = live
        for _ in range(self.rounds * self.prune_batches):
            left -= int(self.M_p * (self.top_k * left))
        return left / live

    def step(self, quantizer: ALQ, round_number: int, batch: int) -> None:
        """Take one batch's prune step, whichever of the round it is."""
        quantizer.prune_step(self.top_k, self.M_p)


@dataclass(frozen=True)
class PruneToTarget:
    """Prunes in rounds at ratio pr to a given size, in the last round with what is left to go.

    Each batch removes the share that is still to go, divided over the round's batches that are
    left, so that the round ends at its aim and not below: its last coordinate is the one that
    reaches it. Aims are sizes, for layers' coordinates differ in size and pruning need not take
    them in proportion.

    Attributes:
        unit: "target_bit" (average bitwidth), "target_kb" (storage in 1e3 bytes), "coordinates".
        value, start: the size asked for, and that of the sketched network.
        factor: what a round at ratio `pr` leaves.
        top_k: share of a layer that is a candidate at a batch; more where the aim needs it.
        prune_batches: batches of a round's pruning epochs.
        fixed: of the size, what no pruning frees.
    """

    unit: Unit
    value: float
    start: float
    rounds: int
    pr: float
    factor: float
    top_k: float
    prune_batches: int
    fixed: float = 0.0

    @property
    def last_pr(self) -> float:
        """The ratio at which the last round has left to prune."""
        left = (self.value - self.fixed) / (self.aim(self.rounds - 1) - self.fixed)
        return self.prune_batches * (1 - left ** (1 / self.prune_batches))

    def aim(self, round: int) -> float:
        """Return the size at the end of round 1, 2, ..."""
        return max(self.value, self.fixed + (self.start - self.fixed) * self.factor**round)

    def __str__(self) -> str:
        if self.unit == "coordinates":
            return f"{counted_rounds(self.rounds)} at pr {self.pr}"
        return (
            f"{self.unit} {self.value:g} from {self.start:.4g} in {counted_rounds(self.rounds)}: "
            f"pr {self.pr}, in the last {self.last_pr:.3g}"
        )

    def share_left(self, live: float) -> float:
        """Return the share of the size that is left, however many coordinates that is."""
        return self.value / self.start

    def step(self, quantizer: ALQ, round_number: int, batch: int) -> None:
        """Take the prune step of a pruning batch: of round 1, 2, ..., and in it from 0."""
        weights, bits = quantizer.weights, bits_of_one(self.unit, quantizer.weights)
        aim = self.aim(round_number)
        share = self.share_now(size_in(self.unit, weights), aim, batch)
        top_k = max(self.top_k, share)
        # Whole bits, so that all processes stop at the same coordinate; 1e-12 is for the product.
        budget = bits_in(self.unit, weights) - math.floor(aim * bits * (1 + 1e-12))
        prices = coordinate_prices(self.unit, weights)
        quantizer.prune_step(top_k, share / top_k, prices, max(0, budget))

    def share_now(self, size: float, aim: float, batch: int) -> float:
        """Return what share of the prunable `size` a batch removes, 0 being the round's first.

        The last of a round takes all: there the budget alone says where to stop.
        """
        left = self.prune_batches - batch  # batches, this one included
        if size <= aim:
            return 0.0
        return 1 - ((aim - self.fixed) / (size - self.fixed)) ** (1 / left) if left > 1 else 1.0


@dataclass(frozen=True)
class PruneToFile(PruneToTarget):
    """Prunes until the smallest packed file has a size, what costs least per byte of it first.

    The size is an estimate (`alq.training.file_size`), renewed until each batch ends where it
    should; on another device than the CPU that waits for it. A layer gives at most `CHOICE` times
    its share at a batch.
    """

    file: FileSize = field(kw_only=True)

    def step(self, quantizer: ALQ, round_number: int, batch: int) -> None:
        """Take the prune step of a pruning batch: of round 1, 2, ..., and in it from 0."""
        weights, aim = quantizer.weights, self.aim(round_number)
        masks = [weight.mask for weight in weights]
        size = self.file.kb(weights, masks)
        if size <= aim:
            return quantizer.prune_step(self.top_k, 0.0)
        share = self.share_now(size, aim, batch)
        goal = max(aim, size - share * (size - self.fixed))
        staying = min(1.0, (self.value - self.fixed) / (size - self.fixed))
        worth = self.file.worth(weights, masks, staying)
        prices = [(8 * each).round().long() for each in worth]

        def choose(
            costs: Sequence[Tensor], live: Sequence[Tensor], candidates: Sequence[int], M_p: float,
            prices: Sequence[int | Tensor], budget: int,
        ) -> list[Tensor]:  # fmt: skip
            """Choose by budgets, each from what the one before freed of the file."""
            chosen: list[tuple[float, list[Tensor]]] = []
            for _ in range(TRIES):
                gone = choose_pruned(costs, live, candidates, M_p, prices, budget)
                left = self.file.kb(weights, [m & ~g for m, g in zip(masks, gone, strict=True)])
                chosen.append((abs(left - goal), gone))
                # At least an eighth, so that the budget grows at most eightfold a try.
                freed = max(size - left, (size - goal) / 8)
                budget = round(budget * (size - goal) / freed)
            return min(chosen, key=lambda each: each[0])[1]

        top_k = min(1.0, max(self.top_k, CHOICE * share))
        budget = math.ceil(BITS_OF_A_KB * (size - goal))
        quantizer.prune_step(top_k, 1.0, prices, budget, worth, choose)


PruningPlan = PruneByRatio | PruneToTarget


def counted_rounds(count: int) -> str:
    """Return "1 round", "2 rounds" and so on."""
    return f"{count} round{'s' if count > 1 else ''}"
