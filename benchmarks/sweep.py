"""Do steps that know the loss train better, each way at its own best rate? A sweep of rates.

    python benchmarks/sweep.py run --threads 1          # all that has no result yet, in this order
    python benchmarks/sweep.py run --net lenet5 --dataset mnist --bits 1        # a part of it
    python benchmarks/sweep.py plan                     # the runs, in order, and which are done
    python benchmarks/figures.py --table                # what the logs say

Three arms train the same sketched network at a fixed bitwidth: straight-through with the
reconstruction error, straight-through with the loss-aware step, and ALQ's basis steps, which end
with two coordinate epochs at a rate of their own. Rates go from 3e-4 to 3e-2 in thirds of a decade,
and higher where the highest is an arm's best, at 1 and 2 bits, on MNIST and Fashion-MNIST, with
LeNet5 and a narrow VGG with batch norm. Data, their order, epochs, batches and decay are the same
for all. The phases, in the order in which they are run:

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
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import arms
import changed
from alq.command.run import set_arithmetic
from alq.errors import NotFinite
from alq.training.epoch import evaluate
from alq.training.loop import size_of, train
from alq.training.schedule import Epoch
from short_runs import Start, add_flags, compact, finished
from small_networks import SMALL_NETWORKS

LOGS = Path("checkpoints/published/sweep")
ARMS = ("reconstruction", "ste", "alq")
RATES = (3e-4, 6.5e-4, 1.4e-3, 3e-3, 6.5e-3, 1.4e-2, 3e-2)
HIGHER = (6.5e-2, 1.4e-1)  # go on to these while the highest rate is the best
MIDDLE_FIRST = sorted(RATES, key=lambda rate: abs(RATES.index(rate) - RATES.index(3e-3)))
BITS = (1, 2)
EPOCHS, COORDINATE_EPOCHS = 12, 2
TRAIN_SIZE = 15360  # images an epoch: 120 batches
# The rate of ALQ's coordinate epochs, and others that are tried; 0 has basis epochs in their place.
COORDINATE, COORDINATES = 1e-4, (0.0, 3e-5, 3e-4, 1e-3)
# Below this validation accuracy, in percent, after this many epochs, a run has failed: ten classes.
CHANCE, PATIENCE = 20.0, 2
PHASES = ("rates", "coordinate", "seeds")


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
        return finished(logs / f"{self.name}.jsonl")

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


def rates_of(cell: Cell, logs: Path) -> list[Cell]:
    """Return the cells among which the best rate of `cell`'s arm is chosen, as far as is known."""
    cells = [replace(cell, rate=rate, seed=0, coordinate=COORDINATE) for rate in RATES]
    for rate in HIGHER:
        if best_of(cells, logs) == cells[-1]:
            cells.append(replace(cells[-1], rate=rate))
    return cells


def best_rate(cell: Cell, logs: Path) -> Cell | None:
    """Return the run at the best rate of `cell`'s arm, of seed 0; None while that is not known."""
    return best_of(rates_of(cell, logs), logs)


def planned(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells that `args` ask for, in order; best rates are looked up as they come."""
    settings = list(product(args.net, args.dataset, args.bits))
    if "rates" in args.phase and 0 in args.seed:
        for setting, rate, arm in product(settings, MIDDLE_FIRST, args.arm):
            yield Cell(*setting, arm, rate)
        for setting, arm, rate in product(settings, args.arm, HIGHER):
            highest = rates_of(Cell(*setting, arm, RATES[0]), args.out)[-1]
            if highest.rate == rate:
                yield highest
    if "coordinate" in args.phase and 0 in args.seed and "alq" in args.arm:
        for setting, coordinate in product(settings, COORDINATES):
            best = best_rate(Cell(*setting, "alq", RATES[0]), args.out)
            if best and best.net == "lenet5":
                yield replace(best, coordinate=coordinate)
    if "seeds" in args.phase:
        for seed, setting, arm in product(args.seed, settings, args.arm):
            best = best_rate(Cell(*setting, arm, RATES[0]), args.out)
            if best and seed:
                yield replace(best, seed=seed)


# ---------------------------------------------------------------------------- one run


class Failed(Exception):
    """A run does not train: says why."""


def run(cell: Cell, args: argparse.Namespace) -> None:
    """Train one arm and log its epochs and its end."""
    start = Start(cell.net, cell.dataset, cell.seed)
    model, batches, data, top1_fp = start.load(args)
    arm, network = cell.make_arm(), SMALL_NETWORKS[cell.net]
    training = arms.training_of("alq", arm, network, model, cell.seed, len(batches))
    log = start.new_log(cell.name, args, **vars(cell), top1_fp=top1_fp)
    before = evaluate(model, data.val)
    log.write("before", val_loss=before["loss"], val_accuracy=before["accuracy"])
    last: dict = {}

    def note(event: str, **fields: object) -> None:
        last.update(compact(fields))
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


# ---------------------------------------------------------------------------- command line


def plan(args: argparse.Namespace) -> None:
    """Print the runs in order; those of the later phases as far as best rates are known."""
    for cell in planned(args):
        result = cell.result(args.out)
        state = "to do" if result is None else result["failed"] or f"{result['val_accuracy']:.2f} %"
        print(f"{cell.name}: {state}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "plan"])
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=[*PHASES])
    parser.add_argument("--net", nargs="+", choices=SMALL_NETWORKS, default=[*SMALL_NETWORKS])
    parser.add_argument("--bits", nargs="+", type=int, default=[*BITS])
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    add_flags(parser, LOGS, TRAIN_SIZE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.what == "plan":
        return plan(args)
    args.out.mkdir(parents=True, exist_ok=True)
    set_arithmetic(args)
    for cell in planned(args):
        if cell.result(args.out) is None:
            print(cell.name, file=sys.stderr, flush=True)
            run(cell, args)


if __name__ == "__main__":
    main()
