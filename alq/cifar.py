"""CIFAR-10 as tensors, and its random crop and flip for a whole batch at once on the device."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets

from .errors import InputError
from .parallel import main_first


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


class CropFlip:
    """torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, each image on its own.

    The image is padded with black by `padding` pixels, cut to its old size at a random place, and
    mirrored with probability 1/2.
    """

    def __init__(self, padding: int = 4) -> None:
        self.padding = padding

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3) int64: top and left of the cut in the padded image, and 1 to mirror."""
        corner = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirror = torch.randint(2, (count, 1), generator=generator)
        return torch.cat([corner, mirror], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """(batch, C, H, W) -> the same shape. `draws` (batch, 3) lies on the images' device."""
        batch, _, H, W = images.shape
        padded = F.pad(images, [self.padding] * 4)
        top, left, mirror = draws.unsqueeze(2).unbind(1)  # (batch, 1) each
        column = torch.arange(W, device=images.device)
        rows = top + torch.arange(H, device=images.device)  # (batch, H)
        columns = left + torch.where(mirror == 1, W - 1 - column, column)  # (batch, W)
        number = torch.arange(batch, device=images.device).view(-1, 1, 1)
        cut = padded[number, :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (batch, H, W, C)
        return cut.permute(0, 3, 1, 2)
