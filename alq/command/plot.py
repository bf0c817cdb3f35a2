"""Pictures of runs, from their logs alone: `python -m alq plot LOG...`.

Lines differ in style and marker: they can be told apart in black and white.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy

from ..errors import InputError
from ..files.disk import write_atomically
from ..files.history import STAGES, History, align

# What a panel shows of each epoch, of several runs the first alone, and the name of its axis.
ACCURACY, BITS = ("val_accuracy", "train_accuracy"), ("bitwidth",)
PANELS = {ACCURACY: "accuracy (%)", ("val_loss", "loss"): "loss", BITS: "bitwidth (bit)"}
COLORS, LINES = ("black", "tab:blue", "tab:red", "tab:green"), ("-", "--", "-.", ":")
DECIMAL = [[m * 10.0**k for k in range(-9, 9) for m in ms] for ms in ((1, 2, 5), (1, 3), (1,))]
BINARY = [[2.0**k for k in range(-18, 6, step)] for step in (1, 2, 4)]
FEW = 40  # epochs, up to which each has a marker
COLUMNS = 16  # of bits by layer; of more rounds some are left out
WIDTH, CHARACTER = 7.2, 0.07  # of a picture, and of small text; inches


def plot_logs(logs: Sequence[Path], path: Path | None) -> Path:
    """Draw the runs of the logs into `path`, by default beside the log; return it."""
    new_figure("plot")  # refuses before any work
    runs = [History(log) for log in logs]
    if len({run.name for run in runs}) < len(runs):
        for run, log in zip(runs, logs, strict=True):
            run.name = str(log)
    if path is None:
        path = logs[0].with_name(f"{runs[0].name}.png") if len(logs) == 1 else Path("compared.png")
    save_figure(draw(runs), path, "-o")
    return path


def new_figure(flag: str, **options: Any) -> Any:
    """Return an empty figure; InputError, which names `flag`, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{flag} needs matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained", **options)


def save_figure(figure: Any, path: Path, flag: str) -> None:
    """Write the figure in the format of the ending; InputError, by `flag`, where there is none."""
    ending = path.suffix[1:] or "png"
    if ending not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{flag} {path}: '.{ending}' is no kind of picture; use .png or .svg")
    write_atomically(path, lambda file: figure.savefig(file, format=ending, dpi=150))


def draw(runs: Sequence[History]) -> Any:
    """Return a figure: accuracy, loss and bits over the epochs, and bits by layer.

    Of one run the layers' bits are those after each round; of several, each one's last. Stages of
    several runs begin together.
    """
    align(runs)
    alone = runs[0] if len(runs) == 1 else None
    panels = [keys for keys in PANELS if any(run.series(keys[0]).size for run in runs)]
    layers = alone.bits_by_layer() if alone else last_bits(runs)
    table = 0.9 + 0.17 * max(map(len, layers.values()), default=0)
    heights = [1.8] * len(panels) + [table] * bool(layers)
    figure = new_figure("plot", figsize=(WIDTH, sum(heights) + 0.5))
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for ax, keys in zip(axes, panels, strict=False):
        for k, run in enumerate(runs):
            draw_alone(ax, run, keys) if alone else draw_among(ax, run, keys[0], k)
        ax.sharex(axes[0])
        scale(ax, keys)
    draw_stages(axes[: len(panels)], runs)
    lines, title = axes[0].get_legend_handles_labels(), alone and alone.name
    figure.legend(*lines, title=title, loc="outside upper center", ncols=3 if alone else 2)
    if layers:
        draw_layers(axes[-1], layers)
        axes[-1].set_xlabel("pruning rounds done" if alone else "run")
    return figure


def last_bits(runs: Sequence[History]) -> dict[str, dict]:
    """Return the last bits by layer of each run, by its name and its last accuracy in a test."""
    found = {}
    for run in runs:
        tests = [f"\ntest {test:.2f} %" for test in run.series("test")[1][-1:]]
        for bits in list(run.bits_by_layer().values())[-1:]:
            found["".join([run.name, *tests])] = bits
    return found


def draw_alone(ax: Any, run: History, keys: tuple) -> None:
    """Draw a line for each of the keys, and the accuracies in tests."""
    for key, line in zip(keys, "-:", strict=False):
        x, y = run.series(key)
        look = {"linewidth": 1.2, "marker": "." if len(x) <= FEW else None}
        ax.plot(x, y, f"k{line}", label="training" if key in keys[1:] else "validation", **look)
    x, y = run.series("test")
    if keys == ACCURACY and len(x):
        ax.plot(x, y, "ko", markerfacecolor="white", label="test", clip_on=False, zorder=3)


def draw_among(ax: Any, run: History, key: str, k: int) -> None:
    """Draw the line of the key, as run number `k`."""
    x, y = run.series(key)
    every = max(1, len(x) // 12)
    gaps = numpy.flatnonzero(numpy.diff(x) > 1) + 1  # where other runs' stages are longer
    x, y = numpy.insert(x, gaps, 0), numpy.insert(y, gaps, numpy.nan)
    ax.plot(x, y, label=run.name, markevery=(k * every // 4 % every, every), **line_style(k))


def line_style(k: int) -> dict:
    """Return how line `k` is drawn; 16 differ, in black and white too."""
    look = {"color": COLORS[k % 4], "linestyle": LINES[k % 4], "linewidth": 1.4}
    return {**look, "marker": "os^DvP*"[k % 4 + k // 4 % 4], "markersize": 5}


def scale(ax: Any, keys: tuple) -> None:
    """Name the axis and give each tenfold one height: of the error, where accuracies are drawn."""
    ax.set_ylabel(PANELS[keys])
    values = numpy.concatenate([line.get_ydata() for line in ax.lines])
    if keys == ACCURACY:
        judged = [line.get_ydata() for line in ax.lines if line.get_label() != "training"]
        best, seen = (
            (100 - y)[y < 100].min(initial=100) for y in (numpy.concatenate(judged), values)
        )
        least = max(seen, best / 10) / 2  # what is better is drawn there

        def height(accuracy: Any) -> Any:
            return -numpy.log10(numpy.maximum(100 - accuracy, least))

        ax.set_yscale("function", functions=(height, lambda height: 100 - 10**-height))
        ax.set_ylim(top=100 - least)
        plain_ticks(ax.yaxis, best=100)
    elif (numpy.nanmax if keys == BITS else numpy.nanmin)(values) > 0:
        ax.set_yscale("log")
        plain_ticks(ax.yaxis, BINARY if keys == BITS else DECIMAL)


def plain_ticks(axis: Any, choices: Sequence = DECIMAL, best: float = 0) -> None:
    """Mark 3 to 8 round values on an axis that is logarithmic in the distance from `best`."""
    low, high = sorted(abs(best - end) for end in axis.get_view_interval())
    tens = 10 ** numpy.floor(numpy.log10(high - low))
    ticks = [numpy.arange(10 * high / step // tens) * step * tens / 10 for step in (10, 5, 2)]
    for found in (*choices, *ticks):
        found = [tick for tick in found if low <= tick <= high]
        if 3 <= len(found) <= 8:
            break
    axis.set_ticks([abs(best - tick) for tick in found], [f"{abs(best - t):g}" for t in found])
    axis.set_ticks([], minor=True)


def draw_stages(axes: Any, runs: Sequence[History]) -> None:
    """Shade every other stage, and of one run its rounds; name those that are wide enough."""
    names = {}
    for run in runs:
        for epoch in (epoch for epoch in run.epochs if epoch["epoch"]):
            name = f"round {epoch['round']}" if epoch["round"] and len(runs) == 1 else None
            names[run.starts[epoch["stage"]] + epoch["epoch"]] = name or STAGES[epoch["stage"]]
    parts = [list(part) for _, part in groupby(sorted(names), names.__getitem__)]
    first, last = parts[0][0] - 1, parts[-1][-1]
    axes[-1].set(xlim=(first, last + 0.01 * (last - first)), xlabel="epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    for number, part in enumerate(parts):
        start, end, name = part[0] - 1, part[-1], names[part[0]]
        for ax in axes:
            ax.axvspan(start, end, color="0.5", alpha=0.18 if number % 2 else 0, linewidth=0)
            ax.tick_params(labelbottom=ax is axes[-1])
        room = 0.85 * WIDTH * (end - start) / (last - first) / CHARACTER
        fitting = [text for text in (name, name.removeprefix("round "), "") if len(text) < room]
        where = {"transform": axes[0].get_xaxis_transform(), "ha": "center", "fontsize": 8}
        axes[0].text((start + end) / 2, 1.03, fitting[0], **where)


def draw_layers(ax: Any, layers: Mapping[str, dict]) -> None:
    """Draw what `History.bits_by_layer` returns as a table: the more bits, the darker."""
    every = -(-len(layers) // COLUMNS)
    columns = [*list(layers)[:-1:every], list(layers)[-1]]
    found = dict.fromkeys(name for column in columns for name in layers[column])
    names = [*(name for name in found if name != "network"), "network"]
    bits = numpy.array([[layers[c].get(name, numpy.nan) for c in columns] for name in names])
    ax.imshow(bits, cmap="Greys", vmin=0, vmax=2 * numpy.nanmax(bits) or 1, aspect="auto")
    for (row, column), value in numpy.ndenumerate(bits):
        text = "" if numpy.isnan(value) else f"{value:.2f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=7)
    ax.set_yticks(range(len(names)), [n.removesuffix(".weight") for n in names], fontsize=8)
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.tick_params(length=0)
    ax.set_title("average bitwidth (bit)", fontsize=8)
    ax.set_ylabel("layer")
