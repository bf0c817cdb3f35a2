"""What the logs of `benchmarks/sweep.py` say: best rates, speed, and the rates that work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

from alq.data.mnist import SETS
from short_runs import SEEDS
from small_networks import SMALL_NETWORKS
from sweep import ARMS, BITS, COORDINATE, COORDINATES, RATES, Cell, best_rate, rates_of
from tables import spread, table

TITLES = {
    "reconstruction": "STE, reconstruction error",
    "ste": "STE, loss-aware step",
    "alq": "ALQ, basis then coordinate steps",
}
SHOWN = (1, 3, 12)  # epochs whose loss the table has
NEAR = 1.0  # percent below the best of all arms, in which a rate is said to work
Setting = tuple[str, str, int]  # network, data set, bits


def settings(logs: Path, net: str | None = None) -> Iterator[Setting]:
    """Yield the settings in which every arm has its best rate: all rates are done."""
    for setting in product([net] if net else SMALL_NETWORKS, SETS, BITS):
        if all(best(setting, arm, logs) for arm in ARMS):
            yield setting


def best(setting: Setting, arm: str, logs: Path) -> Cell | None:
    """Return the run at the arm's best rate, of seed 0."""
    return best_rate(Cell(*setting, arm, RATES[0]), logs)


def seeds_of(cell: Cell, logs: Path) -> list[list[dict]]:
    """Return what the logs say of the cell's runs that trained, one for each seed."""
    found = (replace(cell, seed=seed).events(logs) for seed in SEEDS)
    return [events for events in found if events and not events[-1]["failed"]]


def losses(events: list[dict]) -> list[float]:
    """Return the training loss of each epoch."""
    return [event["loss"] for event in events if event["event"] == "epoch"]


def accuracies(setting: Setting, arm: str, logs: Path) -> dict[float, float | None]:
    """Return the validation accuracy at each rate that was run, seed 0; None where it failed."""
    results = ((c.rate, c.result(logs)) for c in rates_of(Cell(*setting, arm, RATES[0]), logs))
    return {rate: None if r["failed"] else r["val_accuracy"] for rate, r in results if r}


def errors(setting: Setting, arm: str, logs: Path) -> dict[float, float]:
    """Return the validation error at each rate that was run; infinite where it failed."""
    found = accuracies(setting, arm, logs).items()
    return {rate: math.inf if accuracy is None else 100 - accuracy for rate, accuracy in found}


def working(setting: Setting, arm: str, logs: Path) -> list[float]:
    """Return the arm's rates that end at most NEAR below the best of all arms at any rate."""
    bar = min(min(errors(setting, each, logs).values()) for each in ARMS) + NEAR
    return [rate for rate, error in errors(setting, arm, logs).items() if error <= bar]


def least_loss(setting: Setting, arm: str, epoch: int, logs: Path) -> float:
    """Return the least training loss of the arm after an epoch, at any of its rates, seed 0."""
    runs = (losses(cell.events(logs)) for cell in rates_of(Cell(*setting, arm, RATES[0]), logs))
    return min(run[epoch - 1] for run in runs if len(run) >= epoch)


def title(setting: Setting) -> str:
    net, dataset, bits = setting
    return f"{SMALL_NETWORKS[net].title}, {SETS[dataset].title}, {bits} bit"


def rates_table(logs: Path) -> str:
    """Show the validation accuracy of each arm at each rate, its best in bold when all are done."""
    rows, tried = [], set(RATES)
    for setting, arm in product(product(SMALL_NETWORKS, SETS, BITS), ARMS):
        found, chosen = accuracies(setting, arm, logs), best(setting, arm, logs)
        texts = {r: "fails" if a is None else f"{a:.2f}" for r, a in found.items()}
        tried |= set(found)
        if chosen:
            texts[chosen.rate] = f"**{texts[chosen.rate]}**"
        if found:
            rows.append((title(setting), TITLES[arm], texts))
    rates = sorted(tried)
    lines = [[*names, *(texts.get(rate, "") for rate in rates)] for *names, texts in rows]
    return table(["setting", "steps", *(f"{rate:g}" for rate in rates)], lines) if rows else ""


def written(works: list[float], rates: list[float]) -> str:
    """Return those of ascending `rates` that work: from the first to the last, or each of them."""
    first = rates.index(works[0])
    if works == rates[first : first + len(works)]:
        return f"{works[0]:g} to {works[-1]:g}"
    return ", ".join(f"{rate:g}" for rate in works)


def best_table(logs: Path) -> str:
    """Show each arm at its best rate: speed, accuracy, and how many rates work."""
    rows = []
    for setting, arm in product(settings(logs), ARMS):
        cell = best(setting, arm, logs)
        runs = seeds_of(cell, logs)
        speed = [least_loss(setting, arm, 1, logs)]
        speed += [mean(losses(run)[epoch - 1] for run in runs) for epoch in SHOWN]
        works = working(setting, arm, logs)
        span = f"{len(works)}: {written(works, [*errors(setting, arm, logs)])}" if works else "0"
        end = [f"{cell.rate:g}", *(f"{loss:.4f}" for loss in speed)]
        end.append(spread([run[-1]["top1"] for run in runs]))
        rows.append([title(setting), TITLES[arm], *end, str(len(runs)), span])
    heads = ["loss, epoch 1, any rate", *(f"loss, epoch {epoch}" for epoch in SHOWN)]
    heads = ["setting", "steps", "best rate", *heads, "test %", "seeds", "rates that work"]
    return table(heads, rows) if rows else ""


def coordinate_table(logs: Path) -> str:
    """Show ALQ's validation accuracy at its best rate by the rate of its coordinate epochs."""
    rates = sorted([*COORDINATES, COORDINATE])
    rows = []
    for setting in settings(logs):
        cells = [replace(best(setting, "alq", logs), coordinate=rate) for rate in rates]
        results = [cell.result(logs) for cell in cells]
        if all(results):
            found = ["fails" if r["failed"] else f"{r['val_accuracy']:.2f}" for r in results]
            rows.append([title(setting), *found])
    heads = [f"{rate:g}" if rate else "basis to the end" for rate in rates]
    return table(["setting", *heads], rows) if rows else ""
