"""Which weights share one set of coordinates (SPEC section 2; paper section 3).

Every structure is one pair of inverse functions between a layer's weight and the canonical
matrix (G, n): G groups of n weights. All the mathematics is written on (G, n), once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .errors import InputError

STRUCTURES = ("channelwise", "kernelwise", "pixelwise", "subchannelwise")


@dataclass(frozen=True)
class Grouping:
    """How one layer's weight is cut into groups.

    `shape` is the weight's (O, C, *kernel) or (O, F); `subc` counts the pieces of an output row
    and is 0 for the structures that have none.
    """

    structure: str
    shape: tuple[int, ...]
    subc: int = 0

    @property
    def numel(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def G(self) -> int:
        """Number of groups."""
        outputs, inputs = self.shape[0], self.shape[1]
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
        """Weight in the layer's shape -> (G, n). Contiguous; a view where the layout allows."""
        if self.structure == "pixelwise":
            weight = weight.flatten(2).transpose(1, 2)  # (O, positions, C)
        return weight.reshape(self.G, self.n).contiguous()

    def to_weight(self, groups: Tensor) -> Tensor:
        """(G, n) -> weight in the layer's shape, the inverse of `to_groups`."""
        if self.structure == "pixelwise":
            outputs, inputs = self.shape[:2]
            groups = groups.reshape(outputs, -1, inputs).transpose(1, 2)  # (O, C, positions)
        return groups.reshape(self.shape)


def default_structure(shape: tuple[int, ...]) -> str:
    """The structure taken when none is given: the paper's choice for layers of this kind."""
    if len(shape) == 2:
        return "subchannelwise"
    return "pixelwise" if shape[1] >= 16 else "channelwise"


def default_subc(row: int, longest: int = 512) -> int:
    """Fewest equal pieces of a row of `row` weights that are at most `longest` weights each."""
    return next(
        pieces for pieces in range(1, row + 1) if row % pieces == 0 and row // pieces <= longest
    )


def make_grouping(
    name: str, shape: tuple[int, ...], structure: str | None, subc: int | None
) -> Grouping:
    """The grouping of layer `name`; InputError names the layer when the request does not fit it."""
    structure = structure or default_structure(shape)
    if structure not in STRUCTURES:
        raise InputError(
            f"{name}: unknown structure '{structure}'; choose from {', '.join(STRUCTURES)}"
        )
    if structure != "subchannelwise":
        if len(shape) < 3:
            raise InputError(
                f"{name}: structure '{structure}' needs a convolution, but the weight has shape "
                f"{tuple(shape)}; use subchannelwise"
            )
        return Grouping(structure, tuple(shape))
    row = 1
    for extent in shape[1:]:
        row *= extent
    if subc is None:
        subc = default_subc(row)
    if subc < 1 or row % subc:
        raise InputError(
            f"{name}: subc {subc} does not divide its rows of {row} weights into equal pieces"
        )
    return Grouping(structure, tuple(shape), subc)
