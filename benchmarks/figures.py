"""Draws the evidence from the logs in checkpoints/published/, and nothing else.

    python benchmarks/figures.py                     # all of them, into benchmarks/figures/
    python benchmarks/figures.py size run --out DIR  # some
    python benchmarks/figures.py --table             # the same logs as tables, in Markdown
    python benchmarks/figures.py --table --into docs/evidence.md    # renew its tables

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sweep_report
from alq.command.plot import draw, plain_ticks
from alq.data.mnist import SETS
from alq.files.history import History
from evidence_tables import (
    COMPARED,
    DEFAULT_RUN,
    WIDE_RUN,
    bits_a_weight,
    events,
    evidence_tables,
    rounds_of,
    runs_of,
    sketches,
    write_into,
)
from plots import STYLES, axes, legend_below, plot_band, plot_spread, plt
from small_networks import SMALL_NETWORKS
from smallest import results
from tables import PUBLISHED_RUNS

HERE = Path(__file__).resolve().parent / "figures"
OFF_SCALE = 6  # times the least error of a panel of the sweep
# MNIST, KB and percent as these report them, with their network and what they count.
CITED = {
    "Deep Compression, LeNet5, weights": ("P", [(44, 99.26)]),
    "ALQ, LeNet5, weights": ("X", [(22.7, 99.1)]),
    "MIRACLE, LeNet5, weights (read off a figure)": ("p", [(1.6, 99.0), (3.0, 99.3)]),
    "BitNetMCU, its own network, 16 x 16 pixels, weights": (
        "v", [(3.2, 98.92), (5.4, 99.06), (7.3, 99.28), (9.3, 99.44), (11.0, 99.55)]
    ),
}  # fmt: skip
SMALL = 12  # KB, where the second panel of sizes ends


def run(logs: Path) -> Figure:
    """Draw the default run."""
    return draw([History(logs / DEFAULT_RUN)])


def wide(logs: Path) -> Figure | None:
    """Draw the run of the full-width VGG."""
    return draw([History(logs / WIDE_RUN)]) if (logs / WIDE_RUN).exists() else None


# ---------------------------------------------------------------------------- the sweep of rates


def sweep(logs: Path, net: str) -> Figure | None:
    """Draw error against rate, and loss over the epochs at each arm's best rate."""
    folder = logs / "sweep"
    settings = list(sweep_report.settings(folder, net))
    if not settings:
        return None
    columns = len(settings)
    figure, grid = axes(2, columns, height=2.8, width=2.1 * max(2, columns) + 1)
    for column, setting in enumerate(settings):
        plot_rates(grid[0, column], setting, folder)
        for (arm, label), style in zip(sweep_report.TITLES.items(), STYLES, strict=False):
            cell = sweep_report.best(setting, arm, folder)
            runs = [sweep_report.losses(run) for run in sweep_report.seeds_of(cell, folder)]
            plot_band(grid[1, column], runs, label, {**style, "markersize": 3})
        _, dataset, bits = setting
        grid[0, column].set(title=f"{SETS[dataset].title}, {bits} bit", xlabel="rate")
        grid[1, column].set(yscale="log", xlabel="epoch")
        plain_ticks(grid[1, column].yaxis)
    grid[0, 0].set_ylabel("validation error (%)")
    grid[1, 0].set_ylabel("training loss, best rate")
    legend_below(figure, grid[0, 0], 3 if columns > 1 else 1)
    return figure


def plot_rates(ax: Axes, setting: sweep_report.Setting, folder: Path) -> None:
    """Plot the error of each arm at each rate; what fails, or is off the scale, hollow at the edge.

    The scale ends at OFF_SCALE times the least error.
    """
    found = {arm: sweep_report.errors(setting, arm, folder) for arm in sweep_report.ARMS}
    edge = OFF_SCALE * min(min(errors.values()) for errors in found.values())
    for (arm, label), style in zip(sweep_report.TITLES.items(), STYLES, strict=False):
        drawn = {rate: min(error, edge) for rate, error in found[arm].items()}
        ax.plot([*drawn], [*drawn.values()], label=label, **style)
        off = [rate for rate, error in drawn.items() if error == edge]
        hollow = {**style, "linestyle": "none", "markerfacecolor": "white", "markersize": 7}
        ax.plot(off, [edge] * len(off), **hollow)
    ax.set(xscale="log", yscale="log")
    plain_ticks(ax.yaxis)


# ---------------------------------------------------------------------------- ablations


def against_bits(logs: Path, arms: dict[str, str]) -> Figure | None:
    """Draw test error against average bitwidth: right after pruning, and trained again.

    Points are means of the seeds, bars go from the least to the greatest.
    """
    found = list(runs_of(logs, list(arms)))
    if not found:
        return None
    figure, grid = axes(len(found), 2, height=3.2, sharey="row")
    for (dataset, runs), (cut, trained) in zip(found, grid, strict=True):
        for (arm, seeds), style in zip(runs.items(), STYLES, strict=False):
            for ax, after in ((cut, "prune"), (trained, "coordinate")):
                plot_bars(ax, rounds_of(seeds, after), arms[arm], style)
        for ax, title in ((cut, "right after pruning"), (trained, "after 3 more epochs")):
            ax.set(xscale="log", yscale="log", xlabel="average bitwidth (bit)")
            ax.set_title(f"{SETS[dataset].title}, {title}")
            plain_ticks(ax.xaxis)
        cut.set_ylabel("test error (%)")
        plain_ticks(cut.yaxis)
    legend_below(figure, grid[0, 0], 3)
    return figure


def plot_bars(ax: Axes, rounds: list[list[dict]], label: str, style: dict) -> None:
    """Plot each round's mean test error at its mean bits, with bars over the seeds."""
    bits = [mean(point["bitwidth"] for point in points) for points in rounds]
    plot_spread(ax, bits, [[100 - p["top1"] for p in points] for points in rounds], label, style)


def structures(logs: Path) -> Figure | None:
    """Draw the sketch's error against its storage, for the trained weights, means of the seeds."""
    found = list(runs_of(logs, ["structures_sketch"]))
    if not found:
        return None
    figure, grid = axes(len(found), 2, height=3.2, sharey="row")
    for (dataset, runs), row in zip(found, grid, strict=True):
        for ax, layer in zip(row, ("conv2.weight", "fc1.weight"), strict=True):
            ways = sketches(runs["structures_sketch"], layer)
            for ((structure, subc, n), points), style in zip(ways, STYLES, strict=False):
                name = f"{structure}{f' / {subc}' if subc else ''} (n = {n})"
                bits = [bits_a_weight(point[0]) for point in points]
                errors = [mean(sketch["error"] for sketch in point) for point in points]
                ax.plot(bits, errors, label=name, **style)
            title = f"{SETS[dataset].title}, {layer.removesuffix('.weight')}"
            ax.set(yscale="log", title=title, xlim=(0, 12.5))
            ax.set(xlabel="storage, coordinates included (bit a weight)")
            ax.legend(fontsize=8)
        row[0].set_ylabel("relative squared error of the sketch")
    return figure


# ---------------------------------------------------------------------------- size


def size(logs: Path) -> Figure:
    """Draw test accuracy against the packed file's KB, beside what others published."""
    short = sorted((logs / "ablations").glob("size_*.jsonl"))
    seeds = sorted(logs.glob("lenet5_seed*.jsonl"))
    full = mean(events(log, "result")[-1]["top1_fp"] for log in seeds)
    alone = {"linestyle": "none", "markersize": 7}
    figure, (panels,) = axes(1, 2, height=4.4)
    for ax in panels:
        plot_sizes(ax, short, "short schedule, 6 bit down, one seed", STYLES[0])
        plot_sizes(ax, seeds, f"default schedule, {len(seeds)} seeds", {**STYLES[1], **alone})
        smallest = [found for _, _, found in results(logs / "smallest", ["recipe"])]
        if smallest:
            kb = [mean(result["file_bytes"] / 1e3 for result in found) for found in smallest]
            errors = [[100 - result["top1"] for result in found] for found in smallest]
            plot_spread(ax, kb, errors, "recipe of the smallest", STYLES[2])
        ax.plot(1722, 100 - full, "k*", markersize=10, label="full precision, mean of the seeds")
        for name, (marker, points) in CITED.items():
            kb, top1 = zip(*points, strict=True)
            ax.plot(kb, [100 - x for x in top1], marker, color="0.45", label=f"cited: {name}")
        ax.set(xlabel="KB (1e3 bytes; ours: the file on disk)")
        ax.grid(color="0.9")
    panels[0].set(xscale="log", yscale="log", ylabel="test error (%)")
    panels[1].set(xlim=(0, SMALL), ylim=(0.3, 2))
    plain_ticks(panels[0].xaxis)
    plain_ticks(panels[0].yaxis)
    legend_below(figure, panels[0], 2)
    return figure


def plot_sizes(ax: Axes, logs: Iterable[Path], label: str, style: dict) -> None:
    finals = [events(log, "result")[-1] for log in logs]
    points = sorted((final["file_bytes"] / 1e3, 100 - final["top1"]) for final in finals)
    ax.plot(*zip(*points, strict=True), label=label, **style)


# Each draws nothing where there are no logs of its claim.
FIGURES: dict[str, Callable[[Path], Figure | None]] = {
    **{draw.__name__: draw for draw in (run, wide, structures, size)},
    **{f"sweep_{net}": partial(sweep, net=net) for net in SMALL_NETWORKS},
    **{name: partial(against_bits, arms=arms) for name, arms in COMPARED.items()},
}


# ---------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", nargs="*", choices=[[], *FIGURES], help="default: all")
    parser.add_argument("--logs", type=Path, default=PUBLISHED_RUNS, help="folder of the logs")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--table", action="store_true", help="print the tables instead")
    parser.add_argument("--into", type=Path, help="with --table: the document to renew them in")
    args = parser.parse_args(argv)
    if args.table:
        tables = evidence_tables(args.logs)
        if args.into:
            return write_into(args.into, tables)
        print(*(f"{claim}\n\n{table}" for claim, table in tables.items()), sep="\n\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figure or FIGURES:
        figure = FIGURES[name](args.logs)
        if figure is None:
            continue
        path = args.out / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
