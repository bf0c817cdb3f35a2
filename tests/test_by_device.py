"""What a run chooses by its device, and what it asks of CUDA: all of it seen without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import lenet5
from alq.command import resume
from alq.command.run import fill_in, set_arithmetic
from alq.data.loaders import memory_format
from alq.machine import arithmetic, processes
from alq.machine.arithmetic import settle_sums


@pytest.fixture
def compiler_settings(monkeypatch):
    """Those of torch.compile and of cuBLAS, which are put back."""
    config = pytest.importorskip("torch._inductor.config")
    with config.patch(dynamic_scale_rblock=True, deterministic=False):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        yield config
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_sums_in_one_order_let_no_timing_choose(compiler_settings) -> None:
    settle_sums(compiled=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert compiler_settings.dynamic_scale_rblock
    settle_sums(compiled=True)
    assert not compiler_settings.dynamic_scale_rblock and compiler_settings.deterministic


@pytest.mark.parametrize(
    ("flags", "launched", "settled"),
    [([], False, False), (["--deterministic"], False, True), ([], True, True)],
)
def test_runs_that_promise_equal_bits_settle_their_sums(
    compiler_settings, monkeypatch, flags, launched, settled
) -> None:
    """With --deterministic, and under torchrun, whose processes must not differ."""
    monkeypatch.setattr(processes, "launched", lambda: launched)
    args = lenet5.command_line().parse_args(["--compile", "--device", "cpu", *flags])
    fill_in(args)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        set_arithmetic(args)
        assert compiler_settings.deterministic is settled
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is settled
        assert torch.are_deterministic_algorithms_enabled() is bool(flags)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(
    ("device", "flags", "channels_last", "benchmark"),
    [
        ("cpu", [], True, False),
        ("cpu", ["--no-channels_last", "--cudnn_benchmark"], False, True),
        ("cuda", [], False, True),
        ("cuda", ["--tf32"], True, True),
        ("cuda", ["--amp", "--deterministic"], True, False),
        ("cuda", ["--amp", "--no-channels_last", "--no-cudnn_benchmark"], False, False),
    ],
)
def test_layout_and_kernels_by_device_and_precision(
    device, flags, channels_last, benchmark
) -> None:
    args = lenet5.command_line().parse_args(["--device", "cpu", *flags])
    args.device = torch.device(device)
    fill_in(args)
    assert (args.channels_last, args.cudnn_benchmark) == (channels_last, benchmark)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert memory_format(args) == expected


def test_network_and_pictures_have_the_layout(sliver) -> None:
    for flag, layout in (("", torch.channels_last), ("no-", torch.contiguous_format)):
        args = lenet5.command_line().parse_args([f"--{flag}channels_last", "--val_size", "100"])
        data, _ = lenet5.RECIPE.load_data(args, None)
        for loader in (data.train, data.val, data.test):
            x, _ = next(iter(loader))
            assert x.is_contiguous(memory_format=layout)


def test_only_the_generator_of_the_training_device_is_kept(monkeypatch) -> None:
    """A forked process may touch no GPU, and cuda:1 is not the first."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device))
    assert list(resume.generator_states(torch.device("cpu"))) == ["cpu"]
    assert list(resume.generator_states(torch.device("cuda", 1))) == ["cpu", "cuda"]
    assert asked == [torch.device("cuda", 1)]


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch) -> None:
    alone = processes.own_cores()
    assert alone >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert processes.own_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert processes.own_cores() == 1


@pytest.mark.parametrize("groups", [0, 1, 7, 8, 20])
def test_systems_are_solved_some_at_a_time(monkeypatch, groups) -> None:
    """CUDA refuses more than 65 535; a singular one of them spoils no other."""
    A, b = torch.randn(groups, 3, 3, dtype=torch.float64), torch.randn(groups, 3).double()
    A[2:3] = 0
    at_once = arithmetic.solve(A, b)
    monkeypatch.setattr(arithmetic, "MOST_SYSTEMS", 7)
    solved = arithmetic.solve(A, b)
    assert solved.shape == (groups, 3)
    torch.testing.assert_close(solved, at_once, equal_nan=True)
    regular = torch.ones(groups, dtype=torch.bool)
    regular[2:3] = False
    back = (A @ solved.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(back[regular], b[regular])
