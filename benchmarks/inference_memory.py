"""The memory that a process takes to run a network in one way: `inference.py --memory` calls it.

    python benchmarks/inference_memory.py FOLDER NETWORK WAY BATCH... THREADS

FOLDER holds what `inference_ways.prepare` wrote, of LeNet5, too. The process runs LeNet5 first, so
that what is loaded once, whatever the network, is counted apart. Then it loads the network, and
runs batch after batch. It prints JSON, in bytes beyond torch and alq themselves:

    libraries   what is loaded once: numba and its kernels, onnxruntime, oneDNN
    loaded      what the loaded network takes beyond the libraries, before it runs
    peaks       for each batch the most that the process takes beyond the libraries while it runs

All is resident memory as Linux counts it. The peak begins anew before each batch. What is freed is
given back at once (FREED): otherwise the heap's holes add up to a third, another third each time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference_ways import NETWORKS, WAYS, Way

WARM, WARM_BATCHES = "lenet5", (1, 128)  # which together use all kernels
RUNS = 3
FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # glibc maps what is larger, and does not raise it


def resident(kind: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def tidied() -> int:
    """Return what the process holds once freed memory is given back; its peak begins anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_of(way: Way, name: str, batch: int) -> int:
    """Return the peak while batches are computed, one batch of pictures included."""
    tidied()
    compute, feed = way
    x = feed(torch.randn(batch, *NETWORKS[name].picture))
    for _ in range(RUNS):
        compute(x)
    return resident("VmHWM")


def measure(folder: Path, name: str, way: str, batches: list[int]) -> dict:
    """Return what the text above explains."""
    begin = tidied()
    loaded_way = WAYS[way](folder / WARM, WARM)
    for batch in WARM_BATCHES:
        peak_of(loaded_way, WARM, batch)
    del loaded_way
    idle = tidied()
    loaded_way = WAYS[way](folder / name, name)
    loaded = tidied()
    peaks = {str(batch): peak_of(loaded_way, name, batch) - idle for batch in sorted(batches)}
    return {"libraries": idle - begin, "loaded": loaded - idle, "peaks": peaks}


def of_process(folder: Path, name: str, way: str, batches: list[int], threads: int) -> dict:
    """Return what `measure` finds in a process of its own."""
    command = [sys.executable, __file__, str(folder), name, way, *map(str, batches), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **FREED}, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    place, network, chosen, *numbers = sys.argv[1:]
    *sizes, count = map(int, numbers)
    torch.set_num_threads(count)
    with torch.no_grad():
        print(json.dumps(measure(Path(place), network, chosen, sizes)))
