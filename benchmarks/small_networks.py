"""The networks of the comparisons: an epoch of either takes a CPU about as long."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lenet5
from alq.command.recipe import Recipe
from alq.data.mnist import SETS


class NarrowVGG(nn.Sequential):
    """VGG with batch norm, a sixteenth as wide, for pictures of 28 pixels; 37 000 weights.

    (batch, 1, 28, 28) -> logits (batch, classes). The pairs of convolutions are those of `vgg.VGG`.
    """

    def __init__(
        self, widths: Sequence[int] = (8, 16, 32), hidden: int = 64, classes: int = 10
    ) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        side = 28 >> len(widths)
        layers += [nn.Flatten(), nn.Linear(channels * side**2, hidden), nn.BatchNorm1d(hidden)]
        layers += [nn.ReLU(), nn.Linear(hidden, classes)]
        super().__init__(*layers)


@dataclass(frozen=True)
class SmallNetwork:
    """A network with the groups that its weights are cut into.

    Attributes:
        title: as documents name it.
        recipe: of its full-precision training.
        structure, subc: of each layer, as the scripts' flags.
    """

    title: str
    recipe: Recipe
    structure: Sequence[str]
    subc: Sequence[int]

    def on(self, dataset: str) -> Recipe:
        """Return the recipe for a data set."""
        return self.recipe.on(dataset, SETS[dataset].classes)


SMALL_NETWORKS = {
    "lenet5": SmallNetwork(
        "LeNet5", lenet5.RECIPE, lenet5.DEFAULTS["structure"], lenet5.DEFAULTS["subc"]
    ),
    "narrow_vgg": SmallNetwork(
        "narrow VGG",
        replace(lenet5.RECIPE, net="narrow_vgg", network=NarrowVGG, published=None),
        [*["channelwise"] * 6, *["subchannelwise"] * 2],
        [*[0] * 6, *[1] * 2],
    ),
}
