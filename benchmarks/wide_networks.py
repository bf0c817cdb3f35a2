"""Full-width VGG and ResNet18 on real pictures that are at hand: Fashion-MNIST as CIFAR-10 has it.

    python benchmarks/wide_networks.py vgg           # 32 x 32 pixels, three equal channels
    python benchmarks/wide_networks.py resnet18      # 64 x 64: each pixel of these four times
    python benchmarks/wide_networks.py vgg --images 50000 --flags --epoch_pretrain 30

The networks, groups, rates and flags are those of vgg.py and resnet.py, but for what stands below:
epochs are fewer, and ResNet18 is pretrained at a lower rate, as its batches are smaller and few.
--flags ends in more flags of these scripts. One command runs the three stages; started again it
goes on where it stopped. Logs and files go to --out, as NETWORK_fashion_IMAGES.jsonl and so on.

On one core of an x86-64 CPU with AVX-512 VGG takes 19 ms an image, forward and backward, and 9 ms
with --amp. An epoch of 9000 images is then three minutes, or a minute and a half.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torchvision
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import resnet
import vgg
from alq.command.flags import ScriptParser
from alq.command.recipe import Recipe
from alq.command.run import run_stages
from alq.data import mnist
from alq.data.loaders import CropFlip, Labelled, Loader, Split, evaluation_loader, split_tensors

DATASET = "fashion_mnist"
KIND = replace(mnist.SETS[DATASET], mean=(0.2190,) * 3, std=(0.3318,) * 3)  # of the padded pictures
OUT = Path("checkpoints/wide")
# Rounds of two basis epochs, a coordinate and a pruning epoch; rates as in the defaults.
SHORT = (
    "--epoch_pretrain 15 --milestones_pretrain 6 10 13 --epoch_basis 2 --epoch_coord 1 --pr 0.4 "
    "--top_k 0.02 --epoch_ste 10 --ld_ste 0.8 --epoch_post_coord 2 --val_size 1000 --data data "
    "--resume"
).split()
OWN = {
    "vgg": "--target_bit 0.66".split(),
    "resnet18": "--target_bit 2 --batch_size 128 --lr_pretrain 0.05 --warmup_pretrain 1".split(),
}


def pictures(data: Labelled, side: int) -> Labelled:
    """Return 28 x 28 pictures in black margins to 32 x 32, magnified to `side`, in 3 channels."""
    images, labels = data
    images = F.pad(images, [2] * 4)
    images = images.repeat_interleave(side // 32, 2).repeat_interleave(side // 32, 3)
    return images.expand(-1, 3, -1, -1).contiguous(), labels


def load_splits(
    args: Namespace, val_indices: Tensor | None, images: int, side: int
) -> tuple[Split, Tensor]:
    """Return loaders of the first `images` of the training set, and the validation's places."""
    (x, y), test = mnist.read_mnist(args.data, DATASET)
    train = pictures((x[:images], y[:images]), side)
    return split_tensors(args, val_indices, train, pictures(test, side), KIND, CropFlip(side // 8))


def load_test(args: Namespace, side: int) -> Loader:
    """Return the test set."""
    return evaluation_loader(args, pictures(mnist.read_mnist(args.data, DATASET)[1], side), KIND)


def recipe(net: str, images: int) -> tuple[Recipe, ScriptParser]:
    """Return what to run in the place of vgg.py or resnet.py, and its flags."""
    side = 32 if net == "vgg" else 64
    own = {
        "dataset": DATASET,
        "load_data": partial(load_splits, images=images, side=side),
        "load_test": partial(load_test, side=side),
        "published": None,
    }
    if net == "vgg":
        return replace(vgg.RECIPE, **own), vgg.command_line()
    network = partial(torchvision.models.resnet18, num_classes=KIND.classes)
    return replace(resnet.recipe(net), network=network, **own), resnet.command_line(net)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net", choices=list(OWN))
    parser.add_argument("--images", type=int, default=10000, help="of the training set (10000)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of logs and files ({OUT})")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more, at the end")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.out / f"{args.net}_fashion_{args.images}"
    files = ["--model_ori", f"{name}_ori.pth", "--model", f"{name}.pth"]
    stages = ["--PRETRAIN", "--ALQ", "--POSTTRAIN"]
    run_stages(
        *recipe(args.net, args.images), [*stages, *files, *SHORT, *OWN[args.net], *args.flags]
    )


if __name__ == "__main__":
    main()
