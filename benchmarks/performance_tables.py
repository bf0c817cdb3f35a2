"""The tables of the timings, in Markdown, from what the scripts wrote with --json."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tables import table

STEPS = ("basis", "ste", "coordinate", "prune")
PARTS = ("data", "forward + backward", "optimizer", "other")  # of an epoch
KINDS = {"eager": "", "compiled": " compiled"}  # what the names of the timed steps end in
# What is timed twice: in the process as the scripts set it up, and in one as torch starts it.
AS_STARTED = {name: f"{name}, as torch starts" for name in ("amsgrad", "basis naive")}
SETTLED = {name: name for name in AS_STARTED}


def steps_tables(rows: Sequence[dict]) -> dict[str, str]:
    """Return titles and tables of each step over AMSGrad, from `steps.py --compile --naive`."""
    processes = {"as the scripts run": SETTLED, "as torch starts": AS_STARTED}
    return {
        f"{kind} steps, AMSGrad and the naive step {where}": steps_table(rows, end, names)
        for where, names in processes.items()
        for kind, end in KINDS.items()
    }


def steps_table(rows: Sequence[dict], end: str, names: dict[str, str]) -> str:
    """Show the steps whose names end in `end`; beside SETTLED ones memory and sketch, too."""
    head = ["network", "bits", "AMSGrad ms", *(f"{step} x" for step in STEPS), "naive / basis"]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        floor = seconds[names["amsgrad"]]
        line = [row["network"], f"{row['bitwidth']:.2f}", f"{1e3 * floor:.1f}"]
        line += [f"{seconds[step + end] / floor:.1f}" for step in STEPS]
        line.append(f"{seconds[names['basis naive']] / seconds['basis' + end]:.0f}")
        if names is SETTLED:
            peak = row["peak memory in largest layers"]
            line.append(f"{max(peak[step + end] for step in STEPS):.1f}")
            line += [] if end else [f"{seconds['sketch']:.2f}"]
        lines.append(line)
    if names is SETTLED:
        head += ["peak memory"] + ([] if end else ["sketch s"])
    return table(head, lines)


def share_of_step(row: dict, end: str) -> float:
    """Return the percent of a training step that its basis step takes."""
    seconds = row["seconds"]
    basis, passes = seconds["basis" + end], seconds["forward + backward" + (end and ", again")]
    return 100 * basis / (basis + passes + seconds["other parameters"])


def share_table(rows: Sequence[dict]) -> str:
    """Show the parts of a training step, from `training_step.py --compile`."""
    head = [
        "network", "bits", "batch", "a pass", "forward + backward ms", "basis ms", "% of step",
        "compiled basis ms", "% of step",
    ]  # fmt: skip
    lines = []
    for row in rows:
        seconds = row["seconds"]
        line = [row["network"], f"{row['bitwidth']:.2f}", str(row["batch"])]
        line += [str(row["pictures at once"]), f"{1e3 * seconds['forward + backward']:.0f}"]
        for end in KINDS.values():
            found = "basis" + end in seconds
            line += [f"{1e3 * seconds['basis' + end]:.1f}"] if found else ["not measured"]
            line += [f"{share_of_step(row, end):.1f}"] if found else ["not measured"]
        lines.append(line)
    return table(head, lines)


def epoch_tables(contents: Sequence[dict]) -> list[str]:
    """Show the seconds of each kind of epoch, and those of a basis epoch's parts."""
    kinds, parts = [], []
    for content in contents:
        arguments, seconds = content["arguments"], content["seconds"]
        steps = "compiled" if "--compile" in arguments else "eager"
        name = [steps, *re.findall(r"(\d+) threads", content["machine"])]
        kinds.append([*name, *(f"{sum(found.values()):.2f}" for found in seconds.values())])
        basis = seconds["basis"]
        share = 100 * basis["optimizer"] / sum(basis.values())
        parts.append([*name, *(f"{basis[part]:.2f}" for part in PARTS), f"{share:.1f}"])
    quantizer = ["quantizer", "threads"]
    heads = ["full precision s", "basis s", "coordinate s", "prune s", "STE s"]
    return [
        table([*quantizer, *heads], kinds),
        table([*quantizer, *(f"{part} s" for part in PARTS), "optimizer, % of epoch"], parts),
    ]


def compile_table(content: dict) -> str:
    """Show how long the first basis step with L live bases takes, from `scaling.py --compile`."""
    first: dict[int, str] = {}
    for row in sorted(content["rows"], key=lambda row: row["bits"]):
        if row["threads"] == 1:  # the first row with so many bits is the one that compiles
            first.setdefault(row["bits"], f"{row['first compiled step']:.0f}")
    return table(["live bases L", *map(str, first)], [["seconds", *first.values()]])


def scaling_table(content: dict) -> str:
    """Show each step's nanoseconds a weight at 4 bits, from `scaling.py --compile`."""
    most = max(row["threads"] for row in content["rows"])
    rows = [row for row in content["rows"] if (row["threads"], row["bits"]) == (most, 4)]
    rows = sorted({row["weights"]: row for row in rows}.items())
    steps = list(rows[0][1]["seconds"])
    return table(
        ["million weights", *(f"{step} ns" for step in steps)],
        [
            [f"{weights / 1e6:.1f}", *(f"{1e9 * row['seconds'][s] / weights:.2f}" for s in steps)]
            for weights, row in rows
        ],
    )
