"""The ridge of the solve for alpha: what has no gradient stays; the scale of the loss is free."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import alq
from alq.method.codes import level_table


def test_embedding_rows_that_no_batch_holds_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(30, 16)
    weights = alq.quantize(model, max_bit=4)
    optimizer = alq.ALQ(weights, lr=0.01)
    before = model.weight.detach().clone()
    seen = torch.arange(10)
    for step in [optimizer.basis_step] * 20 + [optimizer.ste_step] * 5:
        optimizer.zero_grad()
        model(seen).square().mean().backward()
        step()
    torch.testing.assert_close(model.weight[10:], before[10:], rtol=1e-4, atol=1e-5)
    assert (model.weight[:10] - before[:10]).norm() > 0.1  # the others have learned


def levels_after(scale: float) -> list[torch.Tensor]:
    """The sorted levels of every group after steps on a loss, and with an eps, times `scale`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3))
    weights = alq.quantize(model, max_bit=3)
    optimizer = alq.ALQ(weights, lr=0.01, eps=1e-8 * scale)
    x, y = torch.randn(64, 24), torch.randn(64, 3)
    steps = [optimizer.basis_step] * 4 + [optimizer.coordinate_step] * 2 + [optimizer.ste_step] * 2
    for step in steps:
        optimizer.zero_grad()
        (scale * F.mse_loss(model(x), y)).backward()
        step()
    return [level_table(w.live_first(w.alpha)).sort(1).values for w in weights]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    """Few enough steps that rounding, which differs with the scale, has no time to grow."""
    for own, plain in zip(levels_after(scale), levels_after(1.0), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-3)


class Times(nn.Module):
    """Multiplies by a constant: a network whose outputs, and with them the loss, are small."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def r2_of_quantized_regression(scale: float, ridge: float | None) -> float:
    """R2 after basis steps, with targets of size `scale` under MSE; full precision has 0.98."""
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    y = scale * (x[:, :1] * x[:, 1:2] + x[:, 2:3])
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1), Times(scale))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for k in range(400):
        adam.param_groups[0]["lr"] = 1e-2 * 0.985**k
        adam.zero_grad()
        (F.mse_loss(model(x), y) / scale**2).backward()
        adam.step()
    weights = alq.quantize(model, max_bit=4)
    biases = torch.optim.Adam([p for p in model.parameters() if p.dim() == 1])
    optimizer = alq.ALQ(weights, ridge=ridge)
    for k in range(150):
        optimizer.param_groups[0]["lr"] = biases.param_groups[0]["lr"] = 1e-3 * 0.97**k
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.basis_step()
        biases.step()
    return float(1 - F.mse_loss(model(x), y).detach() / y.var(unbiased=False))


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_a_regression_with_small_outputs_is_learned(scale: float) -> None:
    assert r2_of_quantized_regression(scale, None) > 0.95
    assert r2_of_quantized_regression(scale, 1e-6) < 0.5  # the published ridge pulls alpha to 0
