"""Rounds at ratio pr: what is removed where a batch's share is less than one coordinate."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

import alq
import lenet5
from alq.command.report import expectation
from alq.errors import InputError
from alq.training.plan import pruning_plan
from alq.training.sizes import size_in
from networks import NETWORKS
from test_schedules import plan_of


def few_coordinates() -> tuple[nn.Module, list[alq.MultiBitWeight]]:
    """408 coordinates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 34), nn.ReLU(), nn.Linear(34, 34))
    weights = alq.quantize(model, subc=1)
    assert size_in("coordinates", weights) == 408
    return model, weights


def test_fit_prunes_what_pr_asks_for_also_where_a_batch_removes_less_than_one() -> None:
    model, weights = few_coordinates()
    x = torch.randn(500, 2, 16, generator=torch.Generator().manual_seed(0))
    schedule = alq.Schedule(
        R=2, pr=0.2, epoch_basis=0, epoch_coord=0, epoch_ste=0, epoch_post_coord=0
    )
    left = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        left.append(size_in("coordinates", weights))
        return model(batch).square().mean()

    alq.fit(model, weights, list(x), [x[0]], loss, schedule, progress=False)
    assert left[-1] == int(408 * (1 - 0.2 / 500) ** 1000)
    assert left[502] == int(408 * (1 - 0.2 / 500) ** 500)  # the second round's second batch
    removed = [a - b for a, b in itertools.pairwise(left)]
    assert max(removed) <= 2  # a little at a time, as pruning is meant


def test_the_scripts_say_that_rounding_keeps_them_from_pruning() -> None:
    _, weights = few_coordinates()
    flags = lenet5.command_line().parse_args("--ALQ --pr 0.8 --R 4".split())
    said = expectation(pruning_plan(flags, weights, 500), weights).splitlines()
    assert said[0] == "4 rounds at pr 0.8: at most about 6.00 bit (2.9 KB)"
    asked = 100 * (1 - 0.8 / 500) ** 2000
    assert said[1].startswith(f"note: leaves 100.0% of the coordinates, not {asked:.1f}%, as")
    assert "a larger --batch_size" in said[1] and "--target_bit" in said[1]
    flags = lenet5.command_line().parse_args("--ALQ --pr 0.8 --R 4 --top_k 0.1".split())
    assert "note" not in expectation(pruning_plan(flags, weights, 10), weights)
    flags.target_bit = 1.0
    assert "note" not in expectation(pruning_plan(flags, weights, 500), weights)


@pytest.mark.parametrize("net", NETWORKS)
def test_the_published_schedules_are_rounded_little(net: str) -> None:
    _, layers, plan = plan_of(net)
    assert "rounded" not in expectation(plan, layers)


def test_a_script_says_so_before_any_work(sliver, tmp_path, capsys) -> None:
    files = f"--model_ori {tmp_path}/ori.pth --model {tmp_path}/m.pth --val_size 100"
    short = "--batch_size 1 --epoch_pretrain 1 --R 1 --epoch_basis 0 --epoch_coord 0 --pr 0.1"
    groups = "--structure channelwise channelwise subchannelwise subchannelwise --subc 0 0 1 1"
    flags = f"--PRETRAIN --ALQ --max_bit 1 --threads 1 {files} {short} {groups}"
    lenet5.main(flags.split())
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("note: leaves 100.0% of the coordinates, not 90.5%, as each batch's")
    assert "pretrain: " in said[4]


@pytest.mark.parametrize("count", [1, 3, 40, 1000])
def test_the_share_of_candidates_is_chosen_where_none_is_given(count: int) -> None:
    _, weights = few_coordinates()
    plan = pruning_plan(alq.Schedule(R=1), weights, count, rounded=False)
    assert plan.top_k == {1: 1.0, 3: pytest.approx(1.6 / 3), 40: 0.04, 1000: 0.005}[count]
    assert pruning_plan(alq.Schedule(top_k=0.9), weights, count).top_k == 0.9


def test_the_share_of_candidates_that_is_advised_is_enough() -> None:
    _, weights = few_coordinates()
    for count in range(2, 300, 7):
        schedule = alq.Schedule(top_k=1e-6)
        with pytest.raises(InputError, match="use top_k") as refused:
            pruning_plan(schedule, weights, count)
        (advised,) = re.findall(r"use top_k (\S+) or more", str(refused.value))
        pruning_plan(alq.Schedule(top_k=float(advised)), weights, count)
