"""Which weights share one set of coordinates (docs/method.md, Structures).

Every structure is one pair of inverse functions between a layer's weight and the canonical
matrix (G, n): G groups of n weights. All the mathematics is written on (G, n), once.

On the way lies the weight by outputs, (O, C, *kernel): one row per output channel, as linear layers
and convolutions of any dimension hold it, C counting the inputs that one output sees (so grouped
convolutions need nothing of their own). The positions of a kernel are one flattened dimension.
A transposed convolution of g groups holds (g*C, O/g, *kernel) instead:

    weight[k*C + c, o] connects input k*C + c to output k*O/g + o
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

STRUCTURES = ("channelwise", "kernelwise", "pixelwise", "subchannelwise")
LONGEST, SHORTEST = 512, 64  # weights of a piece of a row, by default
PIXELWISE_FROM = 16  # inputs of a convolution: with fewer such groups would be small


def coordinate_bytes(n: int) -> float:
    """Return the bytes of one coordinate of a group of n weights: its basis and a float32."""
    return n / 8 + 4


@dataclass(frozen=True)
class Grouping:
    """How one layer's weight is cut into groups.

    Attributes:
        structure: one of STRUCTURES.
        shape: the parameter's.
        subc: pieces of an output row; 0 for the structures that have none.
        transposed: groups of a transposed convolution; 0 for all other layers.
    """

    structure: str
    shape: tuple[int, ...]
    subc: int = 0
    transposed: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def by_outputs(self) -> tuple[int, ...]:
        """The weight by outputs, (O, C, *kernel)."""
        O, C, *kernel = self.shape
        if self.transposed:
            O, C = C * self.transposed, O // self.transposed
        return (O, C, *kernel)

    @property
    def G(self) -> int:
        """Number of groups."""
        outputs, inputs = self.by_outputs[:2]
        return {
            "channelwise": outputs,
            "kernelwise": outputs * inputs,
            "pixelwise": self.numel // inputs,
            "subchannelwise": outputs * self.subc,
        }[self.structure]

    @property
    def n(self) -> int:
        """Weights per group."""
        return self.numel // self.G

    def to_groups(self, weight: Tensor) -> Tensor:
        """Return a weight in the layer's shape as (G, n), contiguous; a view where possible."""
        weight = swap_channels(weight, self.transposed)
        if self.structure == "pixelwise":
            weight = weight.flatten(2).transpose(1, 2)  # (O, positions, C)
        return weight.reshape(self.G, self.n).contiguous()

    def view_groups(self, weight: Tensor) -> Tensor | None:
        """Return what `to_groups` does as a view, None where the weight has not its order."""
        in_order = weight.movedim(1, -1) if self.structure == "pixelwise" else weight
        if self.transposed or not in_order.is_contiguous():
            return None
        return in_order.view(self.G, self.n)

    def to_weight(self, groups: Tensor) -> Tensor:
        """Return groups (G, n) in the layer's shape, the inverse of `to_groups`."""
        if self.structure == "pixelwise":
            outputs, inputs = self.by_outputs[:2]
            groups = groups.reshape(outputs, -1, inputs).transpose(1, 2)  # (O, C, positions)
        return swap_channels(groups.reshape(self.by_outputs), self.transposed).reshape(self.shape)

    def inputs_of(self) -> Tensor:
        """Return of each weight (G, n) which of the C inputs of its output it multiplies."""
        O, C, *kernel = self.by_outputs
        inputs = torch.arange(C, device="cpu").view(1, C, *[1] * len(kernel))
        weight = swap_channels(inputs.expand(O, C, *kernel), self.transposed)
        return self.to_groups(weight.reshape(self.shape))

    def inputs_of_one_output(self) -> Tensor:
        """Return `inputs_of` one output's groups alone; it is the same for all outputs."""
        return Grouping(self.structure, (1, *self.by_outputs[1:]), self.subc).inputs_of()


def swap_channels(weight: Tensor, transposed: int) -> Tensor:
    """Swap (g*C, O/g, *kernel) and (O, C, *kernel), of a transposed convolution of g groups.

    Its own inverse; a weight that is not `transposed` is returned as it is.
    """
    if not transposed:
        return weight
    return weight.unflatten(0, (transposed, -1)).transpose(1, 2).flatten(0, 1)


def default_subc(row: int) -> int:
    """Return the fewest equal pieces of a row of `row` weights with at most LONGEST each.

    A row that only breaks into pieces of fewer than SHORTEST weights, as one of prime length
    does, gets the most pieces that are longer instead: a coordinate for a few weights costs more
    than it saves.
    """
    divisors = [pieces for pieces in range(1, row + 1) if row % pieces == 0]
    short_enough = [pieces for pieces in divisors if row // pieces <= LONGEST]
    long_enough = [pieces for pieces in divisors if row // pieces >= min(SHORTEST, row)]
    return min(short_enough[0], long_enough[-1])


def make_grouping(
    name: str, shape: tuple[int, ...], structure: str | None, subc: int | None, transposed: int = 0
) -> Grouping:
    """Return the grouping of layer `name`; InputError names it when the request does not fit.

    `shape` is the parameter's; `transposed` as in `Grouping`. For None `structure` is the paper's
    for such a layer, `subc` is `default_subc`.
    """
    _, inputs, *kernel = Grouping("", shape, transposed=transposed).by_outputs
    if structure is None:
        convolution = "pixelwise" if inputs >= PIXELWISE_FROM else "channelwise"
        structure = convolution if kernel else "subchannelwise"
    if structure not in STRUCTURES:
        raise InputError(
            f"{name}: unknown structure '{structure}'; choose from {', '.join(STRUCTURES)}"
        )
    if structure != "subchannelwise":
        if not kernel:
            raise InputError(
                f"{name}: structure '{structure}' needs a convolution, but the weight has shape "
                f"{shape}; use subchannelwise"
            )
        return Grouping(structure, shape, 0, transposed)
    row = inputs * math.prod(kernel)
    if subc is None:
        subc = default_subc(row)
    if subc < 1 or row % subc:
        divisors = [str(k) for k in range(1, row + 1) if row % k == 0]
        more = ", ..." if len(divisors) > 8 else ""
        raise InputError(
            f"{name}: subc {subc} does not divide its rows of {row} weights into equal pieces; "
            f"use one of {', '.join(divisors[:8])}{more}"
        )
    return Grouping(structure, shape, subc, transposed)
