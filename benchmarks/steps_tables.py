"""The README's tables of what `benchmarks/steps.py --compile --naive --json` wrote."""

from __future__ import annotations

from collections.abc import Callable

STEPS = ("basis", "ste", "coordinate", "prune")
# The rows that are timed twice: in the process as the scripts set it up, and before.
AS_STARTED = {name: f"{name}, as torch starts" for name in ("amsgrad", "basis naive")}


def eager_and_compiled(figure: Callable[[str], float], digits: int = 1) -> str:
    return "; ".join(f"{figure(kind):.{digits}f}" for kind in ("", " compiled"))


def ratios(row: dict, floor: float, naive: float) -> list[str]:
    """Each step over the floor, and the naive step over the basis step."""
    seconds = row["seconds"]
    return [
        row["network"],
        f"{row['bitwidth']:.2f}",
        f"{1e3 * floor:.1f}",
        *(eager_and_compiled(lambda kind, s=step: seconds[s + kind] / floor) for step in STEPS),
        eager_and_compiled(lambda kind: naive / seconds["basis" + kind], 0),
    ]


def cells(row: dict) -> list[str]:
    """One line of the README's first table; where there are two figures: eager; compiled."""
    seconds, peak = row["seconds"], row["peak memory in largest layers"]

    def share(kind: str) -> float:
        basis = seconds["basis" + kind]
        return 100 * basis / (basis + seconds["forward + backward"])

    return [
        *ratios(row, seconds["amsgrad"], seconds["basis naive"]),
        eager_and_compiled(share),
        f"{seconds['sketch']:.2f}",
        eager_and_compiled(lambda kind: max(peak[step + kind] for step in STEPS)),
    ]


def cells_as_torch_starts(row: dict) -> list[str]:
    """One line of the second: the same steps over AMSGrad's and the naive step's other time."""
    return ratios(row, *(row["seconds"][AS_STARTED[name]] for name in ("amsgrad", "basis naive")))


def markdown(content: dict) -> list[str]:
    """The README's two tables, from what `--compile --naive --json` wrote."""
    titles = ["network", "bits", "AMSGrad ms", *(f"{step} x" for step in STEPS), "naive / basis"]
    more = ["basis, % of training step", "sketch s", "peak memory"]
    tables = {cells: titles + more, cells_as_torch_starts: titles}
    return [
        "\n".join(
            "| " + " | ".join(line) + " |"
            for line in (head, ["---"] * len(head), *map(of_row, content["rows"]))
        )
        for of_row, head in tables.items()
    ]
