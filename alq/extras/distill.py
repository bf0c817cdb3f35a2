"""Distillation: the full-precision network's answers as soft labels (Hinton et al., 2015).

This goes beyond the paper; `--distill` turns it on.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training.epoch import LossFunction, classification


def distillation(teacher: nn.Module, weight: float, temperature: float) -> LossFunction:
    """Return the loss (1 - weight) * cross entropy + weight * T^2 * KL(teacher || model).

    KL compares softmax(logits / T) of the two; T is `temperature`. Where no gradient is asked for,
    as in evaluations, the loss is the plain cross entropy. The teacher is put into eval mode and
    gets no gradient.
    """
    teacher.eval().requires_grad_(False)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | int]:
        if not torch.is_grad_enabled():
            return classification(model, batch)
        x, y = batch
        logits = model(x)  # (batch, classes)
        with torch.no_grad():
            soft = F.log_softmax(teacher(x) / temperature, dim=1)
        own = F.log_softmax(logits / temperature, dim=1)
        divergence = F.kl_div(own, soft, reduction="batchmean", log_target=True)
        plain = F.cross_entropy(logits, y)
        mixed = (1 - weight) * plain + weight * temperature**2 * divergence
        return mixed, (logits.argmax(dim=1) == y).sum(), len(y)

    return loss
