"""What the scripts that take times share: the clock, the steps to be timed, the file of figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.machine.arithmetic import settle_cpu
from networks import NETWORKS


def times(
    steps: dict[str, Callable[[], object]], repeats: int, sync: Callable[[], None], clock: Callable,
    twice: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return the median seconds of steps that take turns, after one round that is not counted.

    `twice` runs a step before it is timed, so that the caches hold its own code and data, and not
    what the step before it happens to share with it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            if twice:
                step()
            sync()
            start = clock()
            step()
            sync()
            seconds[name].append(clock() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def timing(args: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """Set the threads; return `times` with the flags' device and clock."""
    if args.threads:
        torch.set_num_threads(args.threads)
    sync = torch.cuda.synchronize if torch.device(args.device).type == "cuda" else lambda: None
    clock = time.process_time if args.cpu_time else time.perf_counter
    return partial(times, sync=sync, clock=clock)


def settle(args: argparse.Namespace) -> None:
    """Set the process up as the scripts do, and print what its figures depend on."""
    settle_cpu()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(torch.device(args.device)))


def add_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the flags of the scripts that time the steps of several networks."""
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=["max", "2"], help="'max' or an average")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"timed rounds ({repeats}); medians are kept"
    )
    parser.add_argument("--compile", action="store_true", help="also the steps of CompiledALQ")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="JSON", help="print the tables of these, exit"
    )


def network(name: str, device: str) -> tuple[nn.Module, Callable[[], list[alq.MultiBitWeight]]]:
    """Return the network as the scripts hold it, and what sketches it by their defaults."""
    flags = NETWORKS[name].default_flags()
    torch.manual_seed(0)
    model = NETWORKS[name].recipe.network()
    model = model.to(device, memory_format=torch.channels_last)
    return model, partial(alq.quantize, model, flags.structure, flags.subc, *flags.max_bit)


def give_gradients(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, with random gradients."""
    for tensor in tensors:
        tensor.grad = 1e-2 * torch.randn_like(tensor)
    return tensors


def prune_to(bits: str, optimizer: alq.ALQ) -> None:
    """Prune the cheapest of all coordinates down to an average of `bits`, unless that is 'max'."""
    if bits != "max":
        optimizer.prune_step(1.0, 1 - float(bits) / alq.average_bitwidth(optimizer.weights))


def machine(device: torch.device) -> str:
    """Describe what a figure depends on."""
    return (
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}"
    )


def read_rows(paths: Iterable[Path]) -> list[dict]:
    """Return the rows of all these files."""
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def write_figures(path: Path, device: torch.device, **figures: object) -> None:
    """Write figures as JSON, with the machine, its load of late and the command's flags."""
    where = {
        "machine": machine(device),
        "load of the last 1, 5 and 15 minutes": [round(load, 2) for load in os.getloadavg()],
        "arguments": sys.argv[1:],
    }
    path.write_text(json.dumps({**where, **figures}, indent=1) + "\n")
