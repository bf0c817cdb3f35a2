"""How many pictures a second ILSVRC12's loader gives, beside other ways to make the same batch.

    python benchmarks/made_up_pictures.py DIR --train 512 --val 128
    python benchmarks/loader.py DIR --cpu-time         one worker's core, in its processor time
    python benchmarks/loader.py DIR --device cuda      all cores and the device, as in training

"as floats" is the usual way of torchvision: Pillow decodes, cuts and resizes, and each worker
normalises in float32. "as bytes" leaves that to the device. "tensors" resizes bytes as tensors;
"decoded by torchvision" also decodes into them, which is what the loader does in training.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision import transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alq.data import imagenet
from alq.data.imagenet import PictureLoader, read_folder, read_picture
from alq.machine.processes import own_cores
from timing import write_figures


def ways() -> dict[str, Callable[[str], torch.Tensor]]:
    """Return by name what makes the tensor of a training picture's file."""
    size = imagenet.CROP
    cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    floats = [transforms.ToTensor(), transforms.Normalize(imagenet.MEAN, imagenet.STD)]
    tensors = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    compose = transforms.Compose
    return {
        "as floats": compose([read_picture, *cut, *floats]),
        "as bytes": compose([read_picture, *cut, transforms.PILToTensor()]),
        "tensors": compose([read_picture, v2.functional.pil_to_tensor, *tensors]),
        "decoded by torchvision": imagenet.transform(training=True),
    }


def difference(loader: PictureLoader, count: int = 50) -> dict[str, float]:
    """Return how far training's values are from Pillow's of the same cuts: of 255, and of how many.

    The cuts are the same, as both ways draw the same numbers.
    """
    found = []
    for name in ("as bytes", "decoded by torchvision"):
        loader.pictures.transform = ways()[name]
        found.append(torch.stack([loader.pictures[k, k][0].int() for k in range(count)]))
    apart = (found[0] - found[1]).abs()
    return {"largest": int(apart.max()), "share of values": float((apart > 0).float().mean())}


def rate_of_all(loader: PictureLoader) -> float:
    """Return the pictures a second of one pass, its start included."""
    start = time.perf_counter()
    for _ in loader:
        pass
    if loader.device.type == "cuda":
        torch.cuda.synchronize()
    return loader.count / (time.perf_counter() - start)


def rate_of_one_core(loader: PictureLoader) -> float:
    """Return how many pictures a worker makes in a second of processor time."""
    start = time.process_time()
    for number in range(loader.count):
        loader.pictures[number, number]
    return loader.count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=own_cores(), help="processes (all cores)")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="passes of each way (3)")
    parser.add_argument("--cpu-time", action="store_true", help="of one core; no processes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rate = rate_of_one_core if args.cpu_time else rate_of_all
    if args.cpu_time:
        torch.set_num_threads(1)
    flags = Namespace(**vars(args), channels_last=True)
    train, val = (read_folder(args.data, part).samples for part in ("train", "val"))
    loaders = {name: PictureLoader(train, flags, seed=0) for name in ways()}
    for name, way in ways().items():
        loaders[name].pictures.transform = way
        if name == "as floats":  # which are normalised
            loaders[name].normalise = torch.nn.Identity()
    loaders["evaluation"] = PictureLoader(val, flags)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(args.repeats + 1):  # the first pass reads the disk
        for name, loader in loaders.items():  # they take turns
            rates[name].append(rate(loader))
            print(f"pass {number}, {name}: {rates[name][-1]:.0f} pictures/s", flush=True)
    medians = {name: sorted(found[1:])[args.repeats // 2] for name, found in rates.items()}
    print(*(f"{name:24}{median:8.0f} pictures/s" for name, median in medians.items()), sep="\n")
    apart = difference(loaders["as bytes"], min(50, len(train)))
    print(f"training's values differ from Pillow's: {apart}")
    if args.json:
        write_figures(args.json, args.device, rows=medians, **{"beside Pillow": apart})


if __name__ == "__main__":
    main()
