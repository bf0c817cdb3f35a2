"""Do steps that know the loss train better, each way at its own best rate? A sweep of rates.

    python benchmarks/sweep.py run --threads 1          # all that has no result yet, in this order
    python benchmarks/sweep.py run --net lenet5 --dataset mnist --bits 1        # a part of it
    python benchmarks/sweep.py plan                     # the runs, in order, and which are done
    python benchmarks/figures.py --table                # what the logs say

Three arms train the same sketched network at a fixed bitwidth: straight-through with the
reconstruction error, straight-through with the loss-aware step, and ALQ's basis steps, which end
with two coordinate epochs at a rate of their own. Rates go from 3e-4 to 3e-2 in thirds of a decade,
at 1 and 2 bits, on MNIST and Fashion-MNIST, with LeNet5 and a narrow VGG with batch norm. Data,
their order, epochs, batches and decay are the same for all. The phases, in the order in which they
are run:

    rates        seed 0, every arm at every rate
    coordinate   seed 0, LeNet5: ALQ at its best rate with other rates of the coordinate epochs
    seeds        seeds 1 and 2, every arm at its best rate

A best rate is the one of the highest validation accuracy at seed 0; an arm has one when all its
rates are done. The test set is looked at once, after a run.

Time, on one core of an x86-64 CPU: about 30 ms a step for either network (LeNet5 21 ms forward and
backward, 3 to 17 ms the step; narrow VGG 23 and 3 to 9 ms), of which a run has 12 epochs x 120
batches, so 50 s with evaluation. 168 runs of rates: 2.3 hours, less what does not train; 16 of
coordinates: 15 minutes; 48 of seeds: 40 minutes; 12 full-precision networks: 10 minutes.

Each run writes a log, NET_DATASET_BITSbit_ARM_RATE_seedN.jsonl. One whose log has its result is not
run again; one that was killed starts anew. A run that does not train is stopped, and its result
says why. Full-precision networks are trained first where they are missing, and shared by all arms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import arms
import changed
import lenet5
from alq.command.run import run_stages, set_arithmetic
from alq.data import mnist
from alq.data.loaders import Split, TensorLoader, split_tensors
from alq.errors import NotFinite
from alq.files.checkpoint import load_checkpoint
from alq.files.history import read_events
from alq.files.runlog import RunLog, describe_run
from alq.training.epoch import evaluate
from alq.training.loop import size_of, train
from alq.training.schedule import Epoch
from small_networks import SMALL_NETWORKS

LOGS = Path("checkpoints/published/sweep")
SOURCES = Path("checkpoints/sweep")
ARMS = ("reconstruction", "ste", "alq")
RATES = (3e-4, 6.5e-4, 1.4e-3, 3e-3, 6.5e-3, 1.4e-2, 3e-2)
MIDDLE_FIRST = sorted(RATES, key=lambda rate: abs(RATES.index(rate) - RATES.index(3e-3)))
BITS, SEEDS = (1, 2), (0, 1, 2)
EPOCHS, COORDINATE_EPOCHS = 12, 2
TRAIN_SIZE = 15360  # images an epoch: 120 batches
# The rate of ALQ's coordinate epochs, and others that are tried; 0 has basis epochs in their place.
COORDINATE, COORDINATES = 1e-4, (0.0, 3e-5, 3e-4, 1e-3)
# Below this validation accuracy, in percent, after this many epochs, a run has failed: ten classes.
CHANCE, PATIENCE = 20.0, 2
PHASES = ("rates", "coordinate", "seeds")
# The full-precision training of `make demo`.
PRETRAIN = "--PRETRAIN --epoch_pretrain 6 --lr_pretrain 0.05 --milestones_pretrain 3 5".split()
KEPT = ("epoch", "kind", "lr", "loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")


@dataclass(frozen=True)
class Cell:
    """One run: network, data set, bits, arm, the arm's rate, seed, rate of coordinate epochs."""

    net: str
    dataset: str
    bits: int
    arm: str
    rate: float
    seed: int = 0
    coordinate: float = COORDINATE

    @property
    def name(self) -> str:
        """What its log is called."""
        own = "" if self.coordinate == COORDINATE else f"_coordinate{self.coordinate:g}"
        setting = f"{self.net}_{self.dataset}_{self.bits}bit"
        return f"{setting}_{self.arm}_{self.rate:g}{own}_seed{self.seed}"

    @property
    def source(self) -> str:
        """What the full-precision network that it starts from is called."""
        return f"{self.net}_{self.dataset}_source_seed{self.seed}"

    def make_arm(self) -> arms.Arm:
        """Return its steps: arms of one rate differ in these alone."""
        if self.arm == "alq":
            last = COORDINATE_EPOCHS if self.coordinate else 0
            epochs = arms.decaying(["basis"] * (EPOCHS - last), lr=self.rate)
            epochs += arms.decaying(["coordinate"] * last, lr=self.coordinate)
            return arms.Arm(self.arm, epochs, self.bits)
        epochs = arms.decaying(["ste"] * EPOCHS, lr=self.rate)
        kind = changed.Reconstruction if self.arm == "reconstruction" else alq.ALQ
        return arms.Arm(self.arm, epochs, self.bits, kind, from_full=True)

    def events(self, logs: Path) -> list[dict]:
        """Return what its log says; nothing where the run has not come to its end."""
        log = logs / f"{self.name}.jsonl"
        found = read_events(log) if log.exists() else []
        return found if found and found[-1]["event"] == "result" else []

    def result(self, logs: Path) -> dict | None:
        """Return its end, None where it has not come to it."""
        return next(iter(self.events(logs)[-1:]), None)


def best_of(cells: Sequence[Cell], logs: Path) -> Cell | None:
    """Return the cell of the highest validation accuracy; None where one has no result yet.

    Of equal ones the first; None also where none trained.
    """
    results = {cell: cell.result(logs) for cell in cells}
    if None in results.values():
        return None
    trained = [cell for cell in cells if not results[cell]["failed"]]
    return max(trained, key=lambda cell: results[cell]["val_accuracy"], default=None)


def rates_of(cell: Cell) -> list[Cell]:
    """Return the cells among which the best rate of `cell`'s arm is chosen."""
    return [replace(cell, rate=rate, seed=0, coordinate=COORDINATE) for rate in RATES]


def planned(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells that `args` ask for, in order; best rates are looked up as they come."""
    settings = list(product(args.net, args.dataset, args.bits))
    if "rates" in args.phase and 0 in args.seed:
        for setting, rate, arm in product(settings, MIDDLE_FIRST, args.arm):
            yield Cell(*setting, arm, rate)
    if "coordinate" in args.phase and 0 in args.seed and "alq" in args.arm:
        for setting, coordinate in product(settings, COORDINATES):
            best = best_of(rates_of(Cell(*setting, "alq", RATES[0])), args.logs)
            if best and best.net == "lenet5":
                yield replace(best, coordinate=coordinate)
    if "seeds" in args.phase:
        for seed, setting, arm in product(args.seed, settings, args.arm):
            best = best_of(rates_of(Cell(*setting, arm, RATES[0])), args.logs)
            if best and seed:
                yield replace(best, seed=seed)


# ---------------------------------------------------------------------------- one run


class Failed(Exception):
    """A run does not train: says why."""


def train_source(cell: Cell, args: argparse.Namespace) -> Path:
    """Return the file of the full-precision network, which is trained if it is not there."""
    path = args.sources / f"{cell.source}.pth"
    if path.exists():
        return path
    network = SMALL_NETWORKS[cell.net]
    flags = ["--dataset", cell.dataset, "--seed", cell.seed, "--data", args.data, "--model_ori"]
    flags += [path, "--model", args.logs / cell.source, "--threads", args.threads]
    flags += ["--structure", *network.structure, "--subc", *network.subc]
    (args.logs / f"{cell.source}.jsonl").unlink(missing_ok=True)
    parser = lenet5.command_line(cell.dataset)
    run_stages(network.on(cell.dataset), parser, [*PRETRAIN, *map(str, flags)])
    return path


@cache
def read_pictures(root: Path, dataset: str) -> tuple:
    return mnist.read_mnist(root, dataset)


def load_data(
    cell: Cell, args: argparse.Namespace, held_out: torch.Tensor
) -> tuple[TensorLoader, Split]:
    """Return the batches that all arms train on, and the loaders of all images."""
    own = argparse.Namespace(**{**vars(args), "seed": cell.seed})
    kind = mnist.SETS[cell.dataset]
    split, _ = split_tensors(own, held_out, *read_pictures(args.data, cell.dataset), kind)
    part = (x[: args.train_size] for x in (split.train.images, split.train.labels))
    return TensorLoader(*part, args.batch_size, kind.mean, kind.std, cell.seed), split


def run(cell: Cell, args: argparse.Namespace) -> None:
    """Train one arm and log its epochs and its end."""
    source = load_checkpoint(train_source(cell, args), cell.net)
    torch.manual_seed(cell.seed)
    network = SMALL_NETWORKS[cell.net]
    model = network.on(cell.dataset).network().to(memory_format=torch.channels_last)
    model.load_state_dict(source["model"])
    batches, data = load_data(cell, args, source["val_indices"])
    arm = cell.make_arm()
    training = arms.training_of("alq", arm, network, model, cell.seed, len(batches))
    path = args.logs / f"{cell.name}.jsonl"
    path.unlink(missing_ok=True)
    log = RunLog(path)
    about = describe_run(argparse.Namespace(**{**vars(args), "seed": cell.seed}))
    log.write("start", **about | vars(cell), top1_fp=source["top1_fp"])
    before = evaluate(model, data.val)
    log.write("before", val_loss=before["loss"], val_accuracy=before["accuracy"])
    last: dict = {}

    def note(event: str, **fields: object) -> None:
        last.update({key: short(fields[key]) for key in KEPT})
        log.write(event, **last)

    def check(epoch: Epoch, val: dict) -> None:
        if training.epochs_done >= PATIENCE and val["accuracy"] < CHANCE:
            raise Failed(f"at {val['accuracy']:.2f} % after {training.epochs_done} epochs")

    failed = None
    try:
        train(training, list(arm.epochs), batches, data.val, note, check)
    except (Failed, NotFinite) as why:
        failed = str(why)
    end = {"failed": failed, "epochs": training.epochs_done, "loss": last.get("loss")}
    end["val_accuracy"] = last.get("val_accuracy")
    end["top1"] = None if failed else evaluate(model, data.test)["accuracy"]
    log.write("result", **end, **size_of(training.weights), seconds=round(training.seconds, 1))


def short(value: object) -> object:
    """Return a number with six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---------------------------------------------------------------------------- command line


def plan(args: argparse.Namespace) -> None:
    """Print the runs in order; those of the later phases as far as best rates are known."""
    for cell in planned(args):
        result = cell.result(args.logs)
        state = "to do" if result is None else result["failed"] or f"{result['val_accuracy']:.2f} %"
        print(f"{cell.name}: {state}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "plan"])
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--net", nargs="+", choices=SMALL_NETWORKS, default=[*SMALL_NETWORKS])
    parser.add_argument("--dataset", nargs="+", choices=mnist.SETS, default=[*mnist.SETS])
    parser.add_argument("--bits", nargs="+", type=int, default=BITS)
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seed", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the logs")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="of the networks they share")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--train_size", type=int, default=TRAIN_SIZE, help="images an epoch")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(
        device=torch.device("cpu"), batch_size=128, compile=False, tf32=False, channels_last=True,
        cudnn_benchmark=False, deterministic=False,
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.what == "plan":
        return plan(args)
    args.logs.mkdir(parents=True, exist_ok=True)
    set_arithmetic(args)
    for cell in planned(args):
        if cell.result(args.logs) is None:
            print(cell.name, file=sys.stderr, flush=True)
            run(cell, args)


if __name__ == "__main__":
    main()
