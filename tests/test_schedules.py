"""docs/schedules.md: where the published flags end, by counting and by the logs of runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import mean

import pytest

from alq.command.checks import sketched_layers
from alq.command.report import format_bytes
from alq.training.pruning import expected_size, pruning_plan
from networks import NETWORKS
from published_runs import read_events

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "checkpoints" / "published"
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


@pytest.mark.parametrize("net", NETWORKS)
def test_the_command_for_each_row(net: str) -> None:
    command, rounds = table("The command for each row")[net]
    target = re.search(r"--target_bit ([\d.]+)", command)
    _, _, plan = plan_of(net, target_bit=float(target[1]) if target else None)
    assert plan.rounds == int(rounds)
    assert target is None or float(target[1]) == NETWORKS[net].recipe.published["bitwidth"]
