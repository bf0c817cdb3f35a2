"""NaN and infinity: which batch, and which layer, without waiting for the device at each step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import NotFinite
from .processes import least_over_processes

NEVER = 2**62  # later than any batch


class Watch:
    """The first batch at which the loss, or the square of a parameter's gradient, was not finite.

    `look` only queues work on the device; `check` reads the outcome back.
    """

    def __init__(self, model: nn.Module, title: str, advice: str) -> None:
        self.title, self.advice = title, advice
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.first: Tensor | None = None  # (1 + parameters,) int64: of the loss, of each gradient

    def look(self, batch: int, loss: Tensor) -> None:
        """Note what is not finite after the backward pass of `batch`."""
        loss = loss.detach()
        none = torch.zeros_like(loss)
        largest = [
            none if p.grad is None else torch.linalg.vector_norm(p.grad, torch.inf).to(loss.dtype)
            for _, p in self.named
        ]
        largest = [x.square() for x in largest]  # which the moments hold
        now = torch.stack([loss, *largest]).isfinite() * NEVER + batch
        self.first = now if self.first is None else torch.minimum(self.first, now)

    def check(self) -> None:
        """NotFinite names the first bad batch and what was bad in it, or a parameter."""
        if self.first is not None:
            first = least_over_processes(self.first.tolist())
            if (batch := min(first)) < NEVER:
                if first[0] == batch:  # which makes the gradients so, too
                    what = "the loss is not finite"
                else:
                    name = self.named[first[1:].index(batch)][0]
                    what = f"the gradient of {name}, or its square, is not finite"
                raise NotFinite(f"{self.title}, batch {batch}: {what}; {self.advice}")
        finite = [p.isfinite().all() for _, p in self.named]
        if finite and not torch.stack(finite).all():
            name = self.named[[bool(x) for x in finite].index(False)][0]
            raise NotFinite(f"{self.title}: a step made {name} infinite; {self.advice}")
