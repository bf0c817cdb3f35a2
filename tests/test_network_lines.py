"""What the summary says of the whole network: held to the bytes of the packed file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import alq
import lenet5
from alq.command.report import format_bytes, network_lines

ROOT = Path(__file__).resolve().parent.parent


class Sentences(nn.Module):
    """Layers that are quantized, in part or not at all, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.normed = weight_norm(nn.Linear(32, 64))
        self.spectral = spectral_norm(nn.Linear(64, 48))
        self.pruned = torch_prune.l1_unstructured(nn.Linear(48, 32), "weight", 0.5)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scratch", torch.zeros(1000), persistent=False)  # is in no file

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lstm(self.table(tokens))[0][:, -1]
        return self.head(self.norm(self.pruned(self.spectral(self.normed(x)))))


UNQUANTIZED = [  # by their bytes
    "spectral.parametrizations.weight.original",
    "normed.parametrizations.weight.original1",
    "pruned.weight_orig",
    "pruned.weight_mask",
]


def sentences() -> tuple[nn.Module, list[alq.MultiBitWeight]]:
    torch.manual_seed(0)
    model = Sentences()
    return model, alq.quantize(model, max_bit=2)


def test_what_is_not_quantized_is_told_by_name_and_bytes(tmp_path) -> None:
    model, weights = sentences()
    assert [w.name for w in weights] == ["table.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    rest = alq.save_packed(tmp_path / "net.alq", model, weights)["rest"]
    first, second = network_lines(model, weights).splitlines()
    values = {id(value): value for value in model.state_dict(keep_vars=True).values()}.values()
    others = len(values) - len(weights) - len(UNQUANTIZED)
    names = ", ".join(UNQUANTIZED)
    assert second == f"not quantized: {format_bytes(rest)} in {names} and {others} more"
    full = sum(value.numel() * value.element_size() for value in values)
    quantized = sum(weight.parameter.numel() for weight in weights)
    bits = alq.average_bitwidth(weights) * quantized + 8 * rest
    mean = bits / sum(value.numel() for value in values)
    storage = alq.storage_bytes(weights)
    assert first == (
        f"{alq.average_bitwidth(weights):.3f} bit a weight, {format_bytes(storage)}; whole network "
        f"{mean:.3f} bit, {format_bytes(storage + rest)} (in full precision {format_bytes(full)})"
    )
    assert mean > 4 * alq.average_bitwidth(weights)  # most of this network is not quantized


@pytest.mark.parametrize("biases", [False, True])
def test_few_or_no_others(biases: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=biases), nn.Linear(8, 2, bias=False))
    line = network_lines(model, alq.quantize(model, max_bit=1)).splitlines()[1]
    assert line == f"not quantized: 0.0 KB in {'0.bias' if biases else 'nothing'}"


def test_fit_prints_it(capsys) -> None:
    model, weights = sentences()
    batches = [(torch.randint(50, (8, 5)), torch.randint(50, (8,))) for _ in range(3)]
    schedule = alq.Schedule(
        R=1, pr=0.5, epoch_basis=1, epoch_coord=0, epoch_ste=0, epoch_post_coord=0
    )
    alq.fit(model, weights, batches, batches, schedule=schedule)
    assert f"\n\n{network_lines(model, weights)}\nvalidation " in capsys.readouterr().out


def test_the_scripts_print_it(sliver, capsys) -> None:
    file = ROOT / "checkpoints" / "published" / "lenet5.alq"
    lenet5.main(["--EVAL", str(file), "--threads", "1"])
    printed = capsys.readouterr().out
    model = lenet5.LeNet5()
    weights = alq.load_packed(file, model)
    assert f"\n\n{network_lines(model, weights)}\n{file}: " in printed
    rest = int(re.findall(r" rest (\d+) ", printed)[0])
    assert (
        f"not quantized: {format_bytes(rest)} in fc1.bias, conv2.bias, conv1.bias, fc2" in printed
    )
