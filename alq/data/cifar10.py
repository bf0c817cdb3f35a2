"""CIFAR-10, for VGG: 50 000 training and 10 000 test images, as tensors on the device."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from ..machine.processes import main_first
from .loaders import CropFlip, Labelled, Loader, Split, downloads, evaluation_loader, split_tensors

# Of the pixels in 0..1, red, green and blue.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def load_splits(args: Namespace, val_indices: Tensor | None) -> tuple[Split, Tensor]:
    """Return loaders, training images cropped and flipped, and the validation images' places."""
    return split_tensors(args, val_indices, *read_cifar10(args.data), MEAN, STD, CropFlip())


def load_test(args: Namespace) -> Loader:
    return evaluation_loader(args, read_cifar10(args.data)[1], MEAN, STD)


@main_first()
def read_cifar10(root: str | Path) -> tuple[Labelled, Labelled]:
    """Return (images, labels) of the training set and of the test set; (N, 3, 32, 32) uint8.

    torchvision's class checks the files in `root`, unpacks the archive if only that is there and
    downloads it if nothing is.
    """
    kind = datasets.CIFAR10
    lacking = f"no intact CIFAR-10 in {Path(root) / kind.base_folder}"
    with downloads(root, lacking, f"You can put {kind.filename} from {kind.url} into {root}"):
        sets = [kind(root, train=train, download=True) for train in (True, False)]
    images = (torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous() for data in sets)
    train, test = zip(images, (torch.tensor(data.targets) for data in sets), strict=True)
    return train, test
