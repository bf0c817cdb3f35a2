"""MNIST and Fashion-MNIST, for LeNet5: each 60 000 training and 10 000 test images, as tensors."""

import gzip
import hashlib
import zlib
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from ..errors import InputError
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

CARRIED = Path(__file__).resolve().parents[2] / "data"  # with a checkout, and only MNIST
SETS = {  # the paper's first
    "mnist": DataSet("MNIST", datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "fashion_mnist": DataSet("Fashion-MNIST", datasets.FashionMNIST, 10, (0.2860,), (0.3530,)),
}
FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
SHA256 = {  # of FILES, unpacked
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def load_splits(args: Namespace, val_indices: Tensor | None) -> tuple[Split, Tensor]:
    """Return loaders, training images shifted by --augment, and the validation images' places."""
    shifts = CropFlip(args.augment, mirror=False) if args.augment else None
    sets = read_mnist(args.data, args.dataset)
    return split_tensors(args, val_indices, *sets, SETS[args.dataset], shifts)


def load_test(args: Namespace) -> Loader:
    test = read_mnist(args.data, args.dataset)[1]
    return evaluation_loader(args, test, SETS[args.dataset])


@main_first()
def read_mnist(root: str | Path, dataset: str = "mnist") -> tuple[Labelled, Labelled]:
    """Return (images, labels) of the training set and of the test set; (N, 1, 28, 28) uint8.

    Reads FILES in `root`/MNIST/raw, or `root`/FashionMNIST/raw, unpacked or packed (.gz), and
    checks them against SHA256. Where there are none, torchvision downloads them.
    """
    root, kind = Path(root), SETS[dataset]
    raw = root / kind.source.__name__ / "raw"
    if not all(_stored(raw / name).exists() for name in FILES):
        with downloads(root, kind.title, raw, _advice(dataset)):
            kind.source(root, download=True)
    contents = []
    for name, checksum in zip(FILES, SHA256[dataset], strict=True):
        path = _stored(raw / name)
        contents.append(_content(path, root))
        found = hashlib.sha256(contents[-1]).hexdigest()
        if found != checksum:
            raise InputError(
                f"--data {root}: {path} is damaged (SHA-256 {found[:12]}..., expected "
                f"{checksum[:12]}...); delete it and start again"
            )
    images, labels, test_images, test_labels = map(_values, contents)
    return (images, labels), (test_images, test_labels)


def _stored(file: Path) -> Path:
    """Return the path of `file`, or of the packed one if that is there alone."""
    packed = Path(f"{file}.gz")
    return packed if packed.exists() and not file.exists() else file


def _content(path: Path, root: Path) -> bytes:
    """Return the content of a file in `root`, unpacked if it is packed."""
    content = path.read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"--data {root}: {path} is damaged or half downloaded ({error}); delete it and start "
            "again"
        ) from error


def _values(content: bytes) -> Tensor:
    """Return the bytes after the header of an idx file: pictures of 28 x 28 pixels, or labels."""
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    dimensions = int(values[3])
    values = values[4 + 4 * dimensions :]  # the header: 4 bytes, and 4 a dimension
    return values.long() if dimensions == 1 else values.view(-1, 1, 28, 28)


def _advice(dataset: str) -> str:
    if dataset == "mnist":
        return f"Use --data {CARRIED}, which the project carries, or put the four .gz files there"
    source = SETS[dataset].source
    return (
        f"Put the four .gz files of {source.mirrors[0]} there, or name with --data the folder that "
        f"holds {source.__name__}/raw"
    )
