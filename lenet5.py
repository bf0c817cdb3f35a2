"""LeNet5 on MNIST or Fashion-MNIST: train, quantize, post-train.

`python lenet5.py --PRETRAIN --ALQ --POSTTRAIN`
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alq.command.arguments import count, read_ahead
from alq.command.flags import ScriptParser, dataset_flag
from alq.command.recipe import Recipe
from alq.command.run import run_stages
from alq.data import mnist

DEFAULTS = {
    "data": Path("data"),
    "val_size": 10000,
    "batch_size": 128,
    "model_ori": Path("checkpoints/lenet5_model_ori.pth"),
    "model": Path("checkpoints/lenet5_model.pth"),
    "structure": ["kernelwise", "kernelwise", "subchannelwise", "subchannelwise"],
    "subc": [0, 0, 2, 1],
    "max_bit": [6],
    "epoch_pretrain": 100,
    "lr_pretrain": 1e-2,
    "milestones_pretrain": [30, 60, 90],
    "ld_pretrain": 0.2,
    "lr": 1e-3,
    "R": 4,
    "epoch_basis": 20,
    "ld_basis": 0.8,
    "epoch_coord": 10,
    "ld_coord": 0.8,
    "epoch_prune": 1,
    "pr": 0.8,
    "top_k": 0.005,
    "epoch_ste": 50,
    "ld_ste": 0.95,
    "epoch_post_coord": 20,
    "ld_post_coord": 0.9,
}
PUBLISHED = {"bitwidth": 0.40, "storage_bytes": 22.7e3, "top1": 99.1}  # the paper's row
MOMENTUM = 0.5  # of the full-precision training
# The one flag that the defaults of others depend on.
DATASET_FLAG = dataset_flag(mnist.SETS)


class LeNet5(nn.Module):
    """Two unpadded 5x5 convolutions and two linear layers; 430 500 weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes) of pictures (batch, 1, 28, 28)."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (batch, 20, 12, 12)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (batch, 50, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))  # (batch, 500)
        return self.fc2(x)


def pretrain_optimizer(
    parameters: Iterable[nn.Parameter], args: Namespace
) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=args.lr_pretrain, momentum=MOMENTUM)


RECIPE = Recipe(
    net="lenet5",
    dataset="mnist",
    network=LeNet5,
    load_data=mnist.load_splits,
    load_test=mnist.load_test,
    pretrain_optimizer=pretrain_optimizer,
    published=PUBLISHED,
)


def command_line(dataset: str = RECIPE.dataset) -> ScriptParser:
    """Return all flags of this script, with their defaults for `dataset`."""
    parser = ScriptParser(__doc__, DEFAULTS)
    parser.add_dataset(DATASET_FLAG, RECIPE.net, dataset)
    parser.beyond.add_argument(
        "--augment", type=count, default=0, metavar="PIXELS",
        help="shift each training image at random, by up to PIXELS to each side; in every stage",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    dataset = read_ahead("dataset", DATASET_FLAG, argv)
    run_stages(RECIPE.on(dataset, mnist.SETS[dataset].classes), command_line(dataset), argv)


if __name__ == "__main__":
    main()
