"""Made-up pictures in ILSVRC12's folders, for timing: noise of several sizes, which shows nothing.

    python benchmarks/made_up_pictures.py DIR --train 4096 --val 512

Pictures of 500 x 375 pixels have about 83 KB; ILSVRC12's, of as many pixels, have 110 KB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
GRAINS = ((4, 60), (16, 30), (64, 18))  # patches across the picture, and how strong they are


def picture(number: int, width: int, height: int) -> Image.Image:
    """Return the picture of that number."""
    random = np.random.default_rng(number)
    total = random.normal(118, 10, (height, width, 1)).astype(np.float32) + np.zeros(3, np.float32)
    for across, strength in GRAINS:
        size = (max(2, across * height // width), across)
        for channel in range(3):
            patches = Image.fromarray(random.normal(0, strength, size).astype(np.float32))
            spread = patches.resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(spread)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def write_some(places: Iterable[tuple[int, Path]], width: int, height: int) -> None:
    """Write pictures, each as the file that is given with its number."""
    for number, path in places:
        picture(number, width, height).save(path, "JPEG", quality=90)


def write(root: Path, train: int, val: int, width: int = 500, height: int = 375) -> None:
    """Write `root`/train and `root`/val, whose classes take turns; on all cores."""
    places = []
    for number in range(train + val):
        part = "train" if number < train else "val"
        folder = root / part / f"n{number % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        places.append((number, folder / f"{part}_{number:08d}.JPEG"))
    with ProcessPoolExecutor() as pool:
        chunks = [places[k : k + 64] for k in range(0, len(places), 64)]
        list(pool.map(partial(write_some, width=width, height=height), chunks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--train", type=int, default=4096, help="training pictures (4096)")
    parser.add_argument("--val", type=int, default=512, help="test pictures (512)")
    parser.add_argument("--size", type=int, nargs=2, default=[500, 375], help="pixels (500 375)")
    args = parser.parse_args()
    write(args.root, args.train, args.val, *args.size)


if __name__ == "__main__":
    main()
