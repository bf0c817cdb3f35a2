"""CIFAR-10 and CIFAR-100, for VGG: each 50 000 training and 10 000 test images, as tensors."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from ..machine.processes import main_first
from .loaders import (
    CropFlip,
    DataSet,
    Labelled,
    Loader,
    Split,
    downloads,
    evaluation_loader,
    split_tensors,
)

# The paper's first. CIFAR-10's deviations are the release's, by common account the means over
# images of the deviation within each; CIFAR-100's are the usual ones, over all pixels.
SETS = {
    "cifar10": DataSet(
        "CIFAR-10", datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ),
    "cifar100": DataSet(
        "CIFAR-100", datasets.CIFAR100, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
}


def load_splits(args: Namespace, val_indices: Tensor | None) -> tuple[Split, Tensor]:
    """Return loaders, training images cropped and flipped, and the validation images' places."""
    sets = read_cifar(args.data, args.dataset)
    return split_tensors(args, val_indices, *sets, SETS[args.dataset], CropFlip())


def load_test(args: Namespace) -> Loader:
    test = read_cifar(args.data, args.dataset)[1]
    return evaluation_loader(args, test, SETS[args.dataset])


@main_first()
def read_cifar(root: str | Path, dataset: str = "cifar10") -> tuple[Labelled, Labelled]:
    """Return (images, labels) of the training set and of the test set; (N, 3, 32, 32) uint8.

    CIFAR-100's labels are the fine ones. torchvision's class checks the files in `root`, unpacks
    the archive if only that is there and downloads it if nothing is.
    """
    kind, what = SETS[dataset].source, f"intact {SETS[dataset].title}"
    advice = f"You can put {kind.filename} from {kind.url} into {root}"
    with downloads(root, what, Path(root) / kind.base_folder, advice):
        sets = [kind(root, train=train, download=True) for train in (True, False)]
    images = (torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous() for data in sets)
    train, test = zip(images, (torch.tensor(data.targets) for data in sets), strict=True)
    return train, test
