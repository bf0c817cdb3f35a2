"""What share of a training step the quantizer's basis step is.

    python benchmarks/training_step.py --threads 2 --compile --json training_step.json
    python benchmarks/training_step.py --table training_step.json

For each network, freshly sketched at its max_bit and again pruned to an average of 2 bits, at the
batch of its script: forward and backward on random pictures, the basis step, and Adam on the
biases and normalisation. Every basis step follows a backward pass, as in training, and so finds
its tensors out of the cache. ResNet18's 256 pictures at once take 11 GB; with `--at-once 64` the
pass over all of them is made in four parts, whose gradients add up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from networks import NETWORKS
from performance_tables import share_of_step, share_table
from timing import add_flags, network, prune_to, read_rows, settle, timing, write_figures


def forward_backward(model: nn.Module, name: str, batch: int, at_once: int) -> Callable[[], None]:
    """Return a step's forward and backward pass on `batch` random pictures, some at a time."""
    x = torch.randn(batch, *NETWORKS[name].picture, device=next(model.parameters()).device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(NETWORKS[name].classes, (batch,), device=x.device)
    parts = list(zip(x.split(at_once), y.split(at_once), strict=True))

    def step() -> None:
        model.zero_grad()
        for some_x, some_y in parts:
            (F.cross_entropy(model(some_x), some_y) * (len(some_y) / batch)).backward()

    return step


def measure(name: str, bits: str, args: argparse.Namespace) -> dict:
    """Return the seconds of a training step's parts, of one network at one average bitwidth."""
    seconds_of = timing(args)
    batch = args.batch or NETWORKS[name].default_flags().batch_size
    model, sketch = network(name, args.device)
    at_once = min(batch, args.at_once or batch)
    train = forward_backward(model, name, batch, at_once)
    weights = sketch()
    quantizer = alq.ALQ(weights, lr=1e-3)
    train()
    prune_to(bits, quantizer)
    own = {id(weight.parameter) for weight in weights}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    steps = {
        "forward + backward": train,
        "basis": quantizer.basis_step,
        "other parameters": torch.optim.Adam(rest, lr=1e-3).step,
    }
    if args.compile:
        steps["forward + backward, again"] = train
        steps["basis compiled"] = alq.CompiledALQ(weights, lr=1e-3).basis_step
    return {
        "network": name,
        "bitwidth": alq.average_bitwidth(weights),
        "batch": batch,
        "pictures at once": at_once,
        "seconds": seconds_of(steps, args.repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, repeats=5)
    parser.add_argument("--batch", type=int, help="pictures a batch (the script's own number)")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="at most so many pictures a pass (all)"
    )
    args = parser.parse_args()
    if args.table:
        print(share_table(read_rows(args.table)))
        return
    settle(args)
    rows = []
    for name in args.network:
        for bits in args.bits:
            rows.append(measure(name, bits, args))
            parts = (f"{part} {1e3 * s:.1f} ms" for part, s in rows[-1]["seconds"].items())
            print(f"{name} {rows[-1]['bitwidth']:.2f} bits: {', '.join(parts)}")
            print(f"  the basis step: {share_of_step(rows[-1], ''):.1f} %", flush=True)
    if args.json:
        write_figures(args.json, torch.device(args.device), rows=rows)


if __name__ == "__main__":
    main()
