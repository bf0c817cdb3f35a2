"""Every figure of the evidence can be drawn from the published logs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import figures

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn_and_in_the_evidence(name, tmp_path) -> None:
    figures.main([name, "--out", str(tmp_path)])
    picture = plt.imread(tmp_path / f"{name}.png")
    assert picture[..., :3].min() < 0.1 and picture[..., :3].std() > 0.02  # something is drawn
    assert (figures.HERE / f"{name}.png").is_file()
    assert f"](../benchmarks/figures/{name}.png)" in (ROOT / "docs" / "evidence.md").read_text()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_axes_have_names(name) -> None:
    figure = figures.FIGURES[name](figures.PUBLISHED_RUNS)
    for ax in figure.axes:  # inner ones share those of the last row and the first column
        place = ax.get_subplotspec()
        assert ax.get_xlabel() or not place.is_last_row()
        assert ax.get_ylabel() or not place.is_first_col()
    plt.close(figure)
