"""Accuracy against the bits of the activations: LeNet5 with short schedules of lenet5.py's flags.

    python benchmarks/activations.py run                       # the grid: what of it has no log yet
    python benchmarks/activations.py run --dataset mnist --weights 0.4 --act 2 --seed 0    # a part
    python benchmarks/activations.py starts                    # where activations should begin
    python benchmarks/activations.py table                     # what the logs say, in Markdown
    python benchmarks/activations.py figure --picture FILE.png

A run writes its own log, DATASET_wBITS_aBITS_START_seedN.jsonl; one whose log has its result is not
run again, and one that was interrupted goes on. At 32 bit the weights are not quantized, and
activations hold from pretraining on; the others start from these networks, or from that with float
activations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lenet5
from alq.data.mnist import SETS
from published_runs import result_of
from tables import spread, table

LOGS = Path("checkpoints/activations")
WEIGHTS = ("32", "2", "0.4")  # bits a weight; 32 are float
ACTS = (1, 2, 3, 4, 8, 0)  # bits an activation; 0 are float
SEEDS = (0, 1, 2)
STARTS = ("alq", "pretrain", "posttrain")  # the stage from which activations are quantized
# The schedule of `make demo`, which brings LeNet5 to the published row.
PRETRAIN = "--epoch_pretrain 6 --lr_pretrain 0.05 --milestones_pretrain 3 5".split()
QUANTIZE = (
    "--pr 0.95 --epoch_basis 1 --epoch_coord 0 --epoch_ste 16 --ld_ste 0.85 --epoch_post_coord 1"
).split()


@dataclass(frozen=True)
class Cell:
    """One run: data set, bits of weights and activations, the stage these begin with, the seed."""

    dataset: str
    weights: str
    act: int
    start: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        start = self.start if self.act else "float"
        return f"{self.dataset}_w{self.weights}_a{self.act}_{start}_seed{self.seed}"

    @property
    def source(self) -> Cell:
        """Return the run whose full-precision network this one starts from."""
        act = self.act if self.start == "pretrain" else 0
        return Cell(self.dataset, "32", act, "pretrain", self.seed)

    def commands(self, folder: Path, more: Sequence[str]) -> list[list[str]]:
        """Return the commands of lenet5.py, as flags: one, or two where activations begin late."""
        flags = ["--dataset", self.dataset, "--seed", str(self.seed), *PRETRAIN, *QUANTIZE, *more]
        flags += ["--model_ori", str(folder / f"{self.source.name}_ori.pth")]
        flags += ["--model", str(folder / f"{self.name}.pth"), "--resume"]
        acts = ["--act_bit", str(self.act)] if self.act else []
        if self.act and self.start == "pretrain":
            acts += ["--act_from", "pretrain"]
        if self == self.source:
            return [["--PRETRAIN", *flags, *acts]]
        flags += ["--target_bit", self.weights]
        if self.act and self.start == "posttrain":
            return [["--ALQ", *flags], ["--POSTTRAIN", *flags, *acts]]
        return [["--ALQ", "--POSTTRAIN", *flags, *acts]]

    def result(self, folder: Path) -> dict | None:
        """Return the last stage's result, None where the run has not come to its end."""
        last = "pretrain" if self.weights == "32" else "posttrain"
        return result_of(folder / f"{self.name}.jsonl", last)

    def top1(self, folder: Path) -> float | None:
        """Return the test accuracy in percent, if the run has come to its end."""
        result = self.result(folder)
        return result and (result["top1_fp"] if result["top1"] is None else result["top1"])


def grid(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells of the evidence, one seed after another."""
    start = args.start or [STARTS[0]]
    for seed, dataset, weights, act in product(args.seed, args.dataset, args.weights, args.act):
        for begin in ["pretrain"] if weights == "32" else start[: 1 if not act else None]:
            yield Cell(dataset, weights, act, begin, seed)


def starts(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells that compare where activations begin: few bits of both."""
    for seed, dataset, act, start in product(args.seed, args.dataset, (1, 2), STARTS):
        yield Cell(dataset, "0.4", act, start, seed)


def run(cells: Iterator[Cell], args: argparse.Namespace) -> None:
    """Run what has no result yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    more = ["--data", str(args.data), *args.flags]
    more += ["--threads", str(args.threads)] if args.threads else []
    for cell in chain.from_iterable((wanted.source, wanted) for wanted in cells):
        if cell.result(args.out) is None:
            print(cell.name, file=sys.stderr, flush=True)
            for command in cell.commands(args.out, more):
                lenet5.main(command)


# ---------------------------------------------------------------------------- what came out


def accuracies(args: argparse.Namespace, dataset: str, weights: str, act: int, start: str) -> list:
    """Return the test accuracies of the seeds that have been run."""
    cells = (Cell(dataset, weights, act, start, seed) for seed in args.seed)
    found = (cell.top1(args.out) for cell in cells)
    return [top1 for top1 in found if top1 is not None]


def bits(act: int) -> str:
    return f"{act} bit" if act else "float"


def rows(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return (data set, bits of weights, start) of every row of the table."""
    named = args.start or STARTS
    found = []
    for dataset, weights in product(args.dataset, args.weights):
        for start in ["pretrain"] if weights == "32" else named:
            if any(accuracies(args, dataset, weights, act, start) for act in args.act if act):
                found.append((dataset, weights, start))
    return found


def results_table(args: argparse.Namespace) -> str:
    """Show the test accuracy in percent, mean and standard deviation over the seeds."""
    head = ["data", "weights", "activations from", *map(bits, args.act), "seeds"]
    lines = []
    for dataset, weights, start in rows(args):
        values = [accuracies(args, dataset, weights, act, start) for act in args.act]
        title = SETS[dataset].title
        counts = {len(each) for each in values if each}
        seeds = str(*counts) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        lines.append(
            [
                title,
                f"{weights} bit",
                start,
                *(spread(each) if each else "" for each in values),
                seeds,
            ]
        )
    return table(head, lines)


def start_of(weights: str) -> str:
    """Return what activations begin with by default; of weights of 32 bit, with the network."""
    return "pretrain" if weights == "32" else STARTS[0]


def draw(args: argparse.Namespace) -> None:
    """Draw the table, a panel for each data set, into `args.picture`."""
    from plots import STYLES, axes, legend_below, plot_spread, plt

    figure, (panels,) = axes(1, len(args.dataset), height=3.6)
    for ax, dataset in zip(panels, args.dataset, strict=True):
        mine = [r for r in rows(args) if r[0] == dataset and r[2] == start_of(r[1])]
        for (_, weights, start), style in zip(mine, STYLES, strict=False):
            values = [accuracies(args, dataset, weights, act, start) for act in args.act]
            known = [(k, each) for k, each in enumerate(values) if each]
            label = f"{weights} bit a weight" if weights != "32" else "float weights"
            places, groups = zip(*known, strict=True)
            plot_spread(ax, places, groups, label, style)
        ax.set_xticks(range(len(args.act)), [bits(act) for act in args.act])
        ax.set(title=SETS[dataset].title, xlabel="activations")
    panels[0].set_ylabel("test accuracy (%)")
    legend_below(figure, panels[0], 3)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "starts", "table", "figure"])
    parser.add_argument("--dataset", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, metavar="BITS")
    parser.add_argument("--act", nargs="+", type=int, default=ACTS, metavar="BITS")
    parser.add_argument("--seed", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--start", nargs="+", choices=STARTS, help="default: lenet5.py's")
    parser.add_argument("--out", type=Path, default=LOGS, help="folder of the logs")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/figures/activations.png"))
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="more of lenet5.py's, at the end"
    )
    args = parser.parse_args(argv)
    if args.what == "table":
        print(results_table(args))
    elif args.what == "figure":
        draw(args)
    else:
        run(starts(args) if args.what == "starts" else grid(args), args)


if __name__ == "__main__":
    main()
