"""The size of a quantized network, in bits a weight or in KB, as pruning counts it: in whole bits.

Counts are all that it takes, so that it is known before there are any weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..method.structures import Grouping, coordinate_bytes
from ..method.weight import MultiBitWeight

# What a size is given in: average bitwidth, KB of 1e3 bytes, KB of the smallest packed file (these
# by their flags), or coordinates. `alq.training.file_size` has all of the file's.
Unit = Literal["target_bit", "target_kb", "file_kb", "coordinates"]
BITS_OF_A_KB = 8000


@dataclass(frozen=True)
class SketchedLayer:
    """A layer as the sketch leaves it at most: every group has as many bases as it can have.

    It stands for a `MultiBitWeight` where only counts matter, before there are any weights.
    """

    grouping: Grouping
    max_bit: int

    @property
    def n(self) -> int:
        """Weights per group."""
        return self.grouping.n

    @property
    def live_total(self) -> int:
        """Coordinates of the layer: no sketch has more bases than a group has weights."""
        return self.grouping.G * min(self.max_bit, self.n)


Layers = Sequence[MultiBitWeight | SketchedLayer]


def coordinate_prices(unit: Unit, weights: Layers) -> list[int]:
    """Return the bits that one coordinate of each layer adds to the size.

    The average bitwidth counts those of the basis alone, storage those of the coordinate too. A
    size in coordinates takes each for one bit.
    """
    if unit == "target_kb":
        return [int(8 * coordinate_bytes(w.n)) for w in weights]
    return [1 if unit == "coordinates" else w.n for w in weights]


def bits_of_one(unit: Unit, weights: Layers) -> int:
    """Return the bits of one KB; or of an average bitwidth of 1, one for every weight; or 1."""
    ones = {"target_kb": BITS_OF_A_KB, "coordinates": 1}
    return ones.get(unit) or sum(w.grouping.numel for w in weights)


def bits_in(unit: Unit, weights: Layers) -> int:
    """Return the size in bits."""
    prices = coordinate_prices(unit, weights)
    return sum(w.live_total * price for w, price in zip(weights, prices, strict=True))


def size_in(unit: Unit, weights: Layers) -> float:
    """Return the average bitwidth, or KB."""
    return bits_in(unit, weights) / bits_of_one(unit, weights)
