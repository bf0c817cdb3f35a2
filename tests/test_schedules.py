"""docs/schedules.md: where the published flags end, by counting and by the logs of runs."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from statistics import mean

import pytest

from alq.command.checks import sketched_layers
from alq.command.flags import grouping_options
from alq.command.report import format_bytes
from alq.files.runlog import plain_flags
from alq.method.network import groupings
from alq.training.plan import expected_size, pruning_plan
from alq.training.schedule import alq_schedule, posttrain_schedule, pretrain_schedule
from networks import NETWORKS
from published_runs import GONE, MAY_DIFFER, Run, read_events, read_run, read_runs
from tables import seeds_table

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "checkpoints" / "published"
DOCUMENT = ROOT / "docs" / "schedules.md"
PICTURES = {"lenet5": 60_000, "vgg": 50_000, "resnet18": 1_281_167, "resnet34": 1_281_167}
LOGS = {  # of the published flags, over as many batches as the whole data set has
    "lenet5": sorted(RUNS.glob("lenet5_seed*.jsonl")),
    "vgg": [RUNS / "path_checks" / "vgg_defaults_full_count.jsonl"],
    "resnet18": [RUNS / "path_checks" / "resnet18_defaults_full_count.jsonl"],
    "resnet34": [],
}


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table under `heading`, by network."""
    text = (
        (ROOT / "docs" / "schedules.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    )
    rows = [re.findall(r"[^|]+", line) for line in text.splitlines() if line.startswith("| ")]
    return {
        name.partition(",")[0].strip().lower(): [cell.strip() for cell in cells]
        for name, *cells in rows[2:]
    }


def plan_of(net: str, **changed: object):
    """The flags, layers and pruning plan of the whole data set."""
    args = NETWORKS[net].default_flags()
    vars(args).update(changed)
    layers = sketched_layers(args, NETWORKS[net].recipe)
    batches = math.ceil((PICTURES[net] - args.val_size) / args.batch_size)
    return args, layers, pruning_plan(args, layers, batches)


@pytest.mark.parametrize("net", NETWORKS)
def test_the_published_flags(net: str) -> None:
    bits, bits_run, bits_paper, size, size_run, size_paper = table("The published flags")[net]
    _, layers, plan = plan_of(net)
    expected, paper = expected_size(plan, layers), NETWORKS[net].recipe.published
    assert (bits, size) == (f"{expected['bitwidth']:.2f}", format_bytes(expected["storage_bytes"]))
    assert (bits_paper, size_paper) == (
        f"{paper['bitwidth']:.2f}",
        format_bytes(paper["storage_bytes"]),
    )
    ends = [
        [e for e in read_events(log) if e["event"] == "result" and e["stage"] == "alq"][-1]
        for log in LOGS[net]
        if log.exists()
    ]
    if not ends:
        assert bits_run == size_run == "not measured"
        return
    assert bits_run == f"{mean(end['bitwidth'] for end in ends):.3f}"
    assert size_run == format_bytes(mean(end["storage_bytes"] for end in ends))


def coordinates_after_rounds(log: Path) -> list[int]:
    """The number of coordinates after each pruning epoch of a log."""
    events = read_events(log)
    flags = NETWORKS[events[0]["net"]].default_flags()
    flags.structure, flags.subc = events[0]["flags"]["structure"], events[0]["flags"]["subc"]
    layers = groupings(NETWORKS[events[0]["net"]].recipe.shapes(), **grouping_options(flags))
    return [
        round(sum(e["bitwidths"][name] * grouping.G for name, (grouping, _) in layers.items()))
        for e in events
        if e["event"] == "epoch" and e["kind"] == "prune"
    ]


@pytest.mark.parametrize("net", ["vgg", "resnet18"])
def test_the_logs_have_the_published_pruning_over_all_batches(net: str) -> None:
    """The count of coordinates after each round is that of so many batches."""
    (log,) = LOGS[net]
    args, layers, plan = plan_of(net)
    ran = [e for e in read_events(log) if e["event"] == "start" and "ALQ" in e["stages"]][-1]
    for flag in ("R", "pr", "top_k", "epoch_prune", "structure", "subc", "max_bit"):
        assert ran["flags"][flag] == getattr(args, flag), flag
    live = sum(layer.live_total for layer in layers)
    counted = [
        round(live * dataclasses.replace(plan, rounds=number).share_left(live))
        for number in range(1, plan.rounds + 1)
    ]
    measured = coordinates_after_rounds(log)
    assert measured == pytest.approx(counted, rel=1e-3)
    rows = re.findall(r"^\| (\d) \| ((?:\d+ \| ){3}\d+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    first = {"vgg": 0, "resnet18": 2}[net]
    cells = [tuple(map(int, row.split(" | ")))[first : first + 2] for _, row in rows]
    assert cells == list(zip(counted, measured, strict=True))


@pytest.mark.parametrize("net", NETWORKS)
def test_the_command_for_each_row(net: str) -> None:
    command, rounds, epochs = table("The command for each row")[net]
    target = re.search(r"--target_bit ([\d.]+)", command)
    args, _, plan = plan_of(net, target_bit=float(target[1]) if target else None)
    assert plan.rounds == int(rounds)
    stages = [alq_schedule(args, plan.rounds), posttrain_schedule(args)]
    stages += [] if "--DOWNLOAD" in command else [pretrain_schedule(args)]
    assert sum(map(len, stages)) == int(epochs)
    assert target is None or float(target[1]) == NETWORKS[net].recipe.published["bitwidth"]


# ---------------------------------------------------------------------------- make demo


def demo_runs(folder: str = "demo") -> list[Run]:
    return read_runs(RUNS / folder)


def test_the_runs_of_the_demo_have_the_flags_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    flags = re.search(r"^DEMO := (.*)$", makefile, re.MULTILINE)[1].split()
    wanted = plain_flags(NETWORKS["lenet5"].command_line().parse_args(flags))
    for run in [*demo_runs(), *demo_runs("fashion_mnist")]:
        for stage in run.stages.values():
            (command,) = stage.commands
            others = {k: v for k, v in command["flags"].items() if k not in MAY_DIFFER}
            assert others == {k: {**GONE, **wanted}[k] for k in others}


def test_the_demo_reaches_the_row_with_every_seed() -> None:
    runs = demo_runs()
    assert [run.stages["alq"].commands[0]["flags"]["seed"] for run in runs] == [0, 1, 2, 3, 4]
    assert seeds_table(runs) in DOCUMENT.read_text()
    for run in runs:
        assert run.final["top1"] >= 99.1
        assert run.final["bitwidth"] <= 0.36 and run.final["storage_bytes"] <= 22.5e3
    assert mean(run.final["top1"] for run in runs) >= 99.15


def test_the_demo_on_fashion_mnist() -> None:
    runs = demo_runs("fashion_mnist")
    assert seeds_table(runs) in DOCUMENT.read_text()
    assert all(run.dataset == "fashion_mnist" for run in runs)
    default = read_run(RUNS / "lenet5_fashion_mnist_seed0.jsonl")
    full, gap = re.search(
        r"Against ([\d.]+) %, which .*? in 100 epochs, ([\d.]+) % are missing", DOCUMENT.read_text()
    ).groups()
    assert float(full) == default.final["top1_fp"]
    short = mean(run.final["top1"] for run in runs)
    assert gap == f"{default.final['top1_fp'] - short:.1f}"
