"""The quantizer computes in full float32, whatever precision its caller has allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import alq
from alq.machine.arithmetic import float32_products


def state() -> list[str]:
    """What precision matrix products may have, by torch's older and newer interface."""
    found = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    try:
        return [torch.get_float32_matmul_precision(), *found]
    except RuntimeError:  # the newer one was used
        return found


@contextmanager
def older_interface() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    assert state() == ["medium", "tf32", "bf16"]
    torch.set_float32_matmul_precision("highest")


@contextmanager
def newer_interface() -> Iterator[None]:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    assert state() == ["tf32", "ieee"]
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def all_steps(around: Callable) -> list[torch.Tensor]:
    """Sketch a layer and take the four steps within `around`; what they leave."""
    torch.manual_seed(0)
    model = nn.Linear(40, 12)
    with around():
        weights = alq.quantize(model, max_bit=4)
        quantizer = alq.ALQ(weights, generator=torch.Generator().manual_seed(0))
        prune = lambda: quantizer.prune_step(1.0, 0.2)  # noqa: E731
        steps = [quantizer.basis_step, quantizer.coordinate_step, prune, quantizer.ste_step]
        for step in steps * 2:
            model.weight.grad = torch.randn(model.weight.shape)
            step()
    (w,) = weights
    return [w.codes, w.alpha, w.mask, model.weight.detach().clone()]


@pytest.mark.parametrize("around", [autocast, older_interface, newer_interface])
def test_the_callers_precision_changes_nothing(around) -> None:
    torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, all_steps(around), all_steps(torch.enable_grad)))


def test_products_are_not_autocast() -> None:
    x = torch.randn(5, 5)
    with autocast():
        assert (x @ x).dtype == torch.bfloat16
        with float32_products(x.device):
            assert (
                x @ x
            ).dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        assert (x @ x).dtype == torch.bfloat16
