"""ILSVRC12 as folders of JPEGs, through torchvision's ImageFolder and torch's DataLoader."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from ..errors import InputError
from ..machine.interruption import leave_signals_to_parent
from ..machine.processes import Share, shares
from .loaders import Split, choose_val_indices

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1
RESIZE, CROP = 256, 224  # shorter side of a test picture before its crop; pixels of every crop


class Pictures(Dataset):
    """Picture files and labels. An item is asked for by (place, seed): the seed of its transform.

    What a random transform does to a picture then depends on that seed alone: not on the number
    of workers or processes, nor on what was loaded before.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: transforms.Compose) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        place, seed = item
        path, label = self.samples[place]
        picture = read_picture(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(picture), label


def read_picture(path: str) -> Image:
    """The picture, in RGB; InputError names a file that is none."""
    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
        raise InputError(
            f"--data: {path} is no whole picture ({error}); put the original there"
        ) from error


def ignore_signals(worker: int) -> None:
    """What stops a run is the main process's to decide, and it needs its workers until then."""
    leave_signals_to_parent()


class Batches(Sampler[list[tuple[int, int]]]):
    """The (place, seed) pairs of each batch; with a seed in a new order at every epoch.

    Of several processes each gets its share of every batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None) -> None:
        self.count, self.seed = count, seed
        self.epoch = self.first = 0
        self.shares = shares(count, batch_size, training=seed is not None)

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, seeds = torch.arange(self.count), torch.zeros(self.count, dtype=torch.long)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator)
            seeds = torch.randint(2**62, (self.count,), generator=generator)
        items = list(zip(order.tolist(), seeds.tolist(), strict=True))
        for share in self.shares[self.first :]:
            yield items[share.part]


class PictureLoader:
    """Mini-batches of `Pictures`, read by worker processes, on the training device.

    Yields (x, y): x (batch, 3, H, W) float32 in channels_last, y (batch,) int64.
    """

    def __init__(
        self,
        pictures: Pictures,
        batch_size: int,
        device: torch.device,
        workers: int,
        seed: int | None = None,
    ) -> None:
        self.device, self.count = device, len(pictures)
        self.batches = Batches(len(pictures), batch_size, seed)
        self.loader = DataLoader(
            pictures,
            batch_sampler=self.batches,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # its own, so that reading leaves torch's alone
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def shares(self) -> list[Share]:
        return self.batches.shares

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the order and the random transforms of the next pass, and its first batch."""
        self.batches.epoch, self.batches.first = epoch, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for x, y in self.loader:
                x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                yield x, y.to(self.device, non_blocking=True)
        except InputError as error:  # from a worker it comes with the worker's whole traceback
            line = str(error).strip().splitlines()[-1]
            raise InputError(line.removeprefix("alq.errors.InputError: ")) from error


def read_folder(root: Path, part: str) -> ImageFolder:
    """The pictures in `root`/`part`; InputError says how to arrange them."""
    folder = root / part
    if not folder.is_dir():
        raise InputError(
            f"--data {root}: no folder {folder}; the pictures of ILSVRC12 belong into "
            f"{root}/train/n01440764 and {root}/val/n01440764, and so on for every class"
        )
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise InputError(
            f"--data {root}: {folder} is flat, but needs a sub-folder per class; move its pictures "
            f"into sub-folders named as those of {root}/train, or remove {folder}, put "
            f"ILSVRC2012_img_{part}.tar and ILSVRC2012_devkit_t12.tar.gz into {root} and let "
            'torchvision do it: python -c "from torchvision.datasets import ImageNet; '
            f"ImageNet('{root}', '{part}')\""
        )
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"--data {root}: {str(error).splitlines()[0]}") from error
    read_picture(found.samples[0][0])  # of all, the first: before any work
    return found


def folder_split(args: Namespace, val_indices: Tensor | None) -> tuple[Split, Tensor]:
    """Loaders over `args.data`, and the validation images' places in the sorted training set.

    `train/` gives the training and the validation images, `val/` the test images. Only the
    training images are transformed at random.
    """
    train, test = read_folder(args.data, "train"), read_folder(args.data, "val")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise InputError(
            f"--data {args.data}: train/ and val/ must have the same classes as sub-folders; "
            f"'{odd}' is in one of them only"
        )
    val_indices = choose_val_indices(len(train), args, val_indices)
    held_out = set(val_indices.tolist())
    parts: dict[bool, list] = {True: [], False: []}
    for place, sample in enumerate(train.samples):
        parts[place in held_out].append(sample)

    split = Split(
        train=_loader(args, parts[False], train_transform(), args.seed),
        val=_loader(args, parts[True], test_transform()),
        test=_loader(args, test.samples, test_transform()),
        labels=range(len(train.classes)),
        shape=(3, CROP, CROP),
    )
    return split, val_indices


def folder_test(args: Namespace) -> PictureLoader:
    """The test images, of which `val/` has all."""
    return _loader(args, read_folder(args.data, "val").samples, test_transform())


def _loader(
    args: Namespace, samples: list, transform: transforms.Compose, *seed: int
) -> PictureLoader:
    pictures = Pictures(samples, transform)
    return PictureLoader(pictures, args.batch_size, args.device, args.workers, *seed)


def train_transform() -> transforms.Compose:
    """Random resized crop and flip."""
    return transforms.Compose(
        [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), *_normalise()]
    )


def test_transform() -> transforms.Compose:
    """The middle of the picture; for validation, too."""
    return transforms.Compose(
        [transforms.Resize(RESIZE), transforms.CenterCrop(CROP), *_normalise()]
    )


def _normalise() -> list:
    return [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
