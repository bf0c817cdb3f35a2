"""Small sets of real pictures in the formats of CIFAR-10, CIFAR-100, ILSVRC12: coloured digits.

    python tests/small_sets.py cifar DIR [COUNT [CLASSES]]      cifar-10-python.tar.gz in DIR
    python tests/small_sets.py imagenet DIR [COUNT [CLASSES]]   DIR/train/n.../*.JPEG, DIR/val/...

    python tests/small_sets.py vgg DIR FLAGS                    vgg.py on such an archive
    python tests/small_sets.py resnet DIR FLAGS                 resnet.py on such folders, the
                                                                pictures cropped to 64 pixels

COUNT is the number of training pictures; there is one test picture for every five of them. With
CLASSES, only digits below it are taken.
torchvision compares CIFAR's files with MD5 tables: `md5_tables` has those of the small set, for
tests to put in their place.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

MNIST = Path(__file__).parents[1] / "data" / "MNIST" / "raw"


def coloured_digits(
    kind: str, count: int, side: int = 32, classes: int = 10
) -> tuple[np.ndarray, list[int]]:
    """(count, 3, side, side) uint8 and labels: the first of MNIST's `kind` (train, t10k).

    Only digits below `classes` count.
    """
    with gzip.open(MNIST / f"{kind}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    places = np.flatnonzero(labels < classes)[:count]
    with gzip.open(MNIST / f"{kind}-images-idx3-ubyte.gz") as file:
        digits = np.frombuffer(file.read(16 + 784 * (places[-1] + 1)), np.uint8, offset=16)
    labels, digits = labels[places], digits.reshape(-1, 28, 28)[places]
    digits = np.pad(digits, ((0, 0), (2, 2), (2, 2)))
    digits = digits.repeat(side // 32, axis=1).repeat(side // 32, axis=2)
    random = np.random.default_rng(0)
    ink = random.uniform(0.5, 1, (count, 3, 1, 1))
    paper = random.uniform(0, 0.5, (count, 3, 1, 1)) * 255
    pictures = np.empty((len(digits), 3, side, side), np.uint8)
    for some in (slice(k, k + 1000) for k in range(0, len(digits), 1000)):  # for little memory
        drawn = paper[some] + digits[some, None] * (ink[some] - paper[some] / 255)
        pictures[some] = drawn.round()
    return pictures, labels.tolist()


def write_cifar10(root: Path, count: int, classes: int = 10) -> None:
    """cifar-10-python.tar.gz in `root`: five training batches, a test batch, the class names."""
    root.mkdir(parents=True, exist_ok=True)
    pictures, labels = coloured_digits("train", count, classes=classes)
    batches = {
        f"data_batch_{k + 1}": (part, labels[part[0] : part[-1] + 1])
        for k, part in enumerate(np.array_split(np.arange(count), 5))
    }
    files = {
        name: _batch(f"training batch {name[-1]} of 5", pictures[part], own)
        for name, (part, own) in batches.items()
    }
    test = coloured_digits("t10k", count // 5, classes=classes)
    files["test_batch"] = _batch("testing batch 1 of 1", *test)
    names = [f"digit {k}" for k in range(10)]
    files["batches.meta"] = {"num_cases_per_batch": count // 5, "label_names": names}
    files["batches.meta"]["num_vis"] = 3072
    _write_archive(root / datasets.CIFAR10.filename, datasets.CIFAR10.base_folder, files)


def write_cifar100(root: Path, count: int) -> None:
    """cifar-100-python.tar.gz in `root`: both sets and the class names.

    Label 10 d + k, of a digit d, is given to those in places that end in k.
    """
    root.mkdir(parents=True, exist_ok=True)
    fine, coarse = ([f"{kind} {k}" for k in range(n)] for kind, n in (("digit", 100), ("five", 20)))
    files: dict[str, dict] = {"meta": {"fine_label_names": fine, "coarse_label_names": coarse}}
    for name, kind, number in (("train", "train", count), ("test", "t10k", count // 5)):
        pictures, digits = coloured_digits(kind, number)
        labels = [10 * digit + place % 10 for place, digit in enumerate(digits)]
        files[name] = _batch(f"{name}ing batch 1 of 1", pictures, labels, "fine_labels")
        files[name]["coarse_labels"] = [label // 5 for label in labels]
    _write_archive(root / datasets.CIFAR100.filename, datasets.CIFAR100.base_folder, files)


def _write_archive(path: Path, folder: str, files: dict[str, dict]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _batch(title: str, pictures: np.ndarray, labels: list[int], key: str = "labels") -> dict:
    return {
        "batch_label": title,
        key: labels,
        "data": pictures.reshape(len(pictures), 3072),
        "filenames": [f"digit_{k:06d}.png" for k in range(len(pictures))],
    }


def md5_tables(root: Path, source: type = datasets.CIFAR10) -> dict[str, object]:
    """The attributes of torchvision's class `source` that fit its archive in `root`."""

    def md5(data: bytes) -> str:
        return hashlib.md5(data).hexdigest()

    path = root / source.filename
    with tarfile.open(path) as archive:
        sums = {Path(entry.name).name: md5(archive.extractfile(entry).read()) for entry in archive}
    return {
        "tgz_md5": md5(path.read_bytes()),
        "train_list": [[name, sums[name]] for name, _ in source.train_list],
        "test_list": [[name, sums[name]] for name, _ in source.test_list],
        "meta": {**source.meta, "md5": sums[source.meta["filename"]]},
    }


def write_imagenet(root: Path, count: int, side: int = 64, classes: int = 10) -> None:
    """`root`/train and `root`/val with a folder of JPEGs for each digit below `classes`."""
    for part, kind, number in (("train", "train", count), ("val", "t10k", count // 5)):
        pictures = zip(*coloured_digits(kind, number, side, classes), strict=True)
        for k, (picture, label) in enumerate(pictures):
            folder = root / part / f"n{10000000 + label}"
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{folder.name}_{k}.JPEG" if part == "train" else f"val_{k:08d}.JPEG"
            Image.fromarray(picture.transpose(1, 2, 0)).save(folder / name, "JPEG", quality=95)


def run_vgg(root: Path, flags: list[str]) -> None:
    """vgg.py with the MD5 tables of the archive in `root`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import vgg

    for name, table in md5_tables(root).items():
        setattr(datasets.CIFAR10, name, table)
    vgg.main(["--data", str(root), *flags])


def run_resnet(root: Path, flags: list[str]) -> None:
    """resnet.py with crops of 64 pixels instead of 224."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import resnet
    from alq.data import imagenet

    imagenet.RESIZE, imagenet.CROP = 72, 64
    resnet.main(["--data", str(root), *flags])


if __name__ == "__main__":
    task, root, *rest = sys.argv[1:]
    if task in ("vgg", "resnet"):
        {"vgg": run_vgg, "resnet": run_resnet}[task](Path(root), rest)
    elif task == "cifar":
        write_cifar10(Path(root), *map(int, rest or [500]))
    else:
        count, *classes = map(int, rest or [500])
        write_imagenet(Path(root), count, 64, *classes)
