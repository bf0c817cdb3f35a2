"""The recorded steps: five small layers through a sequence of all modes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import alq
from compare import follow, numbers
from reference import Reference

GOLDEN = Path(__file__).parent / "golden"
# Of the layer's largest weight, after up to 25 steps. The recording is float32 and itself up to
# 2.5e-6 away from the same steps in float64.
TOLERANCE = {alq.ALQ: 3e-6, alq.CompiledALQ: 5e-6}


class Layers(nn.Module):
    """Bare parameters under the names c0.weight, c1.weight, ..."""

    def __init__(self, initial: list[torch.Tensor]) -> None:
        super().__init__()
        for k, weight in enumerate(initial):
            layer = nn.Module()
            layer.weight = nn.Parameter(weight)
            self.add_module(f"c{k}", layer)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def layers_and_weights(
    record: dict, device: torch.device | str = "cpu"
) -> tuple[Layers, list[alq.MultiBitWeight]]:
    count = len(record["max_bits"])
    model = Layers([torch.tensor(record[f"c{k}_w0"], device=device) for k in range(count)])
    weights = alq.quantize(
        model,
        structure=[str(s) for s in record["structures"]],
        subc=[int(s) for s in record["subchannels"]],
        max_bit=[int(b) for b in record["max_bits"]],
    )
    return model, weights


def references(record: dict) -> list[Reference]:
    """The plain steps from the recorded sketch on. Levels tie that float32 may confuse."""
    flags = {key: float(record[key]) for key in ("lr", "eps")}
    return [
        Reference(
            *(record[f"s00_c{k}_{key}"] for key in ("B", "alpha", "mask")),
            **flags,
            tie=1e-5,
            ridge=1e-6,
        )
        for k in range(len(record["max_bits"]))
    ]


def check(
    record: dict, step: int, weights: list[alq.MultiBitWeight], same: list, tolerance: float
) -> None:
    """The weights are those of the recording, in the groups (G,) that `same` has for each layer."""
    for k, (weight, groups) in enumerate(zip(weights, same, strict=True)):
        where = f"step {step} ({record['modes'][step]}), layer {k} ({weight.structure})"
        B, alpha, mask, w = (
            record[f"s{step:02d}_c{k}_{key}"] for key in ("B", "alpha", "mask", "w")
        )
        w = weight.grouping.to_groups(torch.from_numpy(w)).numpy()
        atol = tolerance * np.abs(record[f"c{k}_w0"]).max()
        np.testing.assert_array_equal(numbers(weight.mask), mask, err_msg=where)
        np.testing.assert_array_equal(numbers(weight.B)[groups], B[groups], err_msg=where)
        parameter = weight.grouping.to_groups(weight.parameter)
        for ours, theirs in ((weight.alpha, alpha), (weight.w_hat_groups(), w), (parameter, w)):
            np.testing.assert_allclose(
                numbers(ours)[groups], theirs[groups], atol=atol, rtol=0, err_msg=where
            )


@pytest.mark.parametrize("name", ["steps_a.npz", "steps_b.npz"])
def test_recorded_steps(name: str) -> None:
    take_recorded_steps(name, alq.ALQ)


@pytest.mark.parametrize("name", ["steps_a.npz", "steps_b.npz"])
def test_recorded_steps_compiled(name: str, compiler) -> None:
    take_recorded_steps(name, alq.CompiledALQ)


def take_recorded_steps(name: str, kind: type[alq.ALQ], device: torch.device | str = "cpu") -> None:
    """As recorded, but for groups that once had two levels equally near to a target.

    From there on these few are right if each step follows the plain reference, as all must.
    """
    record = load(name)
    _, weights = layers_and_weights(record, device)
    optimizer = kind(
        weights,
        lr=float(record["lr"]),
        betas=tuple(map(float, record["betas"])),
        eps=float(record["eps"]),
        ridge=1e-6,  # the recordings are of the published ridge
    )
    plain = references(record)
    same = [np.ones(weight.G, bool) for weight in weights]
    check(record, 0, weights, same, TOLERANCE[kind])
    for number, mode in enumerate(map(str, record["modes"][1:]), start=1):
        for k, weight in enumerate(weights):
            gradient = record[f"s{number:02d}_c{k}_grad"]
            weight.parameter.grad = torch.tensor(gradient, device=device)
        shares = [float(record[key]) for key in ("prune_top_k", "prune_M_p") if mode == "prune"]
        follow(optimizer, plain, mode, *shares, atol=TOLERANCE[kind])
        same = [groups & ~layer.tied for groups, layer in zip(same, plain, strict=True)]
        check(record, number, weights, same, TOLERANCE[kind])
    assert np.concatenate(same).mean() > 0.9
