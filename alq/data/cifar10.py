"""CIFAR-10 as tensors."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision import datasets

from ..errors import InputError
from ..machine.processes import main_first


@main_first()
def read_cifar10(root: str | Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) of the training set, of the test set); images (N, 3, 32, 32) uint8.

    torchvision's class checks the files in `root`, unpacks the archive if only that is there and
    downloads it if nothing is.
    """
    kind = datasets.CIFAR10
    try:
        train, test = (kind(root, train=part, download=True) for part in (True, False))
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"--data {root}: no intact CIFAR-10 in {Path(root) / kind.base_folder}, and it could "
            f"not be downloaded ({error}); put {kind.filename} from {kind.url} into {root}"
        ) from error
    return _tensors(train), _tensors(test)


def _tensors(data: datasets.CIFAR10) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets)
