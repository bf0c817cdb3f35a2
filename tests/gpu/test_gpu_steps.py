"""The four steps on a GPU beside those on the CPU and the plain reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import alq
from alq.extras.compiled import require_compiler
from compare import follow, numbers
from reference import Reference
from test_compiled import LR, SHARES, STEPS, follow_throughout, give_gradients, make, take
from test_golden import take_recorded_steps


def test_float64_steps_take_the_same_codes_as_on_the_host(any_device) -> None:
    """No two levels are equally near in float64, so that rounding decides nothing."""
    here, there = (make(alq.ALQ, torch.float64, device=d) for d in ("cpu", any_device))
    for number, step in enumerate(STEPS):
        for optimizer in (here, there):
            take(optimizer, number, step)
        for a, b in zip(here.weights, there.weights, strict=True):
            where = f"step {number} ({step}), {a.name}"
            assert torch.equal(a.codes, b.codes.cpu()), where
            assert torch.equal(a.mask, b.mask.cpu()), where
            torch.testing.assert_close(b.alpha.cpu(), a.alpha, rtol=1e-9, atol=1e-9, msg=where)


@pytest.mark.parametrize("ridge", [None, 1e-6])
def test_float32_steps_follow_the_plain_reference(any_device, ridge) -> None:
    """Each weight takes a level as near as any; the parameter is w_hat bit for bit."""
    follow_throughout(alq.ALQ, ridge, any_device)


@pytest.mark.parametrize("name", ["steps_a.npz", "steps_b.npz"])
def test_recorded_steps(any_device, name) -> None:
    take_recorded_steps(name, alq.ALQ, any_device)


def test_the_host_does_not_wait_for_the_device(cuda) -> None:
    """A prune step waits once, as the host must know what is left; the others never."""
    optimizer = make(alq.ALQ, device=cuda)
    for number, step in enumerate(STEPS):  # the tables of the bases are made
        take(optimizer, number, step)
    for number, step in enumerate(["basis", "coordinate", "ste", "coordinate", "prune"]):
        give_gradients(optimizer, number)
        with warnings.catch_warnings(record=True) as waits, synchronising("warn", cuda):
            warnings.simplefilter("always")
            getattr(optimizer, f"{step}_step")(*(SHARES if step == "prune" else []))
        found = [str(w.message) for w in waits if "called a synchroniz" in str(w.message)]
        assert len(found) <= (step == "prune"), (step, found)


class synchronising:
    """Within `with`, CUDA warns or raises where the host waits for it."""

    def __init__(self, mode: str, device: torch.device) -> None:
        self.mode, self.on = mode, device.type == "cuda"

    def __enter__(self) -> None:
        if self.on:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(self.mode)

    def __exit__(self, *error: object) -> None:
        if self.on:
            torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_seen(cuda) -> None:
    """What the test above relies on."""
    with pytest.raises(RuntimeError, match="synchroniz"), synchronising("error", cuda):
        torch.ones(1, device=cuda).item()


@pytest.mark.parametrize(("where", "channels"), [("cpu", 30), ("cuda", 265)])
def test_many_groups(request, where, channels) -> None:
    """Of 265 x 265 kernels there are 70 225, more than CUDA's batched solvers take at once."""
    results = []
    for place in ("cpu", request.getfixturevalue("cuda") if where == "cuda" else "cpu"):
        torch.manual_seed(0)
        layer = nn.Conv2d(channels, channels, 3).double()
        gradient = torch.randn(layer.weight.shape, dtype=torch.float64)
        weights = alq.quantize(layer.to(place), "kernelwise", max_bit=2)
        layer.weight.grad = gradient.to(place)
        alq.ALQ(weights, lr=LR).basis_step()
        results.append((weights[0].codes.cpu(), weights[0].alpha.cpu()))
    (codes, alpha), (there_codes, there_alpha) = results
    assert torch.equal(codes, there_codes)
    torch.testing.assert_close(there_alpha, alpha, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("where", "L"), [("cpu", 2), *(("cuda", L) for L in range(1, 9))])
def test_compiled_steps_follow_the_plain_reference(request, where, L) -> None:
    """By the kernels that --compile takes on the device, for each number of bases."""
    place = torch.device("cpu") if where == "cpu" else request.getfixturevalue("cuda")
    require_compiler(place)
    layer = nn.Linear(300, 12).to(place)
    weights = alq.quantize(layer, "subchannelwise", 2, L)
    optimizer = alq.CompiledALQ(weights, lr=LR, weight_decay=1e-3)
    (w,) = weights
    assert w.L == L
    plain = [Reference(*map(numbers, (w.B, w.alpha, w.mask)), lr=LR, wd=1e-3, tie=1e-5)]
    for number, step in enumerate(STEPS if where == "cuda" else ["basis", "coordinate"]):
        give_gradients(optimizer, number)
        shares = (1.0, 0.25 / L) if step == "prune" else ()
        follow(optimizer, plain, step, *shares, atol=1e-5)
