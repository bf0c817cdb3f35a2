"""The memory of one basis step at the default bits: `python tests/memory.py [DEVICE [NETWORK]]`.

By default of ResNet34 on the CPU, after a pass of one picture, or of two where batch norm asks for
them. Prints megabytes (1e6): of the process before the step, with network, gradients, multi-bit
weights and moments in place; of its peak during the step; and their difference, which is what the
step needs beyond them. On a CPU this is resident memory, and Linux's peak since the step began.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import alq
from networks import NETWORKS
from timing import network


def resident(kind: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024e-6 for line in lines if line.startswith(kind))


def measure(device: torch.device, name: str) -> tuple[float, float]:
    """(MB in use before the basis step, MB at its peak)."""
    model, sketch = network(name, str(device))
    weights = sketch()
    optimizer = alq.ALQ(weights, lr=NETWORKS[name].default_flags().lr)
    pictures = torch.randn(2 if name == "vgg" else 1, *NETWORKS[name].picture, device=device)
    model(pictures).square().sum().backward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 1e6
        optimizer.basis_step()
        return before, torch.cuda.max_memory_allocated(device) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what the sketch has freed is not to serve the step
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    optimizer.basis_step()
    return before, resident("VmHWM")


if __name__ == "__main__":
    defaults = ["cpu", "resnet34"]
    device, name = sys.argv[1:] + defaults[len(sys.argv) - 1 :]
    before, peak = measure(torch.device(device), name)
    print(f"before the step {before:.0f} MB, peak {peak:.0f} MB, the step {peak - before:.0f} MB")
