"""MNIST, for LeNet5: 60 000 training and 10 000 test images, as tensors on the device."""

import gzip
import hashlib
import os
import zlib
from argparse import Namespace
from pathlib import Path

from torch import Tensor
from torchvision import datasets

from ..errors import InputError
from ..machine.processes import main_first
from .loaders import CropFlip, Labelled, Loader, Split, downloads, evaluation_loader, split_tensors

CARRIED = Path(__file__).resolve().parents[2] / "data"  # with a checkout
MEAN, STD = (0.1307,), (0.3081,)  # of the pixels in 0..1
SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_splits(args: Namespace, val_indices: Tensor | None) -> tuple[Split, Tensor]:
    """Return loaders, training images shifted by --augment, and the validation images' places."""
    shifts = CropFlip(args.augment, mirror=False) if args.augment else None
    return split_tensors(args, val_indices, *read_mnist(args.data), MEAN, STD, shifts)


def load_test(args: Namespace) -> Loader:
    return evaluation_loader(args, read_mnist(args.data)[1], MEAN, STD)


@main_first()
def read_mnist(root: str | Path) -> tuple[Labelled, Labelled]:
    """Return (images, labels) of the training set and of the test set; (N, 1, 28, 28) uint8.

    Reads `root`/MNIST/raw: unpacks the .gz files on first use and checks them against SHA256.
    Where there are none, torchvision downloads them.
    """
    root = Path(root)
    raw = root / "MNIST" / "raw"
    for name in SHA256:
        if not (raw / name).exists() and (raw / f"{name}.gz").exists():
            _unpack(raw / f"{name}.gz")
    if not all((raw / name).exists() for name in SHA256):
        advice = f"Use --data {CARRIED}, which the project carries, or put the four .gz files there"
        with downloads(root, f"no MNIST in {raw}", advice):
            datasets.MNIST(root, download=True)
    for name, checksum in SHA256.items():
        found = hashlib.sha256((raw / name).read_bytes()).hexdigest()
        if found != checksum:
            raise InputError(
                f"--data {root}: {raw / name} is damaged (SHA-256 {found[:12]}..., expected "
                f"{checksum[:12]}...); delete it and start again"
            )
    sets = (datasets.MNIST(root, train=train) for train in (True, False))
    train, test = ((data.data.unsqueeze(1), data.targets) for data in sets)
    return train, test


def _unpack(packed: Path) -> None:
    """Unpack the .gz file beside itself, in full or not at all."""
    try:
        content = gzip.decompress(packed.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{packed} is damaged or half downloaded ({error})") from error
    temporary = packed.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(packed.with_suffix(""))
