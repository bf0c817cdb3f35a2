"""Which inputs of a network's layers are constant, whatever the network is made of.

It is run on inputs that are no numbers (NaN), and every unit that has bits gives none either: what
arrives at a layer as a number, the same for all of a batch, is constant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.network import uncompiled
from ..method.quantized_inputs import owners
from ..method.weight import MultiBitWeight

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layers = dict[MultiBitWeight, Layer]
NEEDS = "fold: needs a model that takes a tensor of floats and returns a tensor"


def layers_of(model: nn.Module, weights: Sequence[MultiBitWeight]) -> Layers:
    """Return the layers that multiply by one of `weights`, and do nothing else with it."""
    found: Layers = {}
    for weight in weights:
        users = list(owners(uncompiled(model), {weight.name: weight.parameter}).values())
        layer = users[0] if len(users) == 1 else None
        if type(layer) in KINDS and getattr(layer, "groups", 1) == 1:
            found[weight] = layer  # type: ignore[assignment]
    return found


def without_bits(weight: MultiBitWeight) -> Tensor:
    """Return (O,) bool, which outputs of the layer have no bit in any of their groups."""
    return ~weight.mask.reshape(weight.grouping.by_outputs[0], -1).any(1)


def constant_inputs(
    model: nn.Module, layers: Layers, inputs: Tensor
) -> dict[MultiBitWeight, Tensor]:
    """Return each layer's inputs (C,): the value of those that are constant, NaN for all others."""
    found: dict[MultiBitWeight, Tensor] = {}

    def unknown(weight: MultiBitWeight) -> Tensor:
        return weight.alpha.new_full(weight.grouping.by_outputs[1:2], torch.nan)

    def see(weight: MultiBitWeight, layer: Layer, x: Tensor) -> Tensor:
        once = weight not in found and fits(layer, x)
        found[weight] = constants(x, channel(layer)) if once else unknown(weight)
        return x

    def poison(weight: MultiBitWeight, layer: Layer, y: Tensor) -> Tensor:
        dead = without_bits(weight)
        bias = torch.zeros_like(dead, dtype=y.dtype) if layer.bias is None else layer.bias
        value = torch.where(dead, bias, torch.nan).to(y.dtype)
        return along(value, y, channel(layer)).expand_as(y).contiguous()

    with hooked(layers, see, poison):
        model(torch.full_like(inputs, torch.nan))
    return {weight: found.get(weight, unknown(weight)) for weight in layers}


def reaches_elsewhere(
    model: nn.Module, layers: Layers, inputs: Tensor, source: MultiBitWeight,
    free: Mapping[MultiBitWeight, Tensor],
) -> bool:  # fmt: skip
    """Return whether units without bits of `source` reach the output other than by `free` inputs.

    `free` (C,) bool for each layer. That is so if the output is no number (NaN) where these units
    give none, and `free` inputs are 0.
    """

    def absorb(weight: MultiBitWeight, layer: Layer, x: Tensor) -> Tensor:
        return x.masked_fill(along(free[weight], x, channel(layer)), 0) if fits(layer, x) else x

    def poison(weight: MultiBitWeight, layer: Layer, y: Tensor) -> Tensor:
        if weight is not source:
            return y
        return y.masked_fill(along(without_bits(weight), y, channel(layer)), torch.nan)

    with hooked(layers, absorb, poison):
        return bool(outputs(model, inputs).isnan().any())


@contextmanager
def hooked(layers: Layers, on_input: Callable, on_output: Callable) -> Iterator[None]:
    """Let both functions (weight, layer, tensor) -> tensor see to the layers within `with`."""
    handles = []
    for weight, layer in layers.items():

        def before(
            module: nn.Module, args: tuple, named: dict, weight: MultiBitWeight = weight
        ) -> tuple[tuple, dict]:
            (x,) = args or (named["input"],)
            return (on_input(weight, module, x),), {}

        def after(
            module: nn.Module, args: tuple, y: Tensor, weight: MultiBitWeight = weight
        ) -> Tensor:
            return on_output(weight, module, y)

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel(layer: Layer) -> int:
    """Return the dimension of a batch that counts the layer's inputs, or its outputs."""
    return -1 if isinstance(layer, nn.Linear) else 1


def fits(layer: Layer, x: Tensor) -> bool:
    """Return whether x is a batch of the layer's inputs, and not a single one."""
    return isinstance(layer, nn.Linear) or x.dim() == layer.weight.dim()


def padded(layer: Layer) -> bool:
    """Return whether some outputs of the layer see padding in the place of its inputs."""
    padding = getattr(layer, "padding", 0)
    return isinstance(padding, str) or bool(torch.tensor(padding).any())


def moves(layer: Layer) -> bool:
    """Return whether the layer's bias can make up for a constant input, whatever its value."""
    return layer.bias is not None and not padded(layer)


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return values (C,) shaped to be broadcast along dimension `dim` of x."""
    shape = [1] * x.dim()
    shape[dim] = len(values)
    return values.view(shape)


def constants(x: Tensor, dim: int) -> Tensor:
    """Return the values (C,) that x has all along its other dimensions, NaN where they differ.

    Where these are the batch and a single position nothing is constant: what is added there may
    differ at the next position of a longer sequence or of a larger picture.
    """
    rows = x.movedim(dim, 0).flatten(1)
    positions = x.shape[1:].numel() // x.shape[dim] if x.dim() > 2 else 2
    same = (rows == rows[:, :1]).all(1) & (positions > 1)
    return torch.where(same, rows[:, 0], torch.nan)


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the model gives; InputError if that is no tensor."""
    found = model(inputs)
    if not isinstance(found, Tensor):
        raise InputError(NEEDS, "fold")
    return found


def first_outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return `outputs`; InputError if the model cannot take `inputs`, too."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise InputError(NEEDS, "fold")
    if not inputs.numel():
        raise InputError("fold: the batch to compare outputs on is empty", "fold")
    try:
        return outputs(model, inputs)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(
            f"fold: the model takes no {tuple(inputs.shape)}: {why}", "fold"
        ) from error
