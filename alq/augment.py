"""Random crop and flip of a whole batch at once on the device (`alq.data.Augmentation`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class CropFlip:
    """torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, each image on its own.

    The image is padded with black by `padding` pixels, cut to its old size at a random place, and,
    unless `mirror` is off, mirrored with probability 1/2.
    """

    def __init__(self, padding: int = 4, mirror: bool = True) -> None:
        self.padding, self.mirror = padding, mirror

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3) int64: top and left of the cut in the padded image, and 1 to mirror."""
        corner = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirror = torch.randint(2 if self.mirror else 1, (count, 1), generator=generator)
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
