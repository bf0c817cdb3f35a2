"""Time and memory of the quantizer's steps on the real layer shapes, beside what they compete with.

    python benchmarks/steps.py --network vgg resnet18 --bits max 2 --json steps.json

For each network, freshly sketched at its max_bit and again pruned to an average of 2 bits: the
sketch, the four steps, torch's AMSGrad on the same tensors (foreach and fused), the naive basis
step (all 2^I levels against every weight), and forward + backward of the network. The steps take
turns in one process; medians, and their ratio to foreach AMSGrad.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import lenet5
import resnet
import vgg
from alq.codes import sign_table
from alq.cpu import settle_cpu
from alq.loss_model import pseudo_gradient_and_hessian, update_moments
from alq.network import quantizable

STEPS = ("basis", "ste", "coordinate", "prune")
# network, picture, the entry script's defaults
NETWORKS = {
    "lenet5": (lenet5.LeNet5, (1, 28, 28), lenet5.DEFAULTS),
    "vgg": (vgg.VGG, (3, 32, 32), vgg.DEFAULTS),
    "resnet18": (torchvision.models.resnet18, (3, 224, 224), resnet.defaults("resnet18")),
    "resnet34": (torchvision.models.resnet34, (3, 224, 224), resnet.defaults("resnet34")),
}


@torch.no_grad()
def naive_basis_step(weight: alq.MultiBitWeight, g: Tensor, moments: Tensor, lr: float) -> None:
    """The basis step as first written down: every weight against all 2^I levels, B as floats."""
    betas, eps = (0.9, 0.999), 1e-8
    g = weight.grouping.to_groups(g)  # (G, n)
    w0 = weight.grouping.to_groups(weight.parameter)
    update_moments(g, *moments, betas)
    p, h = pseudo_gradient_and_hessian(moments[0], moments[2], 10, lr, betas, eps)
    t = w0 - p / h
    signs = sign_table(weight.I, t)  # (2^I, I)
    ridge = 1e-6 * torch.eye(weight.I, device=t.device)
    groups = max(1, 2**24 // (weight.n * len(signs)))  # 64 MB of distances at a time
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


def naive_step(weights: list[alq.MultiBitWeight]) -> Callable[[], None]:
    """`naive_basis_step` of all of them, with moments of its own."""
    moments = [weight.alpha.new_zeros(3, weight.G, weight.n) for weight in weights]

    def step() -> None:
        for weight, own in zip(weights, moments, strict=True):
            naive_basis_step(weight, weight.parameter.grad, own, 1e-3)

    return step


def steps_of(optimizer: alq.ALQ) -> dict[str, Callable[[], None]]:
    return {
        "basis": optimizer.basis_step,
        "ste": optimizer.ste_step,
        "coordinate": optimizer.coordinate_step,
        "prune": partial(optimizer.prune_step, 1e-3, 1e-3),
    }


def measure(name: str, bits: str, args: argparse.Namespace) -> dict:
    """All figures of one network at one average bitwidth."""
    make, picture, defaults = NETWORKS[name]
    batch, structure, subc = (defaults[key] for key in ("batch_size", "structure", "subc"))
    (max_bit,) = defaults["max_bit"]
    device = torch.device(args.device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    model = make().to(device, memory_format=torch.channels_last)  # as the scripts hold it

    x = torch.randn(min(batch, args.pictures), *picture, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def forward_backward() -> None:
        model.zero_grad()
        model(x).square().sum().backward()

    network = times({"": forward_backward}, 1, sync, clock)[""] * batch / len(x)
    plain = [p.detach().clone() for p in quantizable(model).values()]
    sketching = times({"": lambda: alq.quantize(model, structure, subc, max_bit)}, 1, sync, clock)
    weights = alq.quantize(model, structure, subc, max_bit)
    optimizer = alq.ALQ(weights, lr=1e-3)
    for weight, tensor in zip(weights, plain, strict=True):
        weight.parameter.grad = 1e-2 * torch.randn_like(weight.parameter)
        tensor.grad = weight.parameter.grad.clone()
    if bits != "max":
        optimizer.prune_step(1.0, 1 - float(bits) / alq.average_bitwidth(weights))
    steps = {**amsgrad_steps(plain), **steps_of(optimizer)}
    if args.compile:
        compiled = steps_of(alq.CompiledALQ(weights, lr=1e-3))
        steps |= {f"{name} compiled": step for name, step in compiled.items()}
    bitwidth = alq.average_bitwidth(weights)
    seconds = times(steps, args.repeats, sync, clock)
    if args.naive:
        seconds["basis naive"] = times({"": naive_step(weights)}, 1, sync, clock)[""]
    largest = 4 * max(weight.parameter.numel() for weight in weights)
    return {
        "network": name,
        "max_bit": max_bit,
        "bitwidth": bitwidth,
        "weights": sum(weight.parameter.numel() for weight in weights),
        "seconds": {"forward + backward": network, "sketch": sketching[""], **seconds},
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


def cells(row: dict) -> list[str]:
    """One line of the README's table; where there are two figures: eager; compiled."""
    seconds, peak = row["seconds"], row["peak memory in largest layers"]

    def both(figure: Callable[[str], float], digits: int = 1) -> str:
        return "; ".join(f"{figure(kind):.{digits}f}" for kind in ("", " compiled"))

    def share(kind: str) -> float:
        basis = seconds["basis" + kind]
        return 100 * basis / (basis + seconds["forward + backward"])

    floor, naive = seconds["amsgrad"], seconds["basis naive"]
    return [
        row["network"],
        f"{row['bitwidth']:.2f}",
        f"{1e3 * floor:.1f}",
        *(both(lambda kind, step=step: seconds[step + kind] / floor) for step in STEPS),
        both(lambda kind: naive / seconds["basis" + kind], 0),
        both(share),
        f"{seconds['sketch']:.2f}",
        both(lambda kind: max(peak[step + kind] for step in STEPS)),
    ]


def markdown(content: dict) -> str:
    """The README's table, from what `--compile --naive --json` wrote."""
    titles = ["network", "bits", "AMSGrad ms", *(f"{step} x" for step in STEPS)]
    titles += ["naive / basis", "basis, % of training step", "sketch s", "peak memory"]
    lines = [titles, ["---"] * len(titles), *map(cells, content["rows"])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the README's table, exit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    settle_cpu()
    print(machine(torch.device(args.device)))
    rows = []
    for name in args.network:
        for bits in args.bits:
            rows.append(measure(name, bits, args))
            show(rows[-1])
    if args.json:
        where = machine(torch.device(args.device))
        content = {"machine": where, "arguments": sys.argv[1:], "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
