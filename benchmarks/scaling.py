"""How the steps' time grows with the number of weights, with I and with threads.

    python benchmarks/scaling.py --compile --json scaling.json --plot scaling.png
    python benchmarks/scaling.py --table scaling.json

One pixelwise layer of groups of 512 weights: 1e5 to 1e8 weights at 4 bits; 1 to 8 bits at
`--weights`; both with each of `--threads`. Beside the basis and coordinate steps: torch's
AMSGrad (foreach) on the same tensor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch._inductor.config
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.machine.arithmetic import settle_cpu
from performance_tables import compile_table, scaling_table
from timing import machine, times, write_figures

N = 512  # weights a group, as the last convolutions of VGG and ResNet have
SIZES = (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)  # weights
BITS = range(1, 9)
I = 4  # bits where the weights vary
STEPS = {"basis": "o-", "basis compiled": "D-", "coordinate": "s--", "amsgrad": "^:"}


def measure(weights: float, bits: int, repeats: int, compile: bool) -> dict:
    """Return the median seconds of each step on one layer."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv1d(N, max(1, round(weights / N)), 1, bias=False))
    (weight,) = alq.quantize(layer, "pixelwise", max_bit=bits)
    optimizer = alq.ALQ([weight])
    plain = weight.parameter.detach().clone()
    weight.parameter.grad = plain.grad = 1e-2 * torch.randn_like(weight.parameter)
    compiled, first = {}, None
    if compile:
        compiled["basis compiled"] = alq.CompiledALQ([weight]).basis_step
        start = time.perf_counter()
        compiled["basis compiled"]()
        first = time.perf_counter() - start
    steps = {
        "basis": optimizer.basis_step,
        **compiled,
        "coordinate": optimizer.coordinate_step,
        "amsgrad": torch.optim.Adam([plain], amsgrad=True, foreach=True).step,
    }
    return {
        "weights": weight.parameter.numel(),
        "bits": bits,
        "threads": torch.get_num_threads(),
        "first compiled step": first,  # compiles where no row before had these bits and threads
        "seconds": times(steps, repeats, lambda: None, time.perf_counter),
    }


def plot(rows: list[dict], weights: float, path: Path) -> None:
    """Draw both sweeps; filled markers: the most threads, open ones: fewer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(row["threads"] for row in rows)
    sweeps = {
        "weights": (left, "bits", I),
        "bits": (right, "weights", N * max(1, round(weights / N))),
    }
    for x, (axes, fixed, value) in sweeps.items():
        for threads in sorted({row["threads"] for row in rows}):
            own = [row for row in rows if (row["threads"], row[fixed]) == (threads, value)]
            own.sort(key=lambda row: row[x])
            fill = {"markerfacecolor": "black" if threads == most else "white"}
            for step in own[0]["seconds"]:
                y = [1e3 * row["seconds"][step] for row in own]
                label = f"{step}, {threads} thread{'s' if threads > 1 else ''}"
                axes.plot(
                    [row[x] for row in own], y, STEPS[step], color="black", label=label, **fill
                )
        axes.set_ylabel("milliseconds a step")
        axes.grid(color="0.9")
    left.set(xscale="log", yscale="log", xlabel=f"weights (at {I} bits)")
    right.set(xlabel=f"bits I (at {weights / 1e6:g} million weights)", ylim=0)
    left.legend(fontsize="small", frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--weights", type=float, default=2.4e6, help="where bits vary (2.4e6)")
    parser.add_argument("--largest", type=float, default=max(SIZES), help="most weights (1e8)")
    parser.add_argument("--compile", action="store_true", help="also the compiled basis step")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them into this file")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print (and --plot) it, exit")
    args = parser.parse_args()
    if args.table:
        content = json.loads(args.table.read_text())
        print(scaling_table(content), compile_table(content), sep="\n\n")
        if args.plot:
            plot(content["rows"], args.weights, args.plot)
        return
    settle_cpu()
    torch._inductor.config.force_disable_caches = args.compile
    cases = [(size, I) for size in SIZES if size <= args.largest] + [
        (args.weights, b) for b in BITS
    ]
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(machine(torch.device("cpu")))
        for size, bits in cases:
            rows.append(measure(size, bits, args.repeats, args.compile))
            cells = "  ".join(f"{k} {1e3 * s:9.2f} ms" for k, s in rows[-1]["seconds"].items())
            first = rows[-1]["first compiled step"]
            cells += f"  first {first:.1f} s" if first else ""
            print(f"{rows[-1]['weights']:>10} weights  {bits} bits  {cells}", flush=True)
    if args.json:
        write_figures(args.json, torch.device("cpu"), rows=rows)
    if args.plot:
        plot(rows, args.weights, args.plot)


if __name__ == "__main__":
    main()
