"""The recorded steps (SPEC section 8): five small layers through a sequence of all modes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import alq

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


def layers_and_weights(record: dict) -> tuple[Layers, list[alq.MultiBitWeight]]:
    count = len(record["max_bits"])
    model = Layers([torch.from_numpy(record[f"c{k}_w0"].copy()) for k in range(count)])
    weights = alq.quantize(
        model,
        structure=[str(s) for s in record["structures"]],
        subc=[int(s) for s in record["subchannels"]],
        max_bit=[int(b) for b in record["max_bits"]],
    )
    return model, weights


def check(
    record: dict, step: int, weights: list[alq.MultiBitWeight], mode: str, tolerance: float
) -> None:
    for k, weight in enumerate(weights):
        where = f"step {step} ({mode}), layer {k} ({weight.structure})"
        expected = {key: record[f"s{step:02d}_c{k}_{key}"] for key in ("B", "alpha", "mask", "w")}
        atol = tolerance * np.abs(record[f"c{k}_w0"]).max()
        np.testing.assert_array_equal(weight.mask.numpy(), expected["mask"], err_msg=where)
        np.testing.assert_allclose(weight.alpha.numpy(), expected["alpha"], 0, atol, err_msg=where)
        np.testing.assert_array_equal(weight.B.numpy(), expected["B"], err_msg=where)
        np.testing.assert_allclose(weight.w_hat().numpy(), expected["w"], 0, atol, err_msg=where)
        np.testing.assert_allclose(
            weight.parameter.detach().numpy(), expected["w"], 0, atol, err_msg=where
        )


@pytest.mark.parametrize("kind", [alq.ALQ, alq.CompiledALQ])
@pytest.mark.parametrize("name", ["steps_a.npz", "steps_b.npz"])
def test_recorded_steps(name: str, kind: type[alq.ALQ]) -> None:
    record = load(name)
    _, weights = layers_and_weights(record)
    optimizer = kind(
        weights,
        lr=float(record["lr"]),
        betas=tuple(map(float, record["betas"])),
        eps=float(record["eps"]),
    )
    steps = {
        "basis": optimizer.basis_step,
        "coordinate": optimizer.coordinate_step,
        "ste": optimizer.ste_step,
        "prune": lambda: optimizer.prune_step(
            float(record["prune_top_k"]), float(record["prune_M_p"])
        ),
    }
    first, *modes = map(str, record["modes"])
    check(record, 0, weights, first, TOLERANCE[kind])
    for number, mode in enumerate(modes, start=1):
        for k, weight in enumerate(weights):
            weight.parameter.grad = torch.from_numpy(record[f"s{number:02d}_c{k}_grad"].copy())
        steps[mode]()
        check(record, number, weights, mode, TOLERANCE[kind])
