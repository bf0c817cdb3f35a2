"""The tables of results, in Markdown, from the logs of the runs alone.

    python benchmarks/tables.py [FOLDER]      # or: python -m alq table [FOLDER]

FOLDER holds logs (default: checkpoints/published). Prints the results beside the published rows,
and when and where each stage was computed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alq.command.arguments import OneLineParser
from alq.command.report import format_bytes
from alq.errors import InputError
from networks import NETWORKS
from published_runs import STAGES, Run, Stage, read_runs

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_RUNS = ROOT / "checkpoints" / "published"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean and standard deviation; of one value the value alone."""
    found = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return " ± ".join(f"{value:.{digits}f}" for value in found)


# ---------------------------------------------------------------------------- runs


def results_table(runs: Iterable[Run]) -> str:
    """Show for each network the published row, and mean and spread of the default schedule's runs.

    The spread is the standard deviation over the runs. Runs on other data than the paper's follow.
    """
    head = ["network, data", "", "bits", "weights", "top-1 %", "full precision %", "runs", "logs"]
    runs = [run for run in runs if run.default]
    rows = []
    for net, network in NETWORKS.items():
        published = network.recipe.published
        bits, size = f"{published['bitwidth']:.2f}", format_bytes(published["storage_bytes"])
        top1 = f"{published['top1']:.1f}"
        for dataset, title in network.datasets.items():
            own = [run for run in runs if (run.net, run.dataset) == (net, dataset)]
            measured = measured_rows(own) if own else [["", "here", "not measured", *[""] * 5]]
            if dataset == network.recipe.dataset:
                measured.insert(0, ["", "published", bits, size, top1, "", "", ""])
            elif not own:
                continue
            measured[0][0] = f"{network.title}, {title}"
            rows += measured
    return table(head, rows)


def measured_rows(runs: list[Run]) -> list[list[str]]:
    """Return the rows of one network's runs: their figures, of several the mean and the spread."""
    logs = ", ".join(f"`{run.log.name}`{differing(run)}" for run in runs)
    if len(runs) == 1:
        return [["", "here", *figures(runs, statistics.mean), "1", logs]]
    return [
        ["", "here, mean", *figures(runs, statistics.mean), str(len(runs)), logs],
        ["", "here, spread", *figures(runs, statistics.stdev), "", ""],
    ]


def figures(runs: list[Run], summary: Callable[[list[float]], float]) -> list[str]:
    """Return bits, weights, top-1 and full precision: the `summary` of the runs' final values."""
    keys = ("bitwidth", "storage_bytes", "top1", "top1_fp")
    bits, size, top1, full = (summary([run.final[key] for run in runs]) for key in keys)
    return [f"{bits:.3f}", format_bytes(size), f"{top1:.2f}", f"{full:.2f}"]


def differing(run: Run) -> str:
    """Say in brackets in what the stages of a run were computed differently, if in anything."""
    found = [
        key
        for key in ("device", "threads", "processes", "commit")
        if len({tuple(stage.said(key)) for stage in run.stages.values()} - {(None,)}) > 1
    ]
    return f" (stages differ in {' and '.join(found)})" if found else ""


def stages_table(runs: Iterable[Run]) -> str:
    """Show when, where and for how long each stage of each run was computed."""
    head = ["log", "schedule", "stage", "begun", "device", "threads", "commit", "hours"]
    return table(head, [stage_row(run, name) for run in runs for name in STAGES])


def stage_row(run: Run, name: str) -> list[str]:
    """Return the row of one stage; the first one's names the run."""
    stage: Stage = run.stages[name]
    first = name == STAGES[0]
    return [
        f"`{run.log.name}`" if first else "",
        ("default" if run.default else "its own") if first else "",
        name,
        stage.commands[0]["time"][:10],
        *(", ".join(map(str, stage.said(key))) for key in ("device", "threads", "commit")),
        f"{stage.result['seconds'] / 3600:.2f}",
    ]


def seeds_table(runs: Sequence[Run]) -> str:
    """Show how runs of one schedule ended, each by its seed, and their mean."""
    head = ["seed", "bits", "weights", "top-1 %", "full precision %"]
    seeds = [str(run.stages["alq"].commands[0]["flags"]["seed"]) for run in runs]
    rows = [[seed, *figures([run], statistics.mean)] for seed, run in zip(seeds, runs, strict=True)]
    return table(head, [*rows, ["mean", *figures(list(runs), statistics.mean)]])


def print_tables(folder: Path | None = None) -> None:
    """Print the tables of a folder of logs; by default of the published ones.

    Raises: InputError says what `folder` lacks, or which line of which file is no log's.
    """
    folder = folder or PUBLISHED_RUNS
    runs = read_runs(folder)
    print(results_table(runs), stages_table(runs), sep="\n\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="of the logs")
    args = parser.parse_args(argv)
    try:
        print_tables(args.folder)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
