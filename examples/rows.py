"""A network and data of one's own: a 1-D convolution network reads MNIST's pictures row by row."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from alq.data import read_mnist


def trained_network(folder: str = "data") -> tuple[nn.Module, DataLoader, DataLoader]:
    """Return the network after five epochs in full precision, training and validation batches.

    A batch is (x, y): x (batch, 28, 28), a sequence of 28 rows with 28 values each, and the digits
    y (batch,). 4000 of MNIST's training images, in `folder`, train and 1000 validate.
    """
    (images, labels), _ = read_mnist(folder)
    digits = TensorDataset(images[:, 0].transpose(1, 2) / 255, labels)
    generator = torch.Generator().manual_seed(0)
    train, val, _ = random_split(digits, [4000, 1000, len(digits) - 5000], generator)
    batches = DataLoader(train, batch_size=100, shuffle=True)

    layers = [nn.Conv1d(28, 32, 3), nn.ReLU(), nn.Conv1d(32, 64, 3, stride=2), nn.ReLU()]
    layers += [nn.Conv1d(64, 64, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(320, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for x, y in [batch for _ in range(5) for batch in batches]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, batches, DataLoader(val, batch_size=500)
