"""ILSVRC12, for the ResNets: folders of JPEGs, read by worker processes while training.

`train/` gives the training and the validation pictures, `val/` the test pictures. torchvision's
ImageFolder finds them, torch's DataLoader reads them; they travel as bytes, and the training device
normalises them. Evaluation decodes and resizes by Pillow, as torchvision's published accuracies do.
Training does it by torchvision's tensor operations, in two thirds of the time.
"""

import atexit
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io, transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from ..errors import InputError
from ..machine.interruption import leave_signals_to_parent
from .loaders import Loader, Normalise, Split, choose_val_indices, memory_format

Samples = list[tuple[str, int]]  # a file and its label each
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels in 0..1
RESIZE, CROP = 256, 224  # shorter side of a test picture before its crop; pixels of every crop


def load_splits(args: Namespace, val_indices: Tensor | None) -> tuple[Split, Tensor]:
    """Return loaders, training pictures changed at random, and the validation pictures' places."""
    train, test = read_folder(args.data, "train"), read_folder(args.data, "val")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise InputError(
            f"--data {args.data}: train/ and val/ must have the same classes as sub-folders; "
            f"'{odd}' is in one of them only"
        )
    val_indices = choose_val_indices(len(train), args, val_indices)
    held_out = set(val_indices.tolist())
    kept = [sample for place, sample in enumerate(train.samples) if place not in held_out]
    val = [train.samples[place] for place in sorted(held_out)]
    split = Split(
        train=PictureLoader(kept, args, args.seed),
        val=PictureLoader(val, args),
        test=PictureLoader(test.samples, args),
        labels=range(len(train.classes)),
        shape=(3, CROP, CROP),
    )
    return split, val_indices


def load_test(args: Namespace) -> Loader:
    return PictureLoader(read_folder(args.data, "val").samples, args)


def read_folder(root: Path, part: str) -> ImageFolder:
    """Return the pictures in `root`/`part`; InputError says how to arrange them."""
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


def transform(training: bool) -> Callable[[str], Tensor]:
    """Return what makes (3, CROP, CROP) uint8 of a file: of a random part, or of its middle."""
    if training:
        cut = v2.RandomResizedCrop(CROP, antialias=True)
        return transforms.Compose([read_pixels, cut, v2.RandomHorizontalFlip()])
    cuts = [transforms.Resize(RESIZE), transforms.CenterCrop(CROP)]
    return transforms.Compose([read_picture, *cuts, transforms.PILToTensor()])


class Pictures(Dataset):
    """Picture files and labels. An item is asked for by (place, seed): the seed of its transform.

    What a random transform does then depends on that seed alone: not on the number of workers or
    processes, nor on what was loaded before.
    """

    def __init__(self, samples: Samples, transform: Callable[[str], Tensor]) -> None:
        self.samples, self.transform = samples, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        place, seed = item
        path, label = self.samples[place]
        generator = torch.default_generator  # the host's alone; `manual_seed` would seed all
        before = generator.get_state()
        generator.manual_seed(seed)
        try:
            return self.transform(path), label
        finally:
            generator.set_state(before)


def read_picture(path: str) -> Image:
    """Return the picture, in RGB; InputError names a file that is none."""
    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
        raise InputError(
            f"--data: {path} is no whole picture ({error}); put the original there"
        ) from error


def read_pixels(path: str) -> Tensor:
    """Return the pixels of `read_picture`, (3, H, W) uint8, in less time where it is a usual JPEG.

    ILSVRC12 has others: a PNG of that name, and pictures in the four colours of print. Should
    torchvision do without a decoder of its own, as 0.29 announces, Pillow reads them all.
    """
    try:
        pixels = io.decode_jpeg(io.read_file(path))  # (1 or 3 or 4, H, W)
    except Exception:  # whatever stops it here: Pillow reads the file, or says what is wrong
        pixels = None
    if pixels is None or len(pixels) > 3:
        return pil_to_tensor(read_picture(path))
    return pixels.expand(3, -1, -1)


class PictureLoader(Loader):
    """Mini-batches of picture files, read by `args.workers` processes, on the training device.

    Those with a seed are changed at random.
    """

    def __init__(self, samples: Samples, args: Namespace, seed: int | None = None) -> None:
        super().__init__(len(samples), args.batch_size, seed, memory_format(args))
        self.pictures = Pictures(samples, transform(training=seed is not None))
        self.device, self.workers = args.device, args.workers
        self.normalise = Normalise(MEAN, STD, args.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = self.draw_order()
        seeds = torch.randint(2**62, (self.count,), generator=generator)
        items = list(zip(order.tolist(), seeds.tolist(), strict=True))
        loader = DataLoader(
            self.pictures,
            batch_sampler=[items[share.part] for share in self.shares[self.first :]],
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # its own, so that reading leaves torch's alone
            pin_memory=self.device.type == "cuda",
        )
        # Workers end with the only reference to their reader. After an error Python would hold it
        # at exit, ask them by SIGTERM, which they ignore, and wait for ever.
        reader = [iter(loader)]
        atexit.register(reader.clear)
        try:
            while batch := next(reader[0], None):
                x, y = (part.to(self.device, non_blocking=True) for part in batch)
                yield self.normalise(x).contiguous(memory_format=self.layout), y
        except InputError as error:  # from a worker it comes with the worker's whole traceback
            line = str(error).strip().splitlines()[-1]
            raise InputError(line.removeprefix("alq.errors.InputError: ")) from error
        finally:
            atexit.unregister(reader.clear)
            reader.clear()
