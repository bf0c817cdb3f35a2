"""The figures of the evidence, from the published logs alone and from a few made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import arms
import evidence_tables
import figures
import sweep_report
from test_sweep import SETTING, write_log

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn_and_in_the_evidence(name, tmp_path) -> None:
    figures.main([name, "--out", str(tmp_path)])
    path = tmp_path / f"{name}.png"
    in_evidence = f"](../benchmarks/figures/{name}.png)" in (ROOT / "docs/evidence.md").read_text()
    assert path.exists() == (figures.HERE / path.name).is_file() == in_evidence
    if path.exists():
        picture = plt.imread(path)
        assert picture[..., :3].min() < 0.1 and picture[..., :3].std() > 0.02  # something is drawn


@pytest.mark.parametrize("name", figures.FIGURES)
def test_axes_have_names(name) -> None:
    figure = figures.FIGURES[name](figures.PUBLISHED_RUNS)
    for ax in figure.axes if figure else ():  # inner ones share those of the first column
        place = ax.get_subplotspec()
        assert ax.get_xlabel() or not place.is_last_row()
        assert ax.get_ylabel() or not place.is_first_col()
    plt.close(figure)


# ---------------------------------------------------------------------------- made-up logs


def write_pruned(folder: Path, name: str, *accuracies: float, shift: float) -> None:
    """Write the log of a run that is pruned in rounds; trained again, it has 1 more."""
    bits = [6 * 0.4**k for k in range(1, len(accuracies) + 1)]
    points = [{"event": "point", "after": "sketch", "bitwidth": 6.0, "top1": 99.0}]
    for each, accuracy in zip(bits, accuracies, strict=True):
        for after, top1 in (("prune", accuracy), ("coordinate", accuracy + 1)):
            found = {"after": after, "bitwidth": each, "top1": top1 + shift}
            points.append({"event": "point", **found})
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"event": "start"}, *points, {"event": "result"}]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))


@pytest.fixture
def logs(tmp_path) -> Path:
    """Three arms on two data sets, of seeds 0 and 1, the second 2 better."""
    for number, arm in enumerate(evidence_tables.COMPARED["adaptive"]):
        for dataset in ("mnist", "fashion_mnist"):
            for seed in (0, 1):
                name = f"{dataset}_{arm}_seed{seed}"
                accuracies = 98.0 - number, 90.0 - number
                write_pruned(tmp_path / "ablations", name, *accuracies, shift=2 * seed - 1)
    return tmp_path


def test_a_comparison_shows_mean_and_deviation_of_the_seeds(logs) -> None:
    table = evidence_tables.compared_table(logs, evidence_tables.COMPARED["adaptive"])
    rows = table.splitlines()[2:]
    assert len(rows) == 2 * 3 * 2
    assert rows[0] == "| MNIST | across all layers | 1 | 2.400 | 98.00 ± 1.41 | 99.00 ± 1.41 | 2 |"
    assert rows[-1].startswith("| Fashion-MNIST | same bitwidth everywhere | 2 | 0.960 | 88.00 ±")


def test_a_data_set_is_left_out_where_an_arm_has_not_been_run(logs) -> None:
    arms_of = evidence_tables.COMPARED["adaptive"]
    for log in (logs / "ablations").glob("mnist_adaptive_uniform_seed*"):
        log.unlink()
    rows = evidence_tables.compared_table(logs, arms_of).splitlines()[2:]
    assert len(rows) == 3 * 2 and all(row.startswith("| Fashion-MNIST") for row in rows)
    for log in (logs / "ablations").glob("*adaptive_uniform_seed*"):
        log.unlink()
    assert evidence_tables.compared_table(logs, arms_of) == ""
    assert figures.against_bits(logs, arms_of) is None


def test_bars_go_from_the_least_to_the_greatest_seed(logs) -> None:
    figure = figures.against_bits(logs, evidence_tables.COMPARED["adaptive"])
    assert len(figure.axes) == 4
    cut = figure.axes[0]
    assert len(cut.containers) == 3
    line, _, (bars,) = cut.containers[0]
    assert line.get_ydata() == pytest.approx([2.0, 10.0])
    ends = [sorted(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx([1.0, 3.0]), pytest.approx([9.0, 11.0])]
    looks = {(c[0].get_linestyle(), c[0].get_marker()) for c in cut.containers}
    assert len(looks) == 3  # differ in black and white
    plt.close(figure)


def test_the_sweep_is_drawn_with_what_failed(tmp_path) -> None:
    folder = tmp_path / "sweep"
    for arm in sweep_report.ARMS:
        for rate in sweep_report.RATES:
            cell = sweep_report.Cell(*SETTING, arm, rate)
            failed = "not finite" if rate == sweep_report.RATES[-1] else None
            write_log(folder, cell, *[90.0] * 11, 98.0, failed=failed)
    assert figures.sweep(tmp_path, "narrow_vgg") is None
    figure = figures.sweep(tmp_path, "lenet5")
    rates, epochs = figure.axes
    line, hollow = rates.lines[:2]
    assert line.get_ydata() == pytest.approx([2.0] * 6 + [12.0])  # the edge, 6 times the least
    assert hollow.get_ydata() == [12.0] and hollow.get_markerfacecolor() == "white"
    assert len(epochs.lines) == 3 and all(len(line.get_xdata()) == 12 for line in epochs.lines)
    plt.close(figure)


def test_tables_are_renewed_between_their_marks(tmp_path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "a\n<!-- table: x -->\n\nold\n\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    )
    for _ in range(2):  # again changes nothing
        evidence_tables.write_into(document, {"x": "| new |"})
        assert document.read_text() == (
            "a\n<!-- table: x -->\n\n| new |\n\n<!-- end -->\nb\n"
            "<!-- table: y -->\n\nNot run yet.\n\n<!-- end -->\n"
        )


def test_every_claim_is_compared_in_a_table_and_a_figure() -> None:
    """What a table names are runs that the ablations do."""
    for claim, runs in evidence_tables.COMPARED.items():
        made = {
            arms.SAME.get((claim, arm.name), f"{claim}_{arm.name}") for arm in arms.CLAIMS[claim]()
        }
        assert made == set(runs) and claim in figures.FIGURES
    assert set(evidence_tables.COMPARED) == set(arms.CLAIMS)
