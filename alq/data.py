"""Data sets as tensors on the training device, and the mini-batches drawn from them.

A data set that fits in memory is moved to the device once, as bytes; a batch is then one
gather and a normalisation there, with no per-image Python.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision import datasets

from .errors import InputError
from .parallel import Share, main_first, shares

EVAL_BATCH = 1000  # images per evaluation batch; has no influence on the result

# SHA-256 of the unpacked files (SPEC section 9).
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class Loader(Protocol):
    """What training needs of a data set: (x, y) batches, and a new order for each epoch."""

    count: int  # images an epoch, over all processes

    @property
    def shares(self) -> list[Share]:
        """This process's share of each batch (`alq.parallel`)."""
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


# ---------------------------------------------------------------------------- MNIST


@main_first()
def read_mnist(root: str | Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) of the training set, of the test set); images (N, 1, 28, 28) uint8.

    Reads `root`/MNIST/raw: unpacks the .gz files on first use and checks them against
    MNIST_SHA256. Where there are none, torchvision downloads them.
    """
    root = Path(root)
    raw = root / "MNIST" / "raw"
    for name in MNIST_SHA256:
        if not (raw / name).exists() and (raw / f"{name}.gz").exists():
            _unpack(raw / f"{name}.gz", raw / name)
    if not all((raw / name).exists() for name in MNIST_SHA256):
        try:
            datasets.MNIST(root, download=True)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"--data {root}: no MNIST in {raw}, and it could not be downloaded ({error}). Use "
                f"--data data, which the project carries, or put the four .gz files into {raw}"
            ) from error
    for name, digest in MNIST_SHA256.items():
        found = hashlib.sha256((raw / name).read_bytes()).hexdigest()
        if found != digest:
            raise InputError(
                f"--data {root}: {raw / name} is damaged (SHA-256 {found[:12]}..., expected "
                f"{digest[:12]}...); delete it and start again"
            )
    sets = (datasets.MNIST(root, train=train) for train in (True, False))
    train, test = ((data.data.unsqueeze(1), data.targets) for data in sets)
    return train, test


def _unpack(packed: Path, target: Path) -> None:
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with gzip.open(packed) as source, open(temporary, "wb") as sink:
            shutil.copyfileobj(source, sink)
        os.replace(temporary, target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{packed} is damaged or half downloaded ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
