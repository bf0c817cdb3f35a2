"""A user's loaders and loss, held to what training needs of them: any batch, any form of loss."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..machine.processes import tensors_in
from .epoch import Batches, LossFunction, check_probabilities, classification
from .loop import set_epoch


class Counted:
    """A user's loader, held to the length that it says: pruning is shared out over its batches."""

    def __init__(self, loader: Batches, name: str) -> None:
        self.loader, self.name = loader, name

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        """Yield the batches; InputError as soon as there are more, or fewer, than the length."""
        length, came = len(self.loader), 0
        for batch in self.loader:
            if came == length:
                raise self.wrong("more")
            came += 1
            yield batch
        if came < length:
            raise self.wrong(str(came))

    def wrong(self, came: str) -> InputError:
        return InputError(
            f"{self.name}: its length is {len(self.loader)}, but it gave {came} batches; its "
            "length must hold, and it must start anew each time",
            self.name,
        )

    def set_epoch(self, number: int) -> None:
        set_epoch(self.loader, number, 0)


def counted(loader: Batches, name: str) -> Counted:
    """Return the loader, `Counted`; InputError if it has no length or cannot begin anew."""
    try:
        length = 0 if isinstance(loader, Iterator) else len(loader)
    except TypeError:  # also of a DataLoader over a data set without length
        length = 0
    if not length:
        raise InputError(
            f"{name}: needs a length, its number of batches, of at least 1, and to give them "
            "anew each time; pass a list, or a DataLoader over a data set with a length",
            name,
        )
    return Counted(loader, name)


def loss_function(loss: Callable, device: torch.device) -> LossFunction:
    """Return `loss` as the training loop calls it, on batches moved to `device`."""
    if not callable(loss) or isinstance(loss, nn.modules.loss._Loss):
        raise InputError(
            f"loss: is a {type(loss).__name__}; give a function (model, batch) -> loss, such as "
            "lambda model, batch: criterion(model(batch[0]), batch[1])",
            "loss",
        )
    seen = False

    def on_device(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None, int]:
        nonlocal seen
        batch = moved_to(batch, device)
        sizes = [tensor.numel() for tensor in tensors_in(batch)]
        if sizes and not any(sizes):
            raise InputError("a loader gave a batch of no samples; let it leave such batches out")
        result = loss(model, batch)
        if loss is classification and not seen:
            _, y = batch
            check_probabilities(y)  # of the first batch alone: it waits for the device
        seen = True
        if not isinstance(result, (tuple, list)):
            result = result, None, samples_in(batch)
        fits = len(result) == 3 and isinstance(result[0], Tensor) and result[2] is not None
        fits = fits and all(x is None or torch.as_tensor(x).numel() == 1 for x in result)
        if not fits or (torch.is_grad_enabled() and not result[0].requires_grad):
            raise InputError(
                "loss: must return the mean loss, a tensor of one number that depends on what is "
                "trained; or it, the number of correct answers and that of samples",
                "loss",
            )
        return result[0].reshape(()), *result[1:]

    return on_device


def moved_to(batch: Any, device: torch.device) -> Any:
    """Return the batch of nested containers on `device`; what has no tensors stays as it is."""
    if callable(move := getattr(batch, "to", None)):  # also packed sequences, and other libraries'
        return move(device)
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)  # of its class, which may have its items as attributes, too
        attributes = getattr(moved, "__dict__", {})
        for key, value in batch.items():
            moved[key] = moved_to(value, device)
            if key in attributes:
                attributes[key] = moved[key]
        return moved
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        same: Any = copy.copy(batch)
        for name in (field.name for field in dataclasses.fields(batch)):
            if hasattr(batch, name):
                value = moved_to(getattr(batch, name), device)
                object.__setattr__(same, name, value)  # also of frozen ones
        return same
    if isinstance(batch, (tuple, list)):
        parts = [moved_to(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def samples_in(batch: object) -> int:
    """Return the length of the batch's first tensor that has one, 1 where there is none."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)
