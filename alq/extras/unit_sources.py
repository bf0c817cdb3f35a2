"""From which unit each input of a network's layers comes, whatever the network is made of.

Units are numbered. For each binary digit of the numbers the network runs twice: units whose digit
is 1 give no number (NaN) and all others 0, then the other way round. An input that is no number in
exactly one of the two, for every digit, comes from the one unit that the digits spell.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..method.weight import MultiBitWeight
from .probing import (
    Layer,
    Layers,
    along,
    channel,
    constants,
    evaluation,
    fits,
    hooked,
    layers_of,
    padded,
)


@torch.no_grad()
def unit_sources(
    model: nn.Module, weights: Sequence[MultiBitWeight], forward: Callable[[], object]
) -> list[Tensor]:
    """Return of each layer's inputs (C,) the unit that each comes from, numbered over all layers.

    It is -1 where an input does not come from one unit alone; also where the unit's constant, once
    it has no bits, could not move into the layer's bias: past padding, or where there is none.

    Arguments:
        weights: all of the model's multi-bit weights.
        forward: runs the model on a batch of the size and kind that it is used on.
    """
    layers = layers_of(model, weights)
    sizes = [weight.grouping.by_outputs[0] for weight in weights]
    first = dict(zip(weights, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    with evaluation(model):
        quiet = arrivals(layers, forward, lambda weight, unit: torch.zeros_like(unit))
        found = {weight: torch.zeros_like(x, dtype=torch.int64) for weight, x in quiet.items()}
        alone = {weight: ~x.isnan() & moves(layers[weight]) for weight, x in quiet.items()}
        for digit in range(max(1, (sum(sizes) - 1).bit_length())):
            one, other = (
                arrivals(layers, forward, digits(digit, value, first)) for value in (1, 0)
            )
            for weight in found:
                spelled = one[weight].isnan()
                alone[weight] &= spelled ^ other[weight].isnan()
                found[weight] |= spelled.long() << digit
    unknown = [weight.mask.new_full(weight.grouping.by_outputs[1:2], -1, dtype=torch.int64)
               for weight in weights]  # fmt: skip
    return [
        torch.where(alone[weight], found[weight], -1) if weight in found else none
        for weight, none in zip(weights, unknown, strict=True)
    ]


def digits(digit: int, value: int, first: dict[MultiBitWeight, int]) -> Callable:
    """Return what gives NaN for units whose binary digit has the value, and 0 for others."""

    def of_units(weight: MultiBitWeight, unit: Tensor) -> Tensor:
        numbers = first[weight] + torch.arange(len(unit), device=unit.device)
        return torch.where((numbers >> digit) & 1 == value, torch.nan, torch.zeros_like(unit))

    return of_units


def arrivals(
    layers: Layers, forward: Callable[[], object], of_units: Callable
) -> dict[MultiBitWeight, Tensor]:
    """Return each layer's inputs (C,) where all layers give `of_units`: NaN unless a constant.

    Layers that are not run, or more than once, are not returned.
    """
    found: dict[MultiBitWeight, Tensor] = {}
    again: set[MultiBitWeight] = set()

    def see(weight: MultiBitWeight, layer: Layer, x: Tensor) -> Tensor:
        if weight in found or not fits(layer, x):
            again.add(weight)
        found[weight] = constants(x, channel(layer))
        return x

    def give(weight: MultiBitWeight, layer: Layer, y: Tensor) -> Tensor:
        dim = channel(layer)
        return along(of_units(weight, y.new_zeros(y.shape[dim])), y, dim).expand_as(y).contiguous()

    with hooked(layers, see, give):
        forward()
    return {weight: x for weight, x in found.items() if weight not in again}


def moves(layer: Layer) -> bool:
    """Return whether the layer's bias can make up for a constant input, whatever its value."""
    return layer.bias is not None and not padded(layer)
