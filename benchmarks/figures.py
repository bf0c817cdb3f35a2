"""Draws the evidence from the logs in checkpoints/published/, and nothing else.

    python benchmarks/figures.py                     # all of them, into benchmarks/figures/
    python benchmarks/figures.py size run --out DIR  # some
    python benchmarks/figures.py --table             # the same logs as tables, in Markdown

Needs matplotlib. Lines differ in style and marker: they can be told apart in black and white.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alq.command.plot import draw, line_style, plain_ticks
from alq.files.history import History
from evidence_tables import (
    COMPARED,
    DEFAULT_RUN,
    LOSS_AWARE,
    bits_a_weight,
    events,
    evidence_tables,
)
from tables import PUBLISHED_RUNS

HERE = Path(__file__).resolve().parent / "figures"
STYLES = [line_style(number) for number in range(4)]
# LeNet5 on MNIST, weights only, in bytes and percent, as published.
CITED = [
    ("Deep Compression (Han et al., 2016)", 44e3, 99.26, "P"),
    ("ALQ (Qu et al., 2020)", 22.7e3, 99.1, "X"),
]


def axes(rows: int = 1, columns: int = 1, height: float = 3.2, **more: object) -> tuple:
    return plt.subplots(
        rows, columns, figsize=(7.2, height * rows), squeeze=False, layout="constrained", **more
    )


def run(logs: Path) -> Figure:
    """Draw the default run."""
    return draw([History(logs / DEFAULT_RUN)])


# ---------------------------------------------------------------------------- ablations


def loss_aware(logs: Path) -> Figure:
    """Draw training loss and accuracy over epochs at 1 and 2 bits."""
    figure, grid = axes(2, 2, height=2.6, sharex=True)
    for column, bits in enumerate((1, 2)):
        (loss, accuracy) = grid[:, column]
        folder = logs / "ablations"
        (sketch,) = events(folder / f"loss_aware_{bits}bit_sketch.jsonl", "point")
        for (arm, label), style in zip(LOSS_AWARE.items(), STYLES[::-1], strict=False):
            epochs = events(folder / f"loss_aware_{bits}bit_{arm}.jsonl", "epoch")
            x = range(1, len(epochs) + 1)
            loss.plot(x, [e["loss"] for e in epochs], label=label, **style)
            accuracy.plot(x, [e["val_accuracy"] for e in epochs], **style)
        low = min(accuracy.get_ylim()[0], sketch["val_accuracy"]) if bits > 1 else None
        accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(low, None))
        loss.set(title=f"{bits} bit{'s' * (bits > 1)}", ylabel="training loss", yscale="log")
        accuracy.set_title(f"sketch alone: {sketch['val_accuracy']:.2f} %", fontsize=9)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure


def against_bits(logs: Path, arms: dict[str, str]) -> Figure:
    """Draw test error against average bitwidth: right after pruning, and trained again."""
    figure, ((cut, trained),) = axes(1, 2, height=3.4, sharey=True)
    for (log, label), style in zip(arms.items(), STYLES, strict=False):
        points = events(logs / "ablations" / f"{log}.jsonl", "point")
        for ax, after in ((cut, "prune"), (trained, "coordinate")):
            chosen = [point for point in points if point["after"] == after]
            bits, errors = zip(*((p["bitwidth"], 100 - p["top1"]) for p in chosen), strict=True)
            ax.plot(bits, errors, label=label, **style)
    for ax, title in ((cut, "right after pruning"), (trained, "after 3 more epochs")):
        ax.set(xscale="log", yscale="log", xlabel="average bitwidth (bit)", title=title)
        plain_ticks(ax.xaxis)
    cut.set_ylabel("test error (%)")
    plain_ticks(cut.yaxis)
    lines = trained.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def structures(logs: Path) -> Figure:
    """Draw the sketch's error against its storage, for the trained weights."""
    sketches = events(logs / "ablations" / "structures_sketch.jsonl", "sketch")
    figure, (row,) = axes(1, 2, height=3.4, sharey=True)
    for ax, layer in zip(row, ("conv2.weight", "fc1.weight"), strict=True):
        mine = [s for s in sketches if s["layer"] == layer]
        ways = groupby(mine, lambda s: (s["structure"], s["subc"], s["n"]))
        for ((structure, subc, n), group), style in zip(ways, STYLES, strict=False):
            points = list(group)
            name = f"{structure}{f' / {subc}' if subc else ''} (n = {n})"
            bits = [bits_a_weight(point) for point in points]
            ax.plot(bits, [p["error"] for p in points], label=name, **style)
        ax.set(yscale="log", title=layer.removesuffix(".weight"), xlim=(0, 12.5))
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


FIGURES: dict[str, Callable[[Path], Figure]] = {
    **{draw.__name__: draw for draw in (run, loss_aware, structures, size)},
    **{name: partial(against_bits, arms=arms) for name, arms in COMPARED.items()},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", nargs="*", choices=[[], *FIGURES], help="default: all")
    parser.add_argument("--logs", type=Path, default=PUBLISHED_RUNS, help="folder of the logs")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--table", action="store_true", help="print the tables instead")
    args = parser.parse_args(argv)
    if args.table:
        tables = evidence_tables(args.logs)
        print(*(f"{claim}\n\n{table}" for claim, table in tables.items()), sep="\n\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figure or FIGURES:
        figure = FIGURES[name](args.logs)
        path = args.out / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
