"""What the recorded runs of the whole VGG and ResNets on small sets show, read off their logs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

import resnet
import vgg

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "published" / "path_checks"
LAYERS = {"vgg": len(vgg.DEFAULTS["subc"]), **resnet.LAYERS}


# The bits of activations, 0 for float: what may be lost of the validation accuracy by pruning. Of
# 60 pictures three are 5 %.
LOST = {0: 0.0, 2: 5.0}


@pytest.mark.parametrize("act_bit", LOST)
@pytest.mark.parametrize("net", LAYERS)
def test_the_network_learns_shrinks_and_recovers_from_each_pruning(net: str, act_bit: int) -> None:
    name = f"{net}_three_digits" + (f"_act{act_bit}" if act_bit else "")
    lines = (FOLDER / f"{name}.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    starts = [line for line in log if line["event"] == "start"]
    # A process for each stage, which therefore read the files of the one before.
    assert [line["stages"] for line in starts] == [["PRETRAIN"], ["ALQ"], ["POSTTRAIN"]]
    results = [line for line in log if line["event"] == "result"]
    assert [line.get("act_bit", 0) for line in results] == [0, act_bit, act_bit]
    epochs = [line for line in log if line["event"] == "epoch"]
    pretraining = [line["loss"] for line in epochs if line["stage"] == "pretrain"]
    assert pretraining[-1] < 0.5 * pretraining[0]
    quantized = [line for line in epochs if line["stage"] != "pretrain"]
    assert all(len(line["bitwidths"]) == LAYERS[net] for line in quantized)
    assert quantized[-1]["loss"] < pretraining[0]

    prunings = [k for k, line in enumerate(quantized) if line["kind"] == "prune"]
    assert len(prunings) >= 2
    for k, following in pairwise([*prunings, len(quantized)]):
        before, pruned, after = quantized[k - 1], quantized[k], quantized[k + 1 : following]
        assert pruned["bitwidth"] < 0.75 * before["bitwidth"]
        assert max(line["val_accuracy"] for line in after) >= before["val_accuracy"] - LOST[act_bit]
