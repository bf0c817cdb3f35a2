"""Draws the evidence from the logs in checkpoints/published/, and nothing else.

    python benchmarks/figures.py                     # all of them, into benchmarks/figures/
    python benchmarks/figures.py size run --out DIR  # some
    python benchmarks/figures.py --table             # the same logs as tables, in Markdown
    python benchmarks/figures.py --table --into docs/evidence.md    # renew its tables

Needs matplotlib. Lines differ in style and marker: they can be told apart in black and white.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sweep_report
from alq.command.plot import draw, line_style, plain_ticks
from alq.data.mnist import SETS
from alq.files.history import History
from evidence_tables import (
    COMPARED,
    DEFAULT_RUN,
    bits_a_weight,
    events,
    evidence_tables,
    rounds_of,
    runs_of,
    sketches,
    write_into,
)
from small_networks import SMALL_NETWORKS
from tables import PUBLISHED_RUNS

HERE = Path(__file__).resolve().parent / "figures"
STYLES = [line_style(number) for number in range(4)]
OFF_SCALE = 6  # times the least error of a panel of the sweep
# LeNet5 on MNIST, weights only, in bytes and percent, as published.
CITED = [
    ("Deep Compression (Han et al., 2016)", 44e3, 99.26, "P"),
    ("ALQ (Qu et al., 2020)", 22.7e3, 99.1, "X"),
]


def axes(
    rows: int = 1, columns: int = 1, height: float = 3.2, width: float = 7.2, **more: object
) -> tuple:
    return plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained", **more
    )


def run(logs: Path) -> Figure:
    """Draw the default run."""
    return draw([History(logs / DEFAULT_RUN)])


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
    grid[0, 0].set_ylabel("validation error (%)")
    grid[1, 0].set_ylabel("training loss, best rate")
    lines = grid[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3 if columns > 1 else 1, fontsize=8)
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


def plot_band(ax: Axes, runs: list[list[float]], label: str, style: dict) -> None:
    """Plot the mean of the seeds over the epochs, in a band from the least to the greatest."""
    x = range(1, len(runs[0]) + 1)
    columns = list(zip(*runs, strict=True))
    ax.plot(x, [mean(values) for values in columns], label=label, **style)
    if len(runs) > 1:
        ends = ([end(values) for values in columns] for end in (min, max))
        ax.fill_between(x, *ends, color=style["color"], alpha=0.2, linewidth=0)


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
    lines = grid[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def plot_bars(ax: Axes, rounds: list[list[dict]], label: str, style: dict) -> None:
    """Plot each round's mean test error at its mean bits, with bars over the seeds."""
    bits = [mean(point["bitwidth"] for point in points) for points in rounds]
    errors = [[100 - point["top1"] for point in points] for points in rounds]
    means = [mean(values) for values in errors]
    low = [m - min(values) for m, values in zip(means, errors, strict=True)]
    high = [max(values) - m for m, values in zip(means, errors, strict=True)]
    ax.errorbar(bits, means, (low, high), capsize=3, label=label, **style)


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
    """Draw test accuracy against the packed file's bytes, beside what others published."""
    figure, ((ax,),) = axes(height=4)
    short = sorted((logs / "ablations").glob("size_*.jsonl"))
    plot_sizes(ax, short, "short schedule, 6 bit down", STYLES[0])
    seeds = sorted(logs.glob("lenet5_seed*.jsonl"))
    alone = {"linestyle": "none", "markersize": 7}
    plot_sizes(ax, seeds, f"default schedule, {len(seeds)} seeds", {**STYLES[1], **alone})
    plot_sizes(ax, [logs / "lenet5_10kb.jsonl"], "recipe for 10 KB", {**STYLES[2], **alone})
    full = mean(events(log, "result")[-1]["top1_fp"] for log in seeds)
    ax.plot(1722, full, "k*", markersize=10, label="full precision, mean of the seeds")
    for name, count, top1, marker in CITED:
        ax.plot(count / 1e3, top1, marker, color="0.45", markersize=9, label=f"cited: {name}")
    ax.set(xscale="log", xlabel="size (KB of 1e3 bytes; ours: the file on disk)", ylim=(95, 99.5))
    ax.set(ylabel="test accuracy (%)")
    plain_ticks(ax.xaxis)
    ax.grid(color="0.9")
    ax.legend(fontsize=8, loc="lower right")
    return figure


def plot_sizes(ax: Axes, logs: Iterable[Path], label: str, style: dict) -> None:
    finals = [events(log, "result")[-1] for log in logs]
    points = sorted((final["file_bytes"] / 1e3, final["top1"]) for final in finals)
    ax.plot(*zip(*points, strict=True), label=label, **style)


# Each draws nothing where there are no logs of its claim.
FIGURES: dict[str, Callable[[Path], Figure | None]] = {
    **{draw.__name__: draw for draw in (run, structures, size)},
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
