"""The results table of the README, from the logs of the runs alone."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterable
from pathlib import Path

from ..files.runlog import read_log
from .report import format_bytes

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
SCRIPTS = {"lenet5": "lenet5", "vgg": "vgg", "resnet18": "resnet", "resnet34": "resnet"}
FREE = ("data", "model", "model_ori", "model_ori_urls", "workers")  # flags that do not matter
# Flags that the default commands leave off.
EXTRAS = (
    "wd", "lr_post_coord", "target_bit", "target_kb",
    "augment", "distill", "per_byte", "coded", "amp", "tf32",
)  # fmt: skip
HEADER = [
    "| network, data | | bits | weights | top-1 % | full precision % | hours | when, where, log |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


def read_run(log: Path) -> dict:
    """One run's log -> {"net", "log", "default", the result events by stage}.

    "default" is whether all stages had the schedule of the script's defaults and no extras.
    """
    run: dict = {"log": log.name, "stages": {}, "default": True}
    for event in read_log(log):
        if event["event"] == "start":
            if "PRETRAIN" in event["stages"]:
                run["stages"], run["default"] = {}, True
            run["default"] &= has_default_schedule(event["net"], event["flags"])
            run["net"], run["date"] = event["net"], event["time"][:10]
            threads = event["threads"]
            run["machine"] = f"{event['device']}, {threads} thread{'s' if threads > 1 else ''}"
        elif event["event"] == "result":
            run["stages"][event["stage"]] = event
    return run


def has_default_schedule(net: str, flags: dict) -> bool:
    """Whether a run's flags are the defaults of its script, but for seed, files and machine."""
    script = importlib.import_module(SCRIPTS[net])  # which imports this module
    defaults = script.defaults(net) if hasattr(script, "defaults") else script.DEFAULTS
    same = all(flags.get(k) == v for k, v in defaults.items() if k not in FREE)
    return same and not any(flags.get(name) for name in EXTRAS if name not in defaults)


def spread(values: Iterable[float], form: str) -> str:
    """Mean, and the standard deviation of several runs."""
    values = list(values)
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def results_table(logs: Iterable[Path]) -> str:
    """Markdown: per network the published row and that of the `logs` of default schedules."""
    runs = [run for run in map(read_run, sorted(logs)) if "posttrain" in run["stages"]]
    runs = [run for run in runs if run["default"]]
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
        provenance(runs),
    ]
    return "| " + " | ".join(cells) + " |"


def provenance(runs: list[dict]) -> str:
    """When, where and in which logs, each said once."""
    dates, machines = (list(dict.fromkeys(run[key] for run in runs)) for key in ("date", "machine"))
    return "; ".join([*dates, *machines, ", ".join(f"`{run['log']}`" for run in runs)])


def recipe_table(folder: Path) -> str:
    """Markdown: what each extra gains over the run without any, from `folder`/recipe_*.jsonl."""
    lines = ["| flags | bits | file, bytes | test % | gain |", "| --- | --- | --- | --- | --- |"]
    logs = sorted(folder.glob("recipe_*.jsonl"), key=lambda log: log.stem != "recipe_plain")
    plain: dict = {}
    for log in logs:
        found = {event["event"]: event for event in read_log(log)}
        flags, result = found["start"]["flags"], found["result"]
        plain = plain or {"flags": flags, "top1": result["top1"]}
        own = [f"--{k} {plain_text(v)}" for k, v in flags.items() if v != plain["flags"].get(k)]
        title = ", ".join(f"`{flag.strip()}`" for flag in own if not flag.startswith("--model "))
        gain = "" if log is logs[0] else f"{result['top1'] - plain['top1']:+.2f}"
        lines.append(
            f"| {title or 'none'} | {result['bitwidth']:.3f} | {result['file_bytes']} "
            f"| {result['top1']:.2f} | {gain} |"
        )
    return "\n".join(lines)


def plain_text(value: object) -> str:
    """A flag's value as it is typed."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is True else str(value)
