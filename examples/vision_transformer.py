"""A small vision transformer on MNIST: `python examples/vision_transformer.py [SEED COUNT]`.

The network is torchvision's, the data lie in data/. A picture of 28x28 pixels is 16 patches of
7x7. Seeds 0, 1, 2: 96.47, 96.51, 96.49 % right in full precision, and 96.54, 96.41, 95.78 % at 1.5
bit a weight; about 80 s of one core.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchvision.models import VisionTransformer

import alq
from alq.data import read_mnist
from alq.machine.arithmetic import settle_cpu

FILE = Path("checkpoints/vision_transformer.alq")
seed, count = map(int, sys.argv[1:] or (0, 20_000))  # pictures to train on


def network() -> VisionTransformer:
    model = VisionTransformer(
        image_size=28, patch_size=7, num_classes=10,
        num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
    )  # fmt: skip
    model.conv_proj = nn.Conv2d(1, 64, kernel_size=7, stride=7)  # of one colour, not three
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the percentage of test pictures whose digit the model tells."""
    model.eval()
    right = sum(float((model(x).argmax(dim=1) == y).sum()) for x, y in test)
    return 100 * right / len(test.dataset)


settle_cpu()  # the quantizer is faster then, on a CPU
torch.manual_seed(seed)
known, test = (TensorDataset(x / 255, y) for x, y in read_mnist(Path(__file__).parents[1] / "data"))
train, val, _ = random_split(known, [count, 2000, 58_000 - count])
train = DataLoader(train, batch_size=50, shuffle=True)
val, test = DataLoader(val, batch_size=500), DataLoader(test, batch_size=500)

model = network()
optimizer = torch.optim.Adam(model.parameters())
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=5 * len(train))
for _ in range(5):
    for pictures, digits in train:
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), digits).backward()
        optimizer.step()
        rate.step()
before = accuracy(model)

weights = alq.quantize(model, max_bit=3)
short = alq.Schedule(target_bit=1.5, epoch_basis=1, epoch_coord=1, epoch_ste=4, epoch_post_coord=1)
alq.fit(model, weights, train, val, schedule=short)
alq.save_packed(FILE, model, weights)

fresh = network()
weights = alq.load_packed(FILE, fresh)
after, bits, kept = accuracy(fresh), alq.average_bitwidth(weights), alq.storage_bytes(weights)
full = 4 * sum(p.numel() for p in fresh.parameters())
print(f"32 bit a weight: {before:.2f} % of the test set right, {full} bytes")
print(f"{bits:.2f} bit a weight: {after:.2f} % of the test set right, {kept:.0f} bytes")
print(f"{FILE}: {FILE.stat().st_size} bytes, biases and all else included")
