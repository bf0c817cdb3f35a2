"""Training in float64 on made-up data, alone or under torchrun: `fit_on_shares.py FOLDER LOOP`.

LOOP is "fit", for `alq.fit`, or "own", for a loop over the four steps. Each process has every
second sample of each batch of 32, and saves its weights in FOLDER.
Not collected as a test; run by torchrun in one.
"""

from __future__ import annotations

import sys
from functools import partial
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


def own_loop(model: nn.Module, weights: list[alq.MultiBitWeight], loader: DataLoader) -> None:
    """An epoch of each of the four steps, as docs/devices.md says."""
    network = nn.parallel.DistributedDataParallel(model) if launched() else model
    optimizer = alq.ALQ(weights, generator=torch.Generator().manual_seed(0))
    prune = partial(optimizer.prune_step, top_k=0.3, M_p=0.5)
    for step in (optimizer.basis_step, optimizer.coordinate_step, prune, optimizer.ste_step):
        for x, y in loader:
            model.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            step()


def main(folder: Path, loop: str) -> None:
    if launched():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(256, 16).double()
    y = (x @ torch.randn(16, 4).double()).argmax(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    weights = alq.quantize(model, max_bit=2)
    loaders = share(x[:192], y[:192]), share(x[192:], y[192:])
    if loop == "fit":
        log = folder / "log.jsonl"
        alq.fit(model, weights, *loaders, schedule=SHORT, log=log, progress=rank() == 0)
    else:
        folder.mkdir(exist_ok=True)
        own_loop(model, weights, loaders[0])
    torch.save([weight.state_dict() for weight in weights], folder / f"{rank()}.pth")
    if launched():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
