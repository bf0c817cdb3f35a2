"""Data sets as tensors on the training device, and the mini-batches drawn from them.

A data set that fits in memory is moved to the device once, as bytes; a batch is then one
gather and a normalisation there, with no per-image Python.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..machine.processes import Share, shares

EVAL_BATCH = 1000  # images per evaluation batch; has no influence on the result


class Loader(Protocol):
    """What training needs of a data set: (x, y) batches, and a new order for each epoch."""

    count: int  # images an epoch, over all processes

    @property
    def shares(self) -> list[Share]:
        """This process's share of each batch (`alq.machine.processes`)."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the order of the next pass, and the batch, from 0, that it begins with."""
        ...


class Augmentation(Protocol):
    """A random change of training images, drawn on the host and made on the images' device."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, k) int64: what happens to each of `count` images."""
        ...

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """(batch, C, H, W) uint8 -> the same, changed as `draws` (batch, k) says."""
        ...


@dataclass(frozen=True)
class Split:
    """The three loaders of a run. Only `train` is shuffled and augmented.

    Attributes:
        labels: all that occur lie in it.
        shape: of a picture, (C, H, W).
    """

    train: Loader
    val: Loader
    test: Loader
    labels: range
    shape: tuple[int, ...]


class TensorLoader:
    """Mini-batches of a data set held as tensors on one device.

    Arguments:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, on the same device.
        batch_size: images per batch, the last batch holding the rest; of several processes each
            gets its share of every batch.
        mean, std: per channel, of pixel values in 0..1.
        seed: shuffles with a fresh order per epoch, a function of seed and epoch alone; None
            keeps the order.
        augment: changes the images, also as a function of seed and epoch alone; needs a seed.

    Yields (x, y): x (batch, C, H, W) float32 in channels_last, y (batch,) int64.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        self.images, self.labels, self.seed = images, labels, seed
        self.augment = augment
        self.epoch = self.first = 0
        self.count = len(labels)
        self.shares = shares(self.count, batch_size, training=seed is not None)
        per_channel = {"dtype": torch.float32, "device": images.device}
        # (x/255 - mean) / std  =  x * scale + shift
        self.scale = (1 / (255 * torch.tensor(std, **per_channel))).view(1, -1, 1, 1)
        self.shift = -(torch.tensor(mean, **per_channel) / torch.tensor(std, **per_channel)).view(
            1, -1, 1, 1
        )

    def __len__(self) -> int:
        return len(self.shares)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the order of the next pass, as torch's DistributedSampler does, and its start."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, draws = self._plan()
        for share in self.shares[self.first :]:
            index = order[share.part]
            images = self.images[index]
            if draws is not None:
                images = self.augment(images, draws[share.part])
            x = torch.addcmul(self.shift, images.float(), self.scale)
            yield x.contiguous(memory_format=torch.channels_last), self.labels[index]

    def _plan(self) -> tuple[Tensor, Tensor | None]:
        """The epoch's order (N,) and, where images are augmented, the draw for each place in it."""
        device = self.labels.device
        if self.seed is None:
            return torch.arange(self.count, device=device), None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).to(device)
        if self.augment is None:
            return order, None
        return order, self.augment.draw(self.count, generator).to(device)


def draw_val_indices(count: int, val_size: int, seed: int) -> Tensor:
    """(val_size,) int64, sorted: the training images held out for validation."""
    if not 0 < val_size < count:
        raise InputError(
            f"--val_size {val_size}: must leave images for training and for validation; "
            f"the training set has {count}, so use 1 to {count - 1}"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:val_size].sort().values


def choose_val_indices(count: int, args: Namespace, stored: Tensor | None) -> Tensor:
    """The images held out of `count`: those a checkpoint `stored`, else drawn by the flags."""
    if stored is None:
        return draw_val_indices(count, args.val_size, args.seed)
    if not 0 < len(stored) < count or stored.min() < 0 or len(stored.unique()) < len(stored):
        raise InputError(
            f"--data {args.data}: the checkpoint holds out {len(stored)} images, no choice "
            f"of {count} training images; give the data it was trained on"
        )
    if stored.max() >= count:
        raise InputError(
            f"--data {args.data}: has {count} training images, and the checkpoint's validation "
            f"images go up to number {int(stored.max())}; give the data it was trained on"
        )
    return stored


def tensor_split(
    args: Namespace,
    val_indices: Tensor | None,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augmentation | None = None,
) -> tuple[Split, Tensor]:
    """Loaders over (images, labels) pairs on the device, and the validation images' indices.

    The validation images are taken off the training set; `val_indices` as `choose_val_indices`.
    """
    images, labels = train
    val_indices = choose_val_indices(len(labels), args, val_indices)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[val_indices] = True
    kept = (images[~held_out].to(args.device), labels[~held_out].to(args.device))
    every = torch.cat([labels, test[1]])
    split = Split(
        train=TensorLoader(*kept, args.batch_size, mean, std, args.seed, augment),
        val=test_loader(args, (images[held_out], labels[held_out]), mean, std),
        test=test_loader(args, test, mean, std),
        labels=range(int(every.min()), int(every.max()) + 1),
        shape=tuple(images.shape[1:]),
    )
    return split, val_indices


def test_loader(
    args: Namespace, data: tuple[Tensor, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
) -> TensorLoader:
    """Batches of (images, labels), in order and unchanged, on the device: to evaluate on."""
    images, labels = (part.to(args.device) for part in data)
    return TensorLoader(images, labels, EVAL_BATCH, mean, std)


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
