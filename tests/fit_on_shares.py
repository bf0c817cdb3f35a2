"""`alq.fit` in float64 on made-up data, alone or under torchrun: `fit_on_shares.py FOLDER`.

Each process has every second sample of each batch of 32, and saves its weights in FOLDER.
Not collected as a test; run by torchrun in one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

import alq
from alq.machine.processes import launched, process_count, rank

SHORT = alq.Schedule(
    target_bit=1.0, epoch_basis=2, epoch_coord=1, epoch_ste=2, epoch_post_coord=1, top_k=0.2
)


def share(x: torch.Tensor, y: torch.Tensor) -> DataLoader:
    """Batches of 32 in one order, of which each process reads its own part."""
    data, count = TensorDataset(x, y), process_count()
    sampler = DistributedSampler(data, shuffle=False) if count > 1 else None
    return DataLoader(data, batch_size=32 // count, sampler=sampler)


def main(folder: Path) -> None:
    if launched():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(256, 16).double()
    y = (x @ torch.randn(16, 4).double()).argmax(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    weights = alq.quantize(model, max_bit=2)
    loaders = share(x[:192], y[:192]), share(x[192:], y[192:])
    log = folder / "log.jsonl"
    alq.fit(model, weights, *loaders, schedule=SHORT, log=log, progress=rank() == 0)
    torch.save([weight.state_dict() for weight in weights], folder / f"{rank()}.pth")
    if launched():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
