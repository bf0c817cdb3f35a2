"""Mini-batches on the training device: of any data set, and of one that fits there as a whole.

Such a data set is moved to the device once, as bytes; a batch is then one gather and a
normalisation there, with no per-image Python.
"""

import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..machine.processes import process_count, rank, share_batches

Labelled = tuple[Tensor, Tensor]  # images and labels
PerChannel = tuple[float, ...]
EVAL_BATCH = 1000  # images per evaluation batch; has no influence on the result


@dataclass(frozen=True)
class DataSet:
    """What tells a data set from others of the same format.

    Attributes:
        title: as it is written.
        source: torchvision's class, which downloads and reads it.
        classes: how many labels there are, from 0.
        mean, std: per channel, of the training pixels in 0..1.
    """

    title: str
    source: Any
    classes: int
    mean: PerChannel
    std: PerChannel


class Loader:
    """Mini-batches of a data set; those with a seed come in a new order at every epoch.

    Iterating yields x (batch, C, H, W) float32 and y (batch,) int64, of several processes to each
    its share of every batch.

    Arguments:
        layout: of x in memory.

    Attributes:
        count: images an epoch, over all processes.
        shares: this process's share of each batch.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int | None,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:  # fmt: skip
        self.count, self.seed, self.layout = count, seed, layout
        self.epoch = self.first = 0
        self.shares = share_batches(count, batch_size, seed is not None, rank(), process_count())

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError("each kind of data set has a loader of its own")

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the order of the next pass, and the batch, from 0, that it begins with."""
        self.epoch, self.first = epoch, first

    def draw_order(self) -> tuple[Tensor, torch.Generator]:
        """Return the epoch's order (count,) and a generator, both of seed and epoch alone."""
        generator = torch.Generator()
        if self.seed is None:
            return torch.arange(self.count), generator
        generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.count, generator=generator), generator


class Normalise:
    """Pixels as bytes -> (x/255 - mean) / std of each channel, in float32 on `device`."""

    def __init__(self, mean: PerChannel, std: PerChannel, device: torch.device) -> None:
        both = torch.tensor([mean, std], dtype=torch.float32, device=device)
        means, stds = both.view(2, 1, -1, 1, 1)  # (1, C, 1, 1) each
        # (x/255 - mean) / std  =  x * scale + shift
        self.scale, self.shift = 1 / (255 * stds), -(means / stds)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images (batch, C, H, W) uint8, which are on the device, normalised."""
        return torch.addcmul(self.shift, images.float(), self.scale)


def memory_format(args: Namespace) -> torch.memory_format:
    """Return the layout of pictures and network: channels_last, unless it is switched off."""
    return torch.contiguous_format if args.channels_last is False else torch.channels_last


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


class CropFlip:
    """torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, each image on its own.

    The image is padded with black by `padding` pixels, cut to its old size at a random place, and,
    unless `mirror` is off, mirrored with probability 1/2. What happens is drawn on the host, and
    done on the images' device.
    """

    def __init__(self, padding: int = 4, mirror: bool = True) -> None:
        self.padding, self.mirror = padding, mirror

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count, 3) int64: top and left of the cut in the padded image, and 1 to mirror."""
        corner = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirror = torch.randint(2 if self.mirror else 1, (count, 1), generator=generator)
        return torch.cat([corner, mirror], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images (batch, C, H, W) changed as `draws` (batch, 3), beside them, says."""
        batch, _, H, W = images.shape
        padded = F.pad(images, [self.padding] * 4)
        top, left, mirror = draws.unsqueeze(2).unbind(1)  # (batch, 1) each
        column = torch.arange(W, device=images.device)
        rows = top + torch.arange(H, device=images.device)  # (batch, H)
        columns = left + torch.where(mirror == 1, W - 1 - column, column)  # (batch, W)
        number = torch.arange(batch, device=images.device).view(-1, 1, 1)
        cut = padded[number, :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (batch, H, W, C)
        return cut.permute(0, 3, 1, 2)


class TensorLoader(Loader):
    """Mini-batches of a data set held as tensors on one device.

    Arguments:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, on the same device.
        mean, std: per channel, of pixel values in 0..1.
        augment: changes the images at random; needs a seed.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, mean: PerChannel, std: PerChannel,
        seed: int | None = None, augment: CropFlip | None = None,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:  # fmt: skip
        super().__init__(len(labels), batch_size, seed, layout)
        self.images, self.labels, self.augment = images, labels, augment
        self.normalise = Normalise(mean, std, images.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = self.draw_order()
        order = order.to(self.labels.device)
        if self.augment:
            draws = self.augment.draw(self.count, generator).to(self.labels.device)
        for share in self.shares[self.first :]:
            index = order[share.part]
            images = self.images[index]
            if self.augment:
                images = self.augment(images, draws[share.part])
            x = self.normalise(images)
            yield x.contiguous(memory_format=self.layout), self.labels[index]


def evaluation_loader(args: Namespace, data: Labelled, kind: DataSet) -> Loader:
    """Return batches of (images, labels), in order and unchanged, on the device."""
    images, labels = (part.to(args.device) for part in data)
    return TensorLoader(images, labels, EVAL_BATCH, kind.mean, kind.std, layout=memory_format(args))


def split_tensors(
    args: Namespace, val_indices: Tensor | None, train: Labelled, test: Labelled, kind: DataSet,
    augment: CropFlip | None = None,
) -> tuple[Split, Tensor]:  # fmt: skip
    """Return loaders on the device, validation images taken off `train`, and these ones' places."""
    images, labels = train
    val_indices = choose_val_indices(len(labels), args, val_indices)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[val_indices] = True
    kept = (images[~held_out].to(args.device), labels[~held_out].to(args.device))
    all_labels = torch.cat([labels, test[1]])
    split = Split(
        train=TensorLoader(
            *kept, args.batch_size, kind.mean, kind.std, args.seed, augment, memory_format(args)
        ),
        val=evaluation_loader(args, (images[held_out], labels[held_out]), kind),
        test=evaluation_loader(args, test, kind),
        labels=range(int(all_labels.min()), int(all_labels.max()) + 1),
        shape=tuple(images.shape[1:]),
    )
    return split, val_indices


@contextmanager
def downloads(root: str | Path, what: str, place: Path, advice: str) -> Iterator[None]:
    """Turn a download that fails within `with` into an InputError; leave no new folder.

    `what` should be in the folder `place` of the data folder `root`, but is not.
    """
    new = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        yield
    except (URLError, OSError, RuntimeError) as error:
        for folder in new[-1:]:  # the others lie in it
            shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"--data {root}: no {what} in {place}, and it could not be downloaded ({error}). "
            f"{advice}"
        ) from error


def choose_val_indices(count: int, args: Namespace, stored: Tensor | None) -> Tensor:
    """Return which of `count` images are held out: what a checkpoint `stored`, else drawn ones."""
    if stored is None:
        if not 0 < args.val_size < count:
            raise InputError(
                f"--val_size {args.val_size}: must leave images for training and for validation; "
                f"the training set has {count}, so use 1 to {count - 1}"
            )
        generator = torch.Generator().manual_seed(args.seed)
        return torch.randperm(count, generator=generator)[: args.val_size].sort().values
    distinct = 0 < len(stored.unique()) == len(stored) < count
    if not distinct or stored.min() < 0 or stored.max() >= count:
        raise InputError(
            f"--data {args.data}: the checkpoint's {len(stored)} validation images are no choice "
            f"of {count} training images; give the data it was trained on"
        )
    return stored
