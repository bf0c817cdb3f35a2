"""The memory of one basis step on ResNet34 at 8 bits, batch 1: `python tests/memory.py [DEVICE]`.

Prints megabytes (1e6): of the process before the step, with network, gradients, multi-bit weights
and moments in place; of its peak during the step; and their difference, which is what the step
needs beyond them. On a CPU this is resident memory, and Linux's peak since the step began.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))

import alq
import resnet


def resident(kind: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024e-6 for line in lines if line.startswith(kind))


def measure(device: torch.device) -> tuple[float, float]:
    """(MB in use before the basis step, MB at its peak)."""
    flags = resnet.defaults("resnet34")
    torch.manual_seed(0)
    model = torchvision.models.resnet34().to(device, memory_format=torch.channels_last)
    weights = alq.quantize(model, flags["structure"], flags["subc"], max_bit=8)
    optimizer = alq.ALQ(weights, lr=flags["lr"])
    model(torch.randn(1, 3, 224, 224, device=device)).square().sum().backward()
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
    before, peak = measure(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
    print(f"before the step {before:.0f} MB, peak {peak:.0f} MB, the step {peak - before:.0f} MB")
