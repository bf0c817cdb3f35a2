"""vgg.py and resnet.py with narrow networks, on the small sets of `small_sets`.

    python tests/narrow.py vgg|resnet DIR FLAGS

DIR is the script's --data. ResNet's pictures are cropped to 32 pixels. Not collected as a test; run
by torchrun in some.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn
from torchvision import datasets
from torchvision.models.resnet import BasicBlock, ResNet

sys.path.insert(0, str(Path(__file__).parents[1]))

import resnet
import vgg
from alq.data import imagenet
from small_sets import md5_tables

narrow_vgg = partial(vgg.VGG, (16, 32, 64), 64)

# What fits the layers of NarrowResNet.
RESNET_FLAGS = ["--structure", "channelwise", *["pixelwise"] * 12, "subchannelwise", "--subc", "2"]


class NarrowResNet(ResNet):
    """Four blocks an eighth as wide as ResNet18's, each with a downsampling branch."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(64, 10)

    def _make_layer(self, block: type, planes: int, *rest: object, **options: object):
        return super()._make_layer(block, planes // 8, *rest, **options)


def prepare_vgg(root: Path, patch: Callable = setattr, source: type = datasets.CIFAR10) -> None:
    """Let vgg.py be narrow, and torchvision's class `source` take the archive in `root` for its."""
    for name, table in md5_tables(root, source).items():
        patch(source, name, table)
    patch(vgg, "RECIPE", dataclasses.replace(vgg.RECIPE, network=narrow_vgg))


def prepare_resnet(patch: Callable = setattr) -> None:
    """Let resnet.py be narrow, on pictures of 32 pixels."""
    patch(imagenet, "RESIZE", 36)
    patch(imagenet, "CROP", 32)
    recipe = dataclasses.replace(resnet.recipe("resnet18"), network=NarrowResNet)
    patch(resnet, "recipe", lambda net: recipe)


if __name__ == "__main__":
    script, root, *flags = sys.argv[1:]
    if script == "vgg":
        prepare_vgg(Path(root))
        vgg.main(["--data", root, *flags])
    else:
        prepare_resnet()
        resnet.main(["--data", root, *RESNET_FLAGS, *flags])
