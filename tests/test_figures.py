"""Every figure of the README can be drawn from the published logs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import figures

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn_and_in_the_readme(name, tmp_path) -> None:
    figures.main([name, "--out", str(tmp_path)])
    picture = plt.imread(tmp_path / f"{name}.png")
    assert picture[..., :3].min() < 0.1 and picture[..., :3].std() > 0.02  # something is drawn
    assert (figures.HERE / f"{name}.png").is_file()
    assert f"benchmarks/figures/{name}.png" in (ROOT / "README.md").read_text()


def test_axes_have_names_with_units() -> None:
    for draw in figures.FIGURES.values():
        figure = draw(figures.PUBLISHED)
        shared = [ax for ax in figure.axes if ax.get_xlabel() or ax.get_ylabel()]
        assert all(ax.get_xlabel() or ax.get_ylabel() for ax in shared) and shared
        plt.close(figure)
