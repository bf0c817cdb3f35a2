"""The networks of the entry scripts, for the tables and the benchmarks."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lenet5
import resnet
import vgg
from alq.command.recipe import Recipe


@dataclass(frozen=True)
class Network:
    """One network with its script.

    Attributes:
        title: network and data set, as the tables name them.
        picture: (channels, height, width) of its inputs.
        classes: how many answers it chooses from.
        recipe: the script's; `recipe.network()` makes the network, `recipe.published` is the
            paper's row.
        command_line: makes the parser of the script's flags.
    """

    title: str
    picture: tuple[int, int, int]
    classes: int
    recipe: Recipe
    command_line: Callable[[], ArgumentParser]

    def default_flags(self) -> Namespace:
        """Return the flags of the script that is called without any."""
        return self.command_line().parse_args([])


def of_resnet(net: str, title: str) -> Network:
    """Return one of the two networks of `resnet.py`."""
    size = (3, 224, 224)
    return Network(title, size, 1000, resnet.recipe(net), partial(resnet.command_line, net))


NETWORKS = {
    "lenet5": Network("LeNet5, MNIST", (1, 28, 28), 10, lenet5.RECIPE, lenet5.command_line),
    "vgg": Network("VGG, CIFAR-10", (3, 32, 32), 10, vgg.RECIPE, vgg.command_line),
    "resnet18": of_resnet("resnet18", "ResNet18, ILSVRC12"),
    "resnet34": of_resnet("resnet34", "ResNet34, ILSVRC12"),
}
