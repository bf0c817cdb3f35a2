"""Where training turned NaN or infinite: in which batch and which layer.

Asking a device at each step would make the training wait for it, so a watch asks once an epoch.
"""

import torch
from torch import Tensor, nn

from ..errors import NotFinite
from .processes import combine_over_processes

NO_BATCH = 2**62  # stands for "none so far", as it is greater than any batch's number


class Watch:
    """The first batch at which the loss, or the square of a parameter's gradient, was not finite.

    `note` only queues work on the device; `check` reads the outcome back.
    """

    def __init__(self, model: nn.Module, title: str, advice: str) -> None:
        self.title, self.advice = title, advice
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # (1 + parameters,) int64: the first bad batch of the loss, and of each gradient.
        self.first_bad: Tensor | None = None

    def note(self, batch: int, loss: Tensor) -> None:
        """Note what is not finite after the backward pass of `batch`."""
        loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        # One call for all, as each operation of its own costs a device's host some microseconds.
        norms = iter(torch._foreach_norm(gradients, torch.inf) if gradients else ())
        none = torch.zeros_like(loss)
        largest = [
            none if p.grad is None else next(norms).to(loss.dtype) for _, p in self.parameters
        ]
        found = torch.stack([loss, *largest])
        found[1:].square_()  # which the moments hold
        bad = found.isfinite() * NO_BATCH + batch
        self.first_bad = bad if self.first_bad is None else torch.minimum(self.first_bad, bad)

    def check(self) -> None:
        """Raise NotFinite, which names the first bad batch and what was bad in it, or a parameter.

        Of several processes all raise it, by the batch that was bad first in any.
        """
        if self.first_bad is not None:
            first = combine_over_processes(min, self.first_bad.tolist())
            if (batch := min(first)) < NO_BATCH:
                names = [f"the gradient of {name}, or its square," for name, _ in self.parameters]
                what = ["the loss", *names][first.index(batch)]  # a bad loss makes those so, too
                raise NotFinite(f"{self.title}, batch {batch}: {what} is not finite; {self.advice}")
        finite = [parameter.isfinite().all() for _, parameter in self.parameters]
        if finite and not (flags := torch.stack(finite)).all():
            name = self.parameters[flags.tolist().index(False)][0]
            raise NotFinite(f"{self.title}: a step made {name} infinite; {self.advice}")
