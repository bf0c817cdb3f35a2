"""ResNet18 or ResNet34 on ILSVRC12: get, quantize, post-train.

`python resnet.py --PRETRAIN --DOWNLOAD --ALQ --POSTTRAIN --net resnet18 --data DIR`
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn

from alq.command.arguments import count, read_ahead
from alq.command.flags import ScriptParser
from alq.command.recipe import Recipe
from alq.command.run import run_stages
from alq.data import imagenet
from alq.data.published_weights import fetch_weights
from alq.machine.processes import own_cores

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # of the full-precision training
LAYERS = {"resnet18": 21, "resnet34": 37}  # quantized ones, those of the shortcuts included
# The one flag that the defaults of others depend on.
NET_FLAG = {"choices": LAYERS, "default": "resnet18", "help": "which network"}
PUBLISHED = {  # the paper's rows
    "resnet18": {"bitwidth": 2.00, "storage_bytes": 3.44e6, "top1": 70.0},
    "resnet34": {"bitwidth": 2.00, "storage_bytes": 6.37e6, "top1": 73.6},
}


def defaults(net: str) -> dict:
    """Return the flags' defaults for `net`."""
    inner = LAYERS[net] - 2
    return {
        "data": Path("data/ILSVRC12"),
        "val_size": 50000,
        "batch_size": 256,
        "model_ori": Path(f"checkpoints/{net}_model_ori.pth"),
        "model": Path(f"checkpoints/{net}_model.pth"),
        "model_ori_urls": torchvision.models.get_model_weights(net).IMAGENET1K_V1.url,
        "workers": own_cores(),
        "structure": ["channelwise"] + ["pixelwise"] * inner + ["subchannelwise"],
        "subc": [0] * (inner + 1) + [2],
        "max_bit": [8],
        "epoch_pretrain": 90,
        "lr_pretrain": 0.4,
        "milestones_pretrain": [30, 60, 80],
        "ld_pretrain": 0.1,
        "warmup_pretrain": 5,
        "lr": 2e-4,
        "R": 5,
        "epoch_basis": 10,
        "ld_basis": 0.8,
        "epoch_coord": 5,
        "ld_coord": 0.6,
        "epoch_prune": 1,
        "pr": 0.15,
        "top_k": 0.0005,
        "epoch_ste": 80,
        "ld_ste": 0.95,
        "lr_post_coord": 5e-6,
        "epoch_post_coord": 20,
        "ld_post_coord": 0.9,
    }


def pretrain_optimizer(
    parameters: Iterable[nn.Parameter], args: Namespace
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, args.lr_pretrain, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )


def fetch(args: Namespace) -> dict | None:
    """Return the published weights with --DOWNLOAD, else None."""
    return fetch_weights(args.model_ori_urls) if args.DOWNLOAD else None


def recipe(net: str) -> Recipe:
    return Recipe(
        net=net,
        dataset="ilsvrc12",
        network=getattr(torchvision.models, net),
        load_data=imagenet.load_splits,
        load_test=imagenet.load_test,
        pretrain_optimizer=pretrain_optimizer,
        published=PUBLISHED[net],
        fetch=fetch,
    )


def command_line(net: str) -> ScriptParser:
    """Return all flags of this script, with their defaults for `net`."""
    parser = ScriptParser(__doc__, defaults(net))
    parser.published.add_argument("--net", **NET_FLAG)
    parser.set_defaults(net=net)
    parser.published.add_argument(
        "--DOWNLOAD", action="store_true", help="--PRETRAIN fetches weights and does not train"
    )
    parser.published.add_argument(
        "--model_ori_urls", metavar="URL", help="where from; the hash is checked"
    )
    parser.machine.add_argument(
        "--workers", type=count, metavar="N", help="processes that read pictures"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    net = read_ahead("net", NET_FLAG, argv)
    run_stages(recipe(net), command_line(net), argv)


if __name__ == "__main__":
    main()
