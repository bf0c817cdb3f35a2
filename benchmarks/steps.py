"""Time and memory of the quantizer's steps on the real layer shapes, beside what they compete with.

    python benchmarks/steps.py --threads 2 --repeats 9 --naive --compile --json steps.json
    python benchmarks/steps.py --table steps.json

For each network, freshly sketched at its max_bit and again pruned to an average of 2 bits: the
sketch, the four steps, torch's AMSGrad on the same tensors (foreach and fused), and the naive basis
step (all 2^I levels against every weight). The steps take turns in one process; medians, and their
ratio to foreach AMSGrad.

The scripts let the process keep its freed memory, which makes AMSGrad and the naive
step several times faster, too. These two are timed also without, in a process of their own: rows
"as torch starts", the naive step then with a whole layer's table at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.method.codes import sign_table
from alq.method.loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from alq.method.network import quantizable
from networks import NETWORKS
from performance_tables import AS_STARTED, steps_tables
from timing import (
    add_flags,
    give_gradients,
    network,
    prune_to,
    read_rows,
    settle,
    timing,
    write_figures,
)


@torch.no_grad()
def naive_basis_step(
    weight: alq.MultiBitWeight, g: Tensor, moments: Tensor, lr: float, at_once: int | None
) -> None:
    """Take the basis step as first written down: all 2^I levels for every weight, B as floats.

    `at_once` bounds the number of distances in memory.
    """
    amsgrad = AMSGrad(lr, (0.9, 0.999), 1e-8)
    g = weight.grouping.to_groups(g)  # (G, n)
    w0 = weight.grouping.to_groups(weight.parameter)
    update_moments(g, *moments, amsgrad.betas)
    p, h = pseudo_gradient_and_hessian(moments[0], moments[2], *amsgrad.at(10))
    t = w0 - p / h
    signs = sign_table(weight.I, t.dtype, t.device)  # (2^I, I)
    ridge = 1e-6 * torch.eye(weight.I, device=t.device)
    groups = max(1, at_once // (weight.n * len(signs))) if at_once else weight.G
    for rows in (slice(k, k + groups) for k in range(0, weight.G, groups)):
        levels = weight.alpha[rows] @ signs.T  # (G, 2^I)
        nearest = (t[rows].unsqueeze(2) - levels.unsqueeze(1)).abs().argmin(2)  # (G, n)
        B = signs[nearest].transpose(1, 2)  # (G, I, n)
        A = (B * h[rows].unsqueeze(1)) @ B.transpose(1, 2) + ridge
        b = B @ (h[rows] * w0[rows] - p[rows]).unsqueeze(2)
        torch.linalg.solve_ex(A, b)[0].transpose(1, 2) @ B


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the largest memory that `step` holds on top of what there was before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def amsgrad_steps(tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return torch's two ways, each on tensors of its own with the gradients of `tensors`."""
    copies = [tensor.clone() for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.grad = tensor.grad.clone()
    return {
        "amsgrad": torch.optim.Adam(tensors, amsgrad=True, foreach=True).step,
        "amsgrad fused": torch.optim.Adam(copies, amsgrad=True, fused=True).step,
    }


def naive_step(weights: list[alq.MultiBitWeight], at_once: int | None) -> Callable[[], None]:
    """Return `naive_basis_step` of all of them, with moments of its own."""
    moments = [weight.alpha.new_zeros(3, weight.G, weight.n) for weight in weights]

    def step() -> None:
        for weight, own in zip(weights, moments, strict=True):
            naive_basis_step(weight, weight.parameter.grad, own, 1e-3, at_once)

    return step


def steps_of(optimizer: alq.ALQ) -> dict[str, Callable[[], None]]:
    """Return the four steps by name."""
    return {
        "basis": optimizer.basis_step,
        "ste": optimizer.ste_step,
        "coordinate": optimizer.coordinate_step,
        "prune": partial(optimizer.prune_step, 1e-3, 1e-3),
    }


def measure_as_torch_starts(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of what the steps are compared with, without `settle_cpu`.

    To be called in a new process: what it did before decides what memory it keeps.
    """
    seconds_of = timing(args)
    model, sketch = network(name, args.device)
    tensors = give_gradients([p.detach().clone() for p in quantizable(model).values()])
    seconds = seconds_of({AS_STARTED["amsgrad"]: amsgrad_steps(tensors)["amsgrad"]}, args.repeats)
    if args.naive:
        weights = sketch()
        give_gradients([weight.parameter for weight in weights])
        seconds |= seconds_of({AS_STARTED["basis naive"]: naive_step(weights, None)}, 1)
    return seconds


def measure(name: str, bits: str, args: argparse.Namespace) -> dict:
    """Return all figures of one network at one average bitwidth."""
    seconds_of = timing(args)
    model, sketch = network(name, args.device)
    seconds = seconds_of({"sketch": sketch}, 1)
    plain = give_gradients([p.detach().clone() for p in quantizable(model).values()])
    weights = sketch()
    optimizer = alq.ALQ(weights, lr=1e-3)
    for weight, tensor in zip(weights, plain, strict=True):
        weight.parameter.grad = tensor.grad.clone()
    prune_to(bits, optimizer)
    steps = {**amsgrad_steps(plain), **steps_of(optimizer)}
    if args.compile:
        # Of layers of its own: two optimizers would take them from each other at every step.
        twins = deepcopy(weights)
        for twin, weight in zip(twins, weights, strict=True):
            twin.parameter.grad = weight.parameter.grad
        compiled = steps_of(alq.CompiledALQ(twins, lr=1e-3))
        steps |= {f"{name} compiled": step for name, step in compiled.items()}
    bitwidth = alq.average_bitwidth(weights)
    seconds |= seconds_of(steps, args.repeats)
    if args.naive:
        seconds |= seconds_of({"basis naive": naive_step(weights, at_once=2**24)}, 1)  # 64 MB
    largest = 4 * max(weight.parameter.numel() for weight in weights)
    return {
        "network": name,
        "max_bit": NETWORKS[name].default_flags().max_bit[0],
        "bitwidth": bitwidth,
        "weights": sum(weight.parameter.numel() for weight in weights),
        "seconds": seconds,
        "peak memory in largest layers": {
            step: peak_bytes(steps[step], torch.device(args.device)) / largest
            for step in steps
            if step != "amsgrad fused"
        },
    }


def show(row: dict) -> None:
    """Print one network's figures."""
    print(
        f"\n{row['network']}: {row['weights'] / 1e6:.2f} M weights, max_bit {row['max_bit']}, "
        f"{row['bitwidth']:.2f} bits on average"
    )
    floor = row["seconds"]["amsgrad"]
    print(f"{'':20}{'ms':>10}{'x amsgrad':>11}{'peak memory':>13}")
    for step, seconds in row["seconds"].items():
        peak = row["peak memory in largest layers"].get(step)
        memory = "" if peak is None else f"{peak:13.1f}"
        print(f"{step:20}{1e3 * seconds:10.2f}{seconds / floor:11.1f}{memory}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, repeats=7)
    parser.add_argument("--naive", action="store_true", help="also the naive basis step (slow)")
    args = parser.parse_args()
    if args.table:
        tables = steps_tables(read_rows(args.table))
        print(*(f"{title}\n\n{table}" for title, table in tables.items()), sep="\n\n")
        return
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        started = list(pool.map(partial(measure_as_torch_starts, args=args), args.network))
    settle(args)
    rows = []
    for name, as_torch_starts in zip(args.network, started, strict=True):
        for bits in args.bits:
            rows.append(measure(name, bits, args))
            rows[-1]["seconds"] |= as_torch_starts
            show(rows[-1])
    if args.json:
        write_figures(args.json, torch.device(args.device), rows=rows)


if __name__ == "__main__":
    main()
