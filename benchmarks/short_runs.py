"""What the short runs of the comparisons share: the networks they start from, data, logs, flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lenet5
from alq.command.run import run_stages
from alq.data import mnist
from alq.data.loaders import Split, TensorLoader, split_tensors
from alq.files.checkpoint import load_checkpoint
from alq.files.history import read_events
from alq.files.runlog import RunLog, describe_run
from small_networks import SMALL_NETWORKS

SOURCES = Path("checkpoints/sweep")
SEEDS = (0, 1, 2)
# The full-precision training of `make demo`.
PRETRAIN = "--PRETRAIN --epoch_pretrain 6 --lr_pretrain 0.05 --milestones_pretrain 3 5".split()
EPOCH_FIELDS = (
    "epoch", "kind", "lr", "round", "loss", "train_accuracy", "val_loss", "val_accuracy",
    "bitwidth", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where all runs of one network, data set and seed begin: one full-precision network."""

    net: str
    dataset: str
    seed: int

    @property
    def name(self) -> str:
        """What the network's files are called."""
        return f"{self.net}_{self.dataset}_source_seed{self.seed}"

    def train(self, args: argparse.Namespace) -> Path:
        """Return the network's checkpoint; it is trained if it is not there, with a log."""
        path = args.sources / f"{self.name}.pth"
        if path.exists():
            return path
        network = SMALL_NETWORKS[self.net]
        flags = ["--dataset", self.dataset, "--seed", self.seed, "--data", args.data]
        flags += ["--model_ori", path, "--model", args.out / self.name, "--threads", args.threads]
        flags += ["--structure", *network.structure, "--subc", *network.subc]
        (args.out / f"{self.name}.jsonl").unlink(missing_ok=True)
        parser = lenet5.command_line(self.dataset)
        run_stages(network.on(self.dataset), parser, [*PRETRAIN, *map(str, flags)])
        return path

    def load(self, args: argparse.Namespace) -> tuple[nn.Module, TensorLoader, Split, float]:
        """Return the network, the batches to train on, the loaders of all images, its accuracy."""
        source = load_checkpoint(self.train(args), self.net)
        torch.manual_seed(self.seed)
        model = SMALL_NETWORKS[self.net].on(self.dataset).network()
        model = model.to(args.device, memory_format=torch.channels_last)
        model.load_state_dict(source["model"])
        kind, pictures = mnist.SETS[self.dataset], read_pictures(args.data, self.dataset)
        split, _ = split_tensors(self.flags(args), source["val_indices"], *pictures, kind)
        part = (x[: args.train_size] for x in (split.train.images, split.train.labels))
        batches = TensorLoader(*part, args.batch_size, kind.mean, kind.std, self.seed)
        return model, batches, split, source["top1_fp"]

    def flags(self, args: argparse.Namespace) -> argparse.Namespace:
        """Return the flags of a run: its own data set and seed in the place of the lists."""
        return argparse.Namespace(**{**vars(args), "dataset": self.dataset, "seed": self.seed})

    def new_log(self, name: str, args: argparse.Namespace, **what: object) -> RunLog:
        """Return a new log that says what the run is of."""
        path = args.out / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        log = RunLog(path)
        about = {**describe_run(self.flags(args)), "net": self.net, "dataset": self.dataset}
        log.write("start", **{**about, **what})
        return log


@cache
def read_pictures(root: Path, dataset: str) -> tuple:
    """Return what `mnist.read_mnist` does, from the disk only once."""
    return mnist.read_mnist(root, dataset)


def compact(fields: dict) -> dict:
    """Return what is logged of an epoch: EPOCH_FIELDS, numbers with six digits."""
    return {key: short(fields[key]) for key in EPOCH_FIELDS}


def short(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def finished(log: Path) -> list[dict]:
    """Return the events of a run; none if it has not come to its end."""
    found = read_events(log) if log.exists() else []
    return found if found and found[-1]["event"] == "result" else []


def seeds_of(folder: Path, name: str) -> Iterator[list[dict]]:
    """Yield the events of a run's seeds that have come to their end."""
    for seed in SEEDS:
        if events := finished(folder / f"{name}_seed{seed}.jsonl"):
            yield events


def add_flags(parser: argparse.ArgumentParser, out: Path, train_size: int) -> None:
    """Add the flags that all comparisons have."""
    parser.add_argument("--dataset", nargs="+", choices=mnist.SETS, default=[*mnist.SETS])
    parser.add_argument("--seed", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--out", type=Path, default=out, help="folder of the logs")
    parser.add_argument(
        "--sources", type=Path, default=SOURCES, help="of the networks that runs start from"
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--train_size", type=int, default=train_size, help="images of an epoch")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(
        batch_size=lenet5.DEFAULTS["batch_size"], augment=0, compile=False, tf32=False,
        channels_last=True, cudnn_benchmark=False, deterministic=False,
    )  # fmt: skip
