"""What the figures are drawn with: panels, legends, lines with bands or bars over the seeds.

Lines differ in style and marker: they can be told apart in black and white.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alq.command.plot import line_style

STYLES = [line_style(number) for number in range(4)]


def axes(rows: int, columns: int, height: float, width: float = 7.2, **more: object) -> tuple:
    return plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained", **more
    )


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """Place a legend of what `ax` shows below all panels."""
    lines = ax.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=columns, fontsize=8)


def plot_band(ax: Axes, runs: list[list[float]], label: str, style: dict) -> None:
    """Plot the mean of the seeds over the epochs, in a band from the least to the greatest."""
    x = range(1, len(runs[0]) + 1)
    columns = list(zip(*runs, strict=True))
    ax.plot(x, [mean(values) for values in columns], label=label, **style)
    if len(runs) > 1:
        ends = ([end(values) for values in columns] for end in (min, max))
        ax.fill_between(x, *ends, color=style["color"], alpha=0.2, linewidth=0)


def plot_spread(
    ax: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, style: dict
) -> None:
    """Plot the mean of each group of values at its x, with bars from the least to the largest."""
    means = [mean(group) for group in values]
    low = [m - min(group) for m, group in zip(means, values, strict=True)]
    high = [max(group) - m for m, group in zip(means, values, strict=True)]
    ax.errorbar(x, means, (low, high), capsize=3, label=label, **style)
