"""Which parameters of a network are quantized, whatever its modules."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .errors import InputError

# Names of parameters, or a predicate on (name, parameter) that is true for those left alone.
Skip = Collection[str] | Callable[[str, nn.Parameter], bool]


def quantizable(model: nn.Module, skip: Skip = ()) -> dict[str, nn.Parameter]:
    """The tensors named `weight` with more than one dimension, in `named_parameters` order.

    A parameter that modules share appears once, under the first of its names, and is left out if
    `skip` takes any of them.

    Raises: InputError for a name in `skip` that no parameter has, and for a lazy layer that has
    not seen its first batch.
    """
    names: dict[nn.Parameter, list[str]] = {}  # all names of each parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    skipped = _predicate(skip, {name for aliases in names.values() for name in aliases})
    chosen = {}
    for parameter, aliases in names.items():
        weights = [name for name in aliases if name.rpartition(".")[2] == "weight"]
        if not weights or any(skipped(name, parameter) for name in aliases):
            continue
        if isinstance(parameter, UninitializedParameter):
            raise InputError(
                f"{weights[0]}: has no shape yet; pass a batch through the model first"
            )
        if parameter.dim() > 1:
            chosen[weights[0]] = parameter
    return chosen


def _predicate(skip: Skip, names: set[str]) -> Callable[[str, nn.Parameter], bool]:
    if callable(skip):
        return skip
    wanted = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(wanted - names):
        raise InputError(f"skip: the model has no parameter '{unknown[0]}'")
    return lambda name, parameter: name in wanted


def transposed_groups(model: nn.Module, name: str) -> int:
    """The number of groups if parameter `name` is a transposed convolution's, else 0."""
    module = model.get_submodule(name.rpartition(".")[0])
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return module.groups if isinstance(module, transposed) else 0
