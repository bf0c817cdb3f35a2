"""`CompiledALQ` beside `ALQ`: the same steps, and what happens where nothing can be compiled."""

from __future__ import annotations

import shlex

import pytest
import torch
from torch import Tensor, nn

import alq
import lenet5
from alq.extras import compiled, compiled_steps
from alq.method.codes import level_table, pack_bits, sign_table
from alq.method.nearest import from_keys, midpoints, sort_rows
from alq.method.weight import prune

LAYERS = [  # structure, subc, max_bit, shape
    ("kernelwise", None, 5, (3, 4, 3, 3)),
    ("pixelwise", None, 3, (2, 33, 3, 3)),
    ("channelwise", None, 1, (4, 3, 3, 3)),
    ("subchannelwise", 2, 2, (5, 140)),
]
STEPS = "basis coordinate coordinate prune basis prune coordinate ste ste coordinate basis".split()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for k, (*_, shape) in enumerate(LAYERS):
            weight = torch.randn(shape, generator=generator)
            self.register_module(f"c{k}", layer := nn.Module())
            layer.weight = nn.Parameter(weight)


def make(
    kind: type[alq.ALQ], dtype: torch.dtype = torch.float32, ridge: float | None = None
) -> alq.ALQ:
    """All structures; each layer with a group of zeros, one without bits, a hole in the mask."""
    columns = list(zip(*LAYERS, strict=True))
    weights = alq.quantize(Layers().to(dtype), *map(list, columns[:3]))
    for weight in weights:
        dead = torch.zeros_like(weight.mask)
        dead[1] = True
        dead[0, 0] = weight.I > 1
        prune([weight], [dead])
    generator = torch.Generator().manual_seed(1)
    return kind(weights, lr=0.02, weight_decay=1e-3, generator=generator, ridge=ridge)


def take(optimizer: alq.ALQ, number: int, step: str) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in optimizer.weights:
        g = torch.randn(weight.parameter.shape, generator=generator)
        weight.parameter.grad = g.to(weight.parameter.dtype)
    getattr(optimizer, f"{step}_step")(*([0.7, 0.6] if step == "prune" else []))


def determined(weight: alq.MultiBitWeight) -> Tensor:
    """(G,) bool: the live bases are independent. Of others rounding chooses among the alphas."""
    B = sign_table(weight.I, weight.alpha)[weight.codes.long()] * weight.mask.unsqueeze(1)
    return torch.linalg.matrix_rank(B) == weight.mask.sum(1)


@pytest.mark.parametrize(("inline", "ridge"), [(compiled_steps.MAX_INLINE_BASES, None), (2, 1e-6)])
def test_equals_the_eager_steps(monkeypatch, inline: int, ridge: float | None) -> None:
    """Step by step from the same state, so that no rounding adds up; negative coordinates too."""
    monkeypatch.setattr(compiled_steps, "MAX_INLINE_BASES", inline)
    eager, fast = make(alq.ALQ, ridge=ridge), make(alq.CompiledALQ, ridge=ridge)
    negative = 0
    for number, step in enumerate(STEPS):
        fast.load_state_dict(eager.state_dict())
        for optimizer in (eager, fast):
            take(optimizer, number, step)
        for a, b in zip(eager.weights, fast.weights, strict=True):
            where = f"step {number} ({step}), {a.name}"
            negative += int((a.alpha < 0).sum())
            assert torch.equal(a.mask, b.mask), where
            one, other = (weight.alpha[determined(a)] for weight in (a, b))
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=where)
            torch.testing.assert_close(b.parameter, a.parameter, rtol=1e-5, atol=1e-5, msg=where)
            torch.testing.assert_close(b.w_hat(), b.parameter.detach(), rtol=0, atol=0, msg=where)
            one, other = (o.state[w.parameter] for o, w in ((eager, a), (fast, b)))
            for key in ("m", "v", "v_max", "w0", "alpha_moments"):
                torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-6, msg=where)
    assert negative


@pytest.mark.parametrize("L", range(1, 9))
def test_the_search_equals_brute_force(L: int) -> None:
    """With the tables as they are and packed; groups with fewer live bases than L, or none."""
    generator = torch.Generator().manual_seed(L)
    live = torch.arange(L) < torch.arange(L, -1, -1).unsqueeze(1)  # (L + 1, L)
    alpha = torch.rand(L + 1, L, generator=generator) * live
    x = 2 * torch.rand(L + 1, 300, generator=generator)
    keys = sort_rows(compiled_steps.level_keys.__wrapped__(alpha, live))
    levels, codes = from_keys(keys)
    tables = [(midpoints(levels), codes)]
    if L > 2:
        tables.append(compiled_steps.search_tables.__wrapped__(keys))
    table = level_table(alpha)  # a code with a bit too many has the level of one without
    nearest = (x.unsqueeze(2) - table.unsqueeze(1)).abs().min(2).values
    for middle, codes in tables:
        found = compiled_steps.nearest_positive(x, middle, codes)
        assert not (found & ~pack_bits(live).unsqueeze(1).int()).any()
        assert torch.equal((x - table.gather(1, found.long())).abs(), nearest)


def test_same_bits_each_time() -> None:
    runs = []
    for _ in range(2):
        optimizer = make(alq.CompiledALQ)
        for number, step in enumerate(STEPS):
            take(optimizer, number, step)
        runs.append(optimizer.state_dict()["weights"])
    for a, b in zip(*runs, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("codes", "alpha", "mask"))


def test_float64_and_empty_layers_take_the_eager_steps() -> None:
    both = make(alq.ALQ, torch.float64), make(alq.CompiledALQ, torch.float64)
    empty = make(alq.CompiledALQ)
    for optimizer in (*both, empty):
        for weight in optimizer.weights if optimizer is empty else optimizer.weights[:1]:
            prune([weight], [weight.mask])
        for number, step in enumerate(("basis", "coordinate", "ste")):
            take(optimizer, number, step)
    for a, b in zip(*(optimizer.weights for optimizer in both), strict=True):
        assert torch.equal(a.parameter, b.parameter)
    assert not any(weight.parameter.any() for weight in empty.weights)


def test_without_a_compiler(monkeypatch, capsys, tmp_path) -> None:
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand more")

    compiled.require_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    flags = shlex.split(f"--PRETRAIN --compile --device cpu --model_ori {tmp_path}/ori.pth")
    with pytest.raises(SystemExit) as stopped:
        lenet5.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "--compile: torch.compile does not work for cpu" in error and "g++" in error
    assert "No working C++ compiler found)" in error and error.count("\n") == 1
    monkeypatch.undo()
    compiled.require_compiler.cache_clear()
