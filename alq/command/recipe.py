"""What one entry script brings: its network, its data and the paper's row."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.loaders import Loader, Split


@dataclass(frozen=True)
class Recipe:
    """What one entry script adds to the stages that all share.

    Attributes:
        net: name of the network, as checkpoints record it.
        dataset: name of the data set, as checkpoints and packed files record it.
        network: makes the network, untrained.
        load_data: (flags, indices of the held-out images or None to draw them) -> loaders, indices.
        load_test: flags -> the loader of the test set, which needs no other images.
        pretrain_optimizer: (parameters, flags) -> optimizer of the full-precision training.
        published: the paper's row, if it has one: bitwidth, storage in bytes, top-1 in percent.
        paper_dataset: the paper's, where it is another; files that record none are of that.
        fetch: flags -> full-precision weights to take instead of training, or None to train.
    """

    net: str
    dataset: str
    network: Callable[..., nn.Module]
    load_data: Callable[[Namespace, Tensor | None], tuple[Split, Tensor]]
    load_test: Callable[[Namespace], Loader]
    pretrain_optimizer: Callable[..., Optimizer]
    published: dict[str, float] | None = None
    paper_dataset: str | None = None
    fetch: Callable[[Namespace], dict | None] = lambda args: None

    def on(self, dataset: str, classes: int) -> "Recipe":
        """Return the paper's recipe for a data set of so many classes; another has no row."""
        if dataset == self.dataset:
            return self
        network, paper = partial(self.network, classes=classes), self.dataset
        return replace(self, dataset=dataset, network=network, published=None, paper_dataset=paper)

    def shapes(self) -> nn.Module:
        """Return the network on the device "meta": shapes without values, for checks."""
        with torch.device("meta"):
            return self.network()
