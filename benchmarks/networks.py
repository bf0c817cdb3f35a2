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
from alq.data import cifar, mnist
from alq.data.loaders import DataSet


@dataclass(frozen=True)
class Network:
    """One network with its script.

    Attributes:
        title: the network, as the tables name it.
        datasets: what its script can train it on, as the tables name that; the paper's first.
        picture: (channels, height, width) of its inputs.
        classes: how many answers it chooses from.
        recipe: the script's; `recipe.network()` makes the network, `recipe.published` is the
            paper's row.
        command_line: makes the parser of the script's flags.
    """

    title: str
    datasets: dict[str, str]
    picture: tuple[int, int, int]
    classes: int
    recipe: Recipe
    command_line: Callable[[], ArgumentParser]

    def default_flags(self) -> Namespace:
        """Return the flags of the script that is called without any."""
        return self.command_line().parse_args([])


def of_resnet(net: str, title: str) -> Network:
    """Return one of the two networks of `resnet.py`."""
    sets, size = {"ilsvrc12": "ILSVRC12"}, (3, 224, 224)
    return Network(title, sets, size, 1000, resnet.recipe(net), partial(resnet.command_line, net))


def titles(sets: dict[str, DataSet]) -> dict[str, str]:
    """Return the data sets' names as they are written."""
    return {name: kind.title for name, kind in sets.items()}


NETWORKS = {
    "lenet5": Network(
        "LeNet5", titles(mnist.SETS), (1, 28, 28), 10, lenet5.RECIPE, lenet5.command_line
    ),
    "vgg": Network("VGG", titles(cifar.SETS), (3, 32, 32), 10, vgg.RECIPE, vgg.command_line),
    "resnet18": of_resnet("resnet18", "ResNet18"),
    "resnet34": of_resnet("resnet34", "ResNet34"),
}
