"""VGG on CIFAR-10 or CIFAR-100: train, quantize, post-train.

`python vgg.py --PRETRAIN --ALQ --POSTTRAIN`
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from alq.command.arguments import read_ahead
from alq.command.flags import ScriptParser, dataset_flag
from alq.command.recipe import Recipe
from alq.command.run import run_stages
from alq.data import cifar

WIDTHS = (128, 256, 512)  # output channels of the three pairs of convolutions

DEFAULTS = {
    "data": Path("data"),
    "val_size": 5000,
    "batch_size": 128,
    "model_ori": Path("checkpoints/vgg_model_ori.pth"),
    "model": Path("checkpoints/vgg_model.pth"),
    "structure": ["channelwise"] + ["pixelwise"] * 5 + ["subchannelwise"] * 3,
    "subc": [0, 0, 0, 0, 0, 0, 16, 2, 2],
    "max_bit": [6],
    "epoch_pretrain": 100,
    "lr_pretrain": 1e-2,
    "milestones_pretrain": [30, 60, 90],
    "ld_pretrain": 0.2,
    "lr": 1e-3,
    "R": 5,
    "epoch_basis": 20,
    "ld_basis": 0.8,
    "epoch_coord": 10,
    "ld_coord": 0.8,
    "epoch_prune": 1,
    "pr": 0.4,
    "top_k": 0.002,
    "epoch_ste": 50,
    "ld_ste": 0.95,
    "epoch_post_coord": 20,
    "ld_post_coord": 0.9,
}
PUBLISHED = {"bitwidth": 0.66, "storage_bytes": 1.29e6, "top1": 92.0}  # the paper's row
# The one flag that the defaults of others depend on.
DATASET_FLAG = dataset_flag(cifar.SETS)


class VGG(nn.Sequential):
    """Six 3x3 convolutions in three pairs, each pair halving the picture, and three linear layers.

    (batch, 3, 32, 32) -> logits (batch, classes). 14 022 016 weights with 10 classes.
    """

    def __init__(
        self, widths: Sequence[int] = WIDTHS, hidden: int = 1024, classes: int = 10
    ) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        side = 32 >> len(widths)
        layers += [nn.Flatten(), nn.Linear(channels * side**2, hidden)]
        layers += [nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden)]
        layers += [nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)]
        super().__init__(*layers)


def pretrain_optimizer(
    parameters: Iterable[nn.Parameter], args: Namespace
) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=args.lr_pretrain)


RECIPE = Recipe(
    net="vgg",
    dataset="cifar10",
    network=VGG,
    load_data=cifar.load_splits,
    load_test=cifar.load_test,
    pretrain_optimizer=pretrain_optimizer,
    published=PUBLISHED,
)


def command_line(dataset: str = RECIPE.dataset) -> ScriptParser:
    """Return all flags of this script, with their defaults for `dataset`."""
    parser = ScriptParser(__doc__, DEFAULTS)
    parser.add_dataset(DATASET_FLAG, RECIPE.net, dataset)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    dataset = read_ahead("dataset", DATASET_FLAG, argv)
    run_stages(RECIPE.on(dataset, cifar.SETS[dataset].classes), command_line(dataset), argv)


if __name__ == "__main__":
    main()
