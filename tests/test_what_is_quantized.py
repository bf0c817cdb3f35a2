"""Which parameters of which layers are quantized; what is not, and groups that do not pay."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import alq
from alq.method.network import quantizable
from alq.method.structures import default_subc

LINEAR = ["weight"]
LAYERS = {  # a layer, and the parameters of it that are quantized
    "lstm": (
        nn.LSTM(8, 8, 2, bidirectional=True, proj_size=4),
        [
            f"weight_{part}_l{layer}{direction}"
            for layer in (0, 1)
            for direction in ("", "_reverse")
            for part in ("ih", "hh", "hr")
        ],
    ),
    "gru": (nn.GRU(8, 8), ["weight_ih_l0", "weight_hh_l0"]),
    "rnn cell": (nn.RNNCell(8, 8), ["weight_ih", "weight_hh"]),
    "attention": (nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj.weight"]),
    "attention of two sources": (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "embedding": (nn.Embedding(9, 8), LINEAR),
    "embedding bag": (nn.EmbeddingBag(9, 8), LINEAR),
    "bilinear": (nn.Bilinear(4, 4, 8), LINEAR),
    "linear": (nn.Linear(8, 8), LINEAR),
    "layer norm": (nn.LayerNorm((2, 3)), []),
    "rms norm": (nn.RMSNorm((2, 3)), []),
    "prelu": (nn.PReLU(3), []),
    "weight norm": (weight_norm(nn.Linear(8, 8)), []),
    "spectral norm": (spectral_norm(nn.Linear(8, 8)), []),
    "pruned by torch": (torch_prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), []),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_taken_of_a_layer(name: str) -> None:
    layer, expected = LAYERS[name]
    assert list(quantizable(layer)) == expected


def run(name: str, layer: nn.Module) -> Tensor:
    """A number that depends on all the layer's parameters."""
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    if name in ("lstm", "gru"):
        return layer(x)[0].square().sum()
    if name == "rnn cell":
        return layer(x[0], x[1]).square().sum()
    if name.startswith("attention"):
        k, v = (x, x) if name == "attention" else (x[..., :4], x[..., :6])
        return layer(x, k, v)[0].square().sum()
    if name == "bilinear":
        return layer(x[0, :, :4], x[0, :, 4:]).square().sum()
    if name.startswith("embedding"):
        return layer(torch.arange(9).view(3, 3)).square().sum()
    return layer(x).square().sum()


@pytest.mark.filterwarnings("ignore:.*more than the .* of float32")
@pytest.mark.parametrize("name", [name for name, (_, taken) in LAYERS.items() if taken])
def test_steps_and_the_packed_file(name: str, tmp_path) -> None:
    """Every kind trains by all steps, and comes back from its file, bit for bit."""
    layer, taken = LAYERS[name]
    weights = alq.quantize(layer, max_bit=2)
    optimizer = alq.ALQ(weights, lr=0.01)
    steps = [optimizer.basis_step, optimizer.coordinate_step, optimizer.ste_step]
    for step in [*steps, lambda: optimizer.prune_step(1.0, 0.2)]:
        layer.zero_grad()
        run(name, layer).backward()
        step()
    assert [weight.name for weight in weights] == taken
    for weight in weights:
        assert torch.equal(weight.parameter, weight.w_hat())
    alq.save_packed(tmp_path / "net.alq", layer, weights)
    before = run(name, layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    alq.load_packed(tmp_path / "net.alq", layer)
    assert torch.equal(run(name, layer), before)


@pytest.mark.parametrize(
    ("row", "subc"),
    [(1, 1), (64, 1), (512, 1), (521, 1), (800, 2), (1042, 2), (3027, 3), (8192, 16), (100003, 1)],
)
def test_pieces_of_a_row_are_long_enough_to_pay(row: int, subc: int) -> None:
    assert default_subc(row) == subc


def test_a_layer_of_prime_width_is_smaller_than_in_float32() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (weight,) = alq.quantize(nn.Linear(521, 64))
    assert weight.n == 521
    assert weight.storage_bytes < 4 * weight.grouping.numel / 4


def test_groups_that_do_not_pay_are_told() -> None:
    with pytest.warns(UserWarning, match=r"weight: its groups of 1 weights take .* larger groups"):
        alq.quantize(nn.Linear(4, 8), subc=4)
