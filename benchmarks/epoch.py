"""Where the time of a LeNet5 epoch on MNIST goes, for each kind of epoch.

    python benchmarks/epoch.py --threads 2 --json epoch.json [--compile]
    python benchmarks/epoch.py --table epoch.json [MORE.json]

Full precision, basis, coordinate, prune and STE at max_bit 6, fresh from the sketch: the seconds of
a whole epoch (medians; the kinds take turns) in data, forward + backward, optimizer (the quantizer,
or SGD; and Adam on the biases) and the rest. Starts from checkpoints/published/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import lenet5
from alq.data import mnist
from alq.extras.compiled import quantizer_class
from alq.files.checkpoint import load_checkpoint
from alq.training.epoch import classification
from alq.training.loop import Training, quantized_training, train
from alq.training.progress import Progress
from alq.training.pruning import PruneByRatio
from alq.training.schedule import Epoch
from networks import NETWORKS
from performance_tables import PARTS, epoch_tables
from timing import settle, write_figures

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("pretrain", "basis", "coordinate", "prune", "ste")


class Clock:
    """Adds up the seconds of each part of an epoch; `lap` books the time since the last call."""

    def __init__(self, sync: Callable[[], None], now: Callable[[], float]) -> None:
        self.sync, self.now, self.seconds = sync, now, defaultdict(float)
        self.last = now()

    def lap(self, part: str) -> None:
        self.sync()
        now = self.now()
        self.seconds[part] += now - self.last
        self.last = now

    def timed_loss(self, model: nn.Module, batch: object) -> tuple:
        self.lap("other")
        return classification(model, batch)

    def timed_step(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return `step` so that the time before it is booked; `after_step` books its own."""

        def timed() -> None:
            self.lap("forward + backward")
            step()

        return timed

    def after_step(self, between_epochs: bool) -> None:
        """Book the time of all optimizers: called by the training loop when it may save."""
        if not between_epochs:
            self.lap("optimizer")


@dataclass(frozen=True)
class TimedBatches:
    """An epoch's batches, each booked by `clock`."""

    batches: Sequence
    clock: Clock

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            self.clock.lap("data")
            yield batch
            self.clock.lap("other")


def training_of(kind: str, flags: Namespace) -> Training:
    """Return a new training of the published network that can take steps of `kind`."""
    torch.manual_seed(0)
    model = lenet5.LeNet5().to(flags.device, memory_format=torch.channels_last)
    saved = load_checkpoint(ROOT / "checkpoints/published/lenet5_model_ori.pth", "lenet5")
    model.load_state_dict(saved["model"])
    if kind == "pretrain":
        optimizer = lenet5.pretrain_optimizer(model.parameters(), flags)
        return Training(kind, model, [optimizer], {"pretrain": optimizer.step})
    weights = alq.quantize(model, flags.structure, flags.subc, *flags.max_bit)
    M_p = flags.pr / flags.top_k / flags.batches
    plan = PruneByRatio(1, flags.pr, flags.top_k, M_p, flags.batches)
    optimizer = quantizer_class(flags.compile)
    return quantized_training(kind, model, weights, flags, plan=plan, optimizer=optimizer)


def measure(kind: str, flags: Namespace, batches: Sequence) -> dict[str, float]:
    """Return the seconds of an epoch of `kind`, part by part, but for the evaluation at its end."""
    training = training_of(kind, flags)
    epoch = Epoch(kind, flags.lr_pretrain if kind == "pretrain" else flags.lr)
    sync = torch.cuda.synchronize if flags.device.type == "cuda" else lambda: None
    clock = Clock(sync, time.process_time if flags.cpu_time else time.perf_counter)
    training.steps[kind] = clock.timed_step(training.steps[kind])
    training.loss = clock.timed_loss
    val = list(itertools.islice(batches, 1))
    train(
        training, [epoch], TimedBatches(batches, clock), val, log=lambda *_, **__: None,
        after_epoch=lambda *_: None, save=clock.after_step, progress=Progress(False),
    )  # fmt: skip
    return {part: clock.seconds[part] for part in PARTS}


def measure_in_turns(args: Namespace) -> dict[str, dict[str, float]]:
    """Return for each kind the parts of its median epoch; the kinds take turns."""
    flags = NETWORKS["lenet5"].default_flags()
    flags.data, flags.device, flags.compile = ROOT / "data", args.device, args.compile
    flags.cpu_time = args.cpu_time
    batches = mnist.load_splits(flags, None)[0].train
    flags.batches = len(batches)
    if args.batches:
        batches = list(itertools.islice(batches, args.batches))
    if args.compile:  # one batch of each kind, which is not counted
        for kind in KINDS:
            measure(kind, flags, list(itertools.islice(batches, 1)))
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind in KINDS:
            found[kind].append(measure(kind, flags, batches))
    return {
        kind: sorted(epochs, key=lambda parts: sum(parts.values()))[len(epochs) // 2]
        for kind, epochs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each kind (3)")
    parser.add_argument("--batches", type=int, help="of an epoch, the first so many (all)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--compile", action="store_true", help="the quantizer by torch.compile")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="JSON", help="print the tables of these, exit"
    )
    args = parser.parse_args()
    if args.table:
        contents = [json.loads(path.read_text()) for path in args.table]
        print(*epoch_tables(contents), sep="\n\n")
        return
    settle(args)
    rows = measure_in_turns(args)
    print(f"{'seconds an epoch':18}{'all':>8}" + "".join(f"{part:>20}" for part in PARTS))
    for kind, seconds in rows.items():
        parts = "".join(f"{seconds[part]:20.2f}" for part in PARTS)
        print(f"{kind:18}{sum(seconds.values()):8.2f}{parts}")
    if args.json:
        write_figures(args.json, args.device, seconds=rows)


if __name__ == "__main__":
    main()
