"""`CompiledALQ` beside `ALQ`: the same steps, and what happens where nothing can be compiled."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import alq
import lenet5
from alq.extras import compiled, compiled_steps
from alq.method.codes import level_table, pack_bits
from alq.method.nearest import from_keys, midpoints, sort_rows
from alq.method.weight import prune
from compare import follow, numbers
from reference import Reference

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # structure, subc, max_bit, shape
    ("kernelwise", None, 4, (3, 4, 3, 3)),
    ("pixelwise", None, 3, (2, 33, 3, 3)),
    ("channelwise", None, 1, (4, 3, 3, 3)),
    ("subchannelwise", 2, 2, (5, 140)),
]
STEPS = "basis coordinate coordinate prune basis prune coordinate ste ste coordinate basis".split()
SHARES = 1.0, 0.4  # of a prune step
LR = 0.2  # large enough that coordinates turn negative


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for k, (*_, shape) in enumerate(LAYERS):
            weight = torch.randn(shape, generator=generator)
            self.register_module(f"c{k}", layer := nn.Module())
            layer.weight = nn.Parameter(weight)


def make(
    kind: type[alq.ALQ], dtype: torch.dtype = torch.float32, ridge: float | None = None,
    device: torch.device | str = "cpu",
) -> alq.ALQ:  # fmt: skip
    """All structures; each layer with a group of zeros, one without bits, a hole in the mask."""
    columns = list(zip(*LAYERS, strict=True))
    weights = alq.quantize(Layers().to(device, dtype), *map(list, columns[:3]))
    for weight in weights:
        dead = torch.zeros_like(weight.mask)
        dead[1] = True
        dead[0, 0] = weight.I > 1
        prune([weight], [dead])
    generator = torch.Generator().manual_seed(1)
    return kind(weights, lr=LR, weight_decay=1e-3, generator=generator, ridge=ridge)


def give_gradients(optimizer: alq.ALQ, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in optimizer.weights:
        g = torch.randn(weight.parameter.shape, generator=generator)
        weight.parameter.grad = g.to(weight.parameter.device, weight.parameter.dtype)


def take(optimizer: alq.ALQ, number: int, step: str) -> None:
    give_gradients(optimizer, number)
    getattr(optimizer, f"{step}_step")(*(SHARES if step == "prune" else []))


def assert_same_moments(optimizer: alq.ALQ, references: list[Reference], where: str) -> None:
    for weight, reference in zip(optimizer.weights, references, strict=True):
        state = optimizer.state[weight.parameter]
        pairs = {key: (state[key], getattr(reference, key)) for key in ("m", "v", "v_max", "w0")}
        if state["alpha_moments"] is not None:  # else made when they are asked for
            theirs = (reference.m_a, reference.v_a, reference.v_a_max)
            pairs |= dict(enumerate(zip(state["alpha_moments"], theirs, strict=True)))
        for key, (own, expected) in pairs.items():
            assert (own is None) == (expected is None), where
            if own is not None:
                np.testing.assert_allclose(
                    numbers(own), expected, rtol=1e-5, atol=1e-5, err_msg=f"{where}, {key}"
                )


@pytest.mark.parametrize("ridge", [None, 1e-6])
def test_float32_steps_follow_the_plain_reference(ridge: float | None) -> None:
    follow_throughout(alq.ALQ, ridge)


@pytest.fixture
def tables(monkeypatch, compiler) -> None:
    """Kernels that search in one pass up to two bases, and in tables made before from there on.

    The recorded steps are compiled to search in one pass up to six bases, with the other ridge.
    """
    monkeypatch.setattr(compiled_steps, "MAX_INLINE_BASES", 2)


def test_compiled_steps_follow_the_plain_reference(tables) -> None:
    follow_throughout(alq.CompiledALQ, None)


def follow_throughout(
    kind: type[alq.ALQ], ridge: float | None, device: torch.device | str = "cpu"
) -> None:
    optimizer = make(kind, ridge=ridge, device=device)
    references = [
        Reference(*map(numbers, (w.B, w.alpha, w.mask)), lr=LR, wd=1e-3, tie=1e-5, ridge=ridge)
        for w in optimizer.weights
    ]
    negative = 0
    for number, step in enumerate(STEPS):
        give_gradients(optimizer, number)
        follow(optimizer, references, step, *(SHARES if step == "prune" else []), atol=1e-5)
        assert_same_moments(optimizer, references, f"step {number} ({step})")
        negative += sum(int((weight.alpha < 0).sum()) for weight in optimizer.weights)
    assert negative  # of which the next basis step made positive ones


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
        distance = (x - table.gather(1, found.long())).abs()
        torch.testing.assert_close(distance, nearest, atol=1e-6, rtol=0)  # midpoints are rounded


def test_same_bits_each_time(tables) -> None:
    runs = []
    for _ in range(2):
        optimizer = make(alq.CompiledALQ)
        for number, step in enumerate(STEPS):
            take(optimizer, number, step)
        runs.append(optimizer.state_dict()["weights"])
    for a, b in zip(*runs, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("codes", "alpha", "mask"))


def test_float64_and_empty_layers_take_the_eager_steps(compiler) -> None:
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


COMPILE = "--PRETRAIN --compile --device cpu --model_ori {}/ori.pth --model {}/model.pth"


def test_without_a_compiler(monkeypatch, capsys, tmp_path) -> None:
    """The quantizer's kernels are asked for: torch may be able to compile others all the same."""

    def fail(*_) -> None:
        raise RuntimeError("C++ compile error\nand more")

    compiled.require_compiler.cache_clear()
    monkeypatch.setattr(compiled_steps, "rebuild", fail)
    with pytest.raises(SystemExit) as stopped:
        lenet5.main(shlex.split(COMPILE.format(tmp_path, tmp_path)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "--compile: torch.compile does not work for cpu" in error and "g++" in error
    assert "C++ compile error)" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_compiler(tmp_path) -> None:
    own = {"CXX": str(tmp_path / "absent"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, ROOT / "lenet5.py", *shlex.split(COMPILE.format(tmp_path, tmp_path))],
        env={**os.environ, **own}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--compile: torch.compile does not work for cpu" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "No working C++ compiler" in done.stderr
    assert not list(tmp_path.glob("*.pth"))
