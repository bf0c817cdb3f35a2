"""Time and memory of the quantizer's steps on the real layer shapes, beside what they compete with.

    python benchmarks/steps.py --network vgg resnet18 --bits max 2 --json steps.json

For each network, freshly sketched at its max_bit and again pruned to an average of 2 bits: the
sketch, the four steps, torch's AMSGrad on the same tensors (foreach and fused), the naive basis
step (all 2^I levels against every weight), and forward + backward of the network. The steps take
turns in one process; medians, and their ratio to foreach AMSGrad.

The scripts let the process keep its freed memory, which makes AMSGrad and the naive
step several times faster, too. These two are timed also without, in a process of their own: rows
"as torch starts", the naive step then with a whole layer's table at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import lenet5
import resnet
import vgg
from alq.machine.arithmetic import settle_cpu
from alq.method.codes import sign_table
from alq.method.loss_model import pseudo_gradient_and_hessian, update_moments
from alq.method.network import quantizable
from steps_tables import AS_STARTED, markdown

# network, picture, the entry script's defaults
NETWORKS = {
    "lenet5": (lenet5.LeNet5, (1, 28, 28), lenet5.DEFAULTS),
    "vgg": (vgg.VGG, (3, 32, 32), vgg.DEFAULTS),
    "resnet18": (torchvision.models.resnet18, (3, 224, 224), resnet.defaults("resnet18")),
    "resnet34": (torchvision.models.resnet34, (3, 224, 224), resnet.defaults("resnet34")),
}


@torch.no_grad()
def naive_basis_step(
    weight: alq.MultiBitWeight, g: Tensor, moments: Tensor, lr: float, at_once: int | None
) -> None:
    """The basis step as first written down: every weight against all 2^I levels, B as floats.

    `at_once` bounds the number of distances in memory.
    """
    betas, eps = (0.9, 0.999), 1e-8
    g = weight.grouping.to_groups(g)  # (G, n)
    w0 = weight.grouping.to_groups(weight.parameter)
    update_moments(g, *moments, betas)
    p, h = pseudo_gradient_and_hessian(moments[0], moments[2], 10, lr, betas, eps)
    t = w0 - p / h
    signs = sign_table(weight.I, t)  # (2^I, I)
    ridge = 1e-6 * torch.eye(weight.I, device=t.device)
    groups = max(1, at_once // (weight.n * len(signs))) if at_once else weight.G
    for rows in (slice(k, k + groups) for k in range(0, weight.G, groups)):
        levels = weight.alpha[rows] @ signs.T  # (G, 2^I)
        nearest = (t[rows].unsqueeze(2) - levels.unsqueeze(1)).abs().argmin(2)  # (G, n)
        B = signs[nearest].transpose(1, 2)  # (G, I, n)
        A = (B * h[rows].unsqueeze(1)) @ B.transpose(1, 2) + ridge
        b = B @ (h[rows] * w0[rows] - p[rows]).unsqueeze(2)
        torch.linalg.solve_ex(A, b)[0].transpose(1, 2) @ B


def times(
    steps: dict[str, Callable[[], object]], repeats: int, sync: Callable[[], None], clock: Callable
) -> dict[str, float]:
    """Median seconds of each step; they take turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            sync()
            start = clock()
            step()
            sync()
            seconds[name].append(clock() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Largest memory that `step` holds on top of what there was before it."""
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
    """torch's two ways, each on tensors of its own with the gradients of `tensors`."""
    copies = [tensor.clone() for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.grad = tensor.grad.clone()
    return {
        "amsgrad": torch.optim.Adam(tensors, amsgrad=True, foreach=True).step,
        "amsgrad fused": torch.optim.Adam(copies, amsgrad=True, fused=True).step,
    }


def naive_step(weights: list[alq.MultiBitWeight], at_once: int | None) -> Callable[[], None]:
    """`naive_basis_step` of all of them, with moments of its own."""
    moments = [weight.alpha.new_zeros(3, weight.G, weight.n) for weight in weights]

    def step() -> None:
        for weight, own in zip(weights, moments, strict=True):
            naive_basis_step(weight, weight.parameter.grad, own, 1e-3, at_once)

    return step


def steps_of(optimizer: alq.ALQ) -> dict[str, Callable[[], None]]:
    return {
        "basis": optimizer.basis_step,
        "ste": optimizer.ste_step,
        "coordinate": optimizer.coordinate_step,
        "prune": partial(optimizer.prune_step, 1e-3, 1e-3),
    }


def timing(args: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """`times` with the flags' device, threads and clock: of steps and the number of repeats."""
    if args.threads:
        torch.set_num_threads(args.threads)
    sync = torch.cuda.synchronize if torch.device(args.device).type == "cuda" else lambda: None
    clock = time.process_time if args.cpu_time else time.perf_counter
    return partial(times, sync=sync, clock=clock)


def network(name: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], list]]:
    """The network as the scripts hold it, and the function that sketches it."""
    make, _, defaults = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(args.device, memory_format=torch.channels_last)
    structure, subc, max_bit = (defaults[key] for key in ("structure", "subc", "max_bit"))
    return model, partial(alq.quantize, model, structure, subc, *max_bit)


def give_gradients(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        tensor.grad = 1e-2 * torch.randn_like(tensor)
    return tensors


def measure_as_torch_starts(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of what the steps are compared with, without `settle_cpu`.

    To be called in a new process: what it did before decides what memory it keeps.
    """
    seconds_of = timing(args)
    model, sketch = network(name, args)
    tensors = give_gradients([p.detach().clone() for p in quantizable(model).values()])
    seconds = seconds_of({AS_STARTED["amsgrad"]: amsgrad_steps(tensors)["amsgrad"]}, args.repeats)
    if args.naive:
        weights = sketch()
        give_gradients([weight.parameter for weight in weights])
        seconds |= seconds_of({AS_STARTED["basis naive"]: naive_step(weights, None)}, 1)
    return seconds


def measure(name: str, bits: str, args: argparse.Namespace) -> dict:
    """All figures of one network at one average bitwidth."""
    _, picture, defaults = NETWORKS[name]
    batch, (max_bit,) = defaults["batch_size"], defaults["max_bit"]
    device = torch.device(args.device)
    seconds_of = timing(args)
    model, sketch = network(name, args)

    x = torch.randn(min(batch, args.pictures), *picture, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def forward_backward() -> None:
        model.zero_grad()
        model(x).square().sum().backward()

    seconds = seconds_of({"forward + backward": forward_backward, "sketch": sketch}, 1)
    seconds["forward + backward"] *= batch / len(x)
    plain = give_gradients([p.detach().clone() for p in quantizable(model).values()])
    weights = sketch()
    optimizer = alq.ALQ(weights, lr=1e-3)
    for weight, tensor in zip(weights, plain, strict=True):
        weight.parameter.grad = tensor.grad.clone()
    if bits != "max":
        optimizer.prune_step(1.0, 1 - float(bits) / alq.average_bitwidth(weights))
    steps = {**amsgrad_steps(plain), **steps_of(optimizer)}
    if args.compile:
        compiled = steps_of(alq.CompiledALQ(weights, lr=1e-3))
        steps |= {f"{name} compiled": step for name, step in compiled.items()}
    bitwidth = alq.average_bitwidth(weights)
    seconds |= seconds_of(steps, args.repeats)
    if args.naive:
        seconds |= seconds_of({"basis naive": naive_step(weights, at_once=2**24)}, 1)  # 64 MB
    largest = 4 * max(weight.parameter.numel() for weight in weights)
    return {
        "network": name,
        "max_bit": max_bit,
        "bitwidth": bitwidth,
        "weights": sum(weight.parameter.numel() for weight in weights),
        "seconds": seconds,
        "peak memory in largest layers": {
            step: peak_bytes(steps[step], device) / largest
            for step in steps
            if step != "amsgrad fused"
        },
    }


def machine(device: torch.device) -> str:
    """What a figure depends on, for its reader."""
    return (
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}"
    )


def show(row: dict) -> None:
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
    basis, network = row["seconds"]["basis"], row["seconds"]["forward + backward"]
    print(f"the basis step's share of a training step: {100 * basis / (basis + network):.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=["max", "2"], help="'max' or an average")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--compile", action="store_true", help="also the steps of CompiledALQ")
    parser.add_argument("--naive", action="store_true", help="also the naive basis step (slow)")
    parser.add_argument(
        "--pictures", type=int, default=128,
        help="forward + backward on at most so many, scaled to the batch size (128)",
    )  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="JSON", help="print README's tables, exit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.table:
        print(*markdown(json.loads(args.table.read_text())), sep="\n\n")
        return
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        started = list(pool.map(partial(measure_as_torch_starts, args=args), args.network))
    settle_cpu()
    print(machine(torch.device(args.device)))
    rows = []
    for name, as_torch_starts in zip(args.network, started, strict=True):
        for bits in args.bits:
            rows.append(measure(name, bits, args))
            rows[-1]["seconds"] |= as_torch_starts
            show(rows[-1])
    if args.json:
        where = machine(torch.device(args.device))
        content = {"machine": where, "arguments": sys.argv[1:], "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
