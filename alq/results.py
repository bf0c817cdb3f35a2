"""The results table of the README, from the logs of the runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from .report import format_bytes
from .runlog import read_log

# The paper's table: weights quantized, activations in floating point (SPEC section 6).
PUBLISHED = {
    "lenet5": {"bitwidth": 0.40, "storage_bytes": 22.7e3, "top1": 99.1},
    "vgg": {"bitwidth": 0.66, "storage_bytes": 1.29e6, "top1": 92.0},
    "resnet18": {"bitwidth": 2.00, "storage_bytes": 3.44e6, "top1": 70.0},
    "resnet34": {"bitwidth": 2.00, "storage_bytes": 6.37e6, "top1": 73.6},
}
TITLES = {
    "lenet5": "LeNet5, MNIST",
    "vgg": "VGG, CIFAR-10",
    "resnet18": "ResNet18, ILSVRC12",
    "resnet34": "ResNet34, ILSVRC12",
}
HEADER = [
    "| network, data | | bits | weights | top-1 % | full precision % | hours | when, where, log |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


def read_run(log: Path) -> dict:
    """One run's log -> {"net", "log", the result events by stage}."""
    run: dict = {"log": log.name, "stages": {}}
    for event in read_log(log):
        if event["event"] == "start":
            if "PRETRAIN" in event["stages"]:
                run["stages"] = {}
            run["net"], run["date"] = event["net"], event["time"][:10]
            run["machine"] = f"{event['device']}, {event['threads']} threads"
        elif event["event"] == "result":
            run["stages"][event["stage"]] = event
    return run


def spread(values: Iterable[float], form: str) -> str:
    """Mean, and the standard deviation of several runs."""
    values = list(values)
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def results_table(logs: Iterable[Path]) -> str:
    """Markdown: per network the published row and that of the finished runs in `logs`."""
    runs = [run for run in map(read_run, sorted(logs)) if "posttrain" in run["stages"]]
    lines = list(HEADER)
    for net, published in PUBLISHED.items():
        size = format_bytes(published["storage_bytes"])
        lines.append(
            f"| {TITLES[net]} | published | {published['bitwidth']:.2f} | {size} "
            f"| {published['top1']:.1f} | | | |"
        )
        own = [run for run in runs if run["net"] == net]
        lines.append(measured_row(own) if own else "| | here | not measured here | | | | | |")
    return "\n".join(lines)


def measured_row(runs: list[dict]) -> str:
    """The row of one network's runs."""
    final = [run["stages"]["posttrain"] for run in runs]
    hours = [sum(stage["seconds"] for stage in run["stages"].values()) / 3600 for run in runs]
    cells = [
        "",
        "here",
        spread((f["bitwidth"] for f in final), ".3f"),
        format_bytes(statistics.mean(f["storage_bytes"] for f in final)),
        spread((f["top1"] for f in final), ".2f"),
        spread((f["top1_fp"] for f in final), ".2f"),
        spread(hours, ".1f"),
        "; ".join(f"{run['date']}, {run['machine']}, `{run['log']}`" for run in runs),
    ]
    return "| " + " | ".join(cells) + " |"
