"""The network's own pass by layout, precision and choice of kernels: what the defaults rest on.

    python benchmarks/layouts.py --device cuda --network vgg resnet18 --json layouts.json

Forward and backward pass on random pictures, milliseconds and peak memory, for --channels_last and
--no-channels_last, --cudnn_benchmark and --no-cudnn_benchmark, in float32, --tf32 and --amp.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks import NETWORKS
from timing import write_figures

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = ("float32", "tf32", "amp")


def measure(
    model: nn.Module, x: torch.Tensor, precision: str, repeats: int
) -> tuple[float, float | None]:
    """Return the median seconds of a pass and, on CUDA, the most MB that were in use."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    seconds, on_cuda = [], x.device.type == "cuda"
    for _ in range(3 + repeats):
        model.zero_grad(set_to_none=True)
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        half = torch.autocast(x.device.type, torch.bfloat16)
        with half if precision == "amp" else nullcontext():
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_cuda else None
    return median(seconds[3:]), peak


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the figures of each combination."""
    precisions = PRECISIONS if args.device.type == "cuda" else ("float32",)
    for name, precision, layout, benchmark in product(
        args.network, precisions, LAYOUTS, (False, True)
    ):
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = benchmark
        batch = args.batch or NETWORKS[name].default_flags().batch_size
        model = NETWORKS[name].recipe.network().to(args.device, memory_format=LAYOUTS[layout])
        x = torch.randn(batch, *NETWORKS[name].picture, device=args.device)
        seconds, peak = measure(
            model, x.contiguous(memory_format=LAYOUTS[layout]), precision, args.repeats
        )
        yield {
            "network": name, "precision": precision, "layout": layout, "benchmark": benchmark,
            "batch": batch, "milliseconds": 1e3 * seconds, "peak MB": peak,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["vgg", "resnet18"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, help="pictures a batch (the script's own number)")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes (20)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    found = []
    for row in rows(args):
        found.append(row)
        kernels = "fastest of all kernels" if row["benchmark"] else "first choice of kernels"
        where = f"{row['network']}, {row['precision']}, {row['layout']}, {kernels}"
        peak = "" if row["peak MB"] is None else f", {row['peak MB']:.0f} MB"
        print(f"{where}: {row['milliseconds']:.2f} ms{peak}", flush=True)
    if args.json:
        write_figures(args.json, args.device, rows=found)


if __name__ == "__main__":
    main()
