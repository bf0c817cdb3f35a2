"""What each flag of the small file saves on the published networks, and costs in accuracy.

    python benchmarks/small_files.py        the table of docs/small-networks.md

Nothing is trained: each row loads the published file, packs it in another way, and tests that.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.data.loaders import EVAL_BATCH, TensorLoader
from alq.data.mnist import SETS, read_mnist
from alq.training.epoch import evaluate
from lenet5 import LeNet5, command_line
from tables import table

ROOT = Path(__file__).resolve().parents[1]
FILES = ("lenet5.alq", "lenet5_10kb.alq")
FLOATS = ("float16", "8bit", "6bit", "5bit", "4bit", "3bit")
ROWS = (
    "", "--floats float16", "--coded", *(f"--coded --floats {floats}" for floats in FLOATS),
    "--coded --fold", *(f"--coded --fold --floats {floats}" for floats in FLOATS),
)  # fmt: skip


def packed(file: str, flags: str, folder: Path, pictures: Tensor) -> tuple[nn.Module, int]:
    """Return the published network as a file packed with `flags` holds it, and that file's bytes.

    `pictures` are a batch, which folding compares outputs on.
    """
    args: Namespace = command_line().parse_args(shlex.split(flags))
    model, again = LeNet5(), LeNet5().eval()
    weights = alq.load_packed(ROOT / "checkpoints" / "published" / file, model)
    if args.fold:
        alq.fold_constant_units(model, weights, pictures)
    alq.round_floats(model, weights, args.floats)
    path = folder / "packed.alq"
    alq.save_packed(path, model, weights, args.floats, args.coded, "mnist")
    alq.load_packed(path, again)
    return again, path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="DIR")
    torch.set_num_threads(1)
    _, test = read_mnist(parser.parse_args().data)
    kind = SETS["mnist"]
    batches = TensorLoader(*test, EVAL_BATCH, kind.mean, kind.std)
    pictures, _ = next(iter(batches))
    head, rows = ["flags"], []
    for file in FILES:
        head += [f"`{file}`, bytes", "test %"]
    with tempfile.TemporaryDirectory() as folder:
        for flags in ROWS:
            rows.append([f"`{flags}`" if flags else "none"])
            for file in FILES:
                model, size = packed(file, flags, Path(folder), pictures[:64])
                rows[-1] += [str(size), f"{evaluate(model, batches)['accuracy']:.2f}"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
