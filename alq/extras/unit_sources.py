"""From which unit each input of a network's layers comes, whatever the network is made of.

Units are numbered. For each binary digit of the numbers the network runs twice: units whose digit
is 1 give no number (NaN) and all others 1, then the other way round. An input that is no number in
exactly one of the two, for every digit, comes from the one unit that the digits spell.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..machine.modes import evaluation
from ..method.network import uncompiled
from ..method.quantized_inputs import activations_in
from ..method.weight import MultiBitWeight
from ..training.file_size import Sources
from .probing import (
    Layer,
    Layers,
    along,
    channel,
    constants,
    first_outputs,
    fits,
    hooked,
    layers_of,
    moves,
)

Call = tuple[Sequence, Mapping[str, object]]  # what a model is called with


def sources_to_fold(
    model: nn.Module, weights: Sequence[MultiBitWeight], run: Callable[[], object]
) -> Sources:
    """Return `unit_sources`, none where `fold_constant_units` refuses such a model.

    `run` runs the model as it is used. Raises: InputError as `unit_sources` does, and where
    activations are in binary bases.
    """
    if activations_in(model):
        raise InputError("file_kb: needs activations in float, as folding does", "file_kb")
    call = first_call(model, run)
    if takes_tensor_gives_tensor(model, call):
        return unit_sources(model, weights, call)
    return Sources.of(weights, [nowhere(weight) for weight in weights], [False] * len(weights))


@torch.no_grad()
def takes_tensor_gives_tensor(model: nn.Module, call: Call) -> bool:
    """Return whether the model takes nothing but a tensor of floats, and returns a tensor."""
    args, named = call
    if named or len(args) != 1:
        return False
    with evaluation(model), restored(model):
        try:
            first_outputs(model, *args)
        except InputError:
            return False
    return True


@torch.no_grad()
def unit_sources(model: nn.Module, weights: Sequence[MultiBitWeight], call: Call) -> Sources:
    """Return of each layer's inputs the unit that it comes from, numbered over all layers.

    It is -1 where an input does not come from one unit alone; also where the unit's constant, once
    it has no bits, could not move into the layer's bias: past padding, or where there is none. The
    model is left as it was.

    Arguments:
        weights: all of the model's multi-bit weights.
        call: positional and named arguments of the model, of the kind and size that it is used on.

    Raises: InputError if the model does not run on NaN.
    """
    args, named = call
    args = [without_numbers(value) for value in args]
    named = {key: without_numbers(value) for key, value in named.items()}
    layers = layers_of(model, weights)
    sizes = [weight.grouping.by_outputs[0] for weight in weights]
    first = dict(zip(weights, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))

    def arriving(of_units: Callable) -> dict[MultiBitWeight, Tensor]:
        return arrivals(layers, lambda: model(*args, **named), of_units)

    with evaluation(model), restored(model), failures_on_nan():
        quiet = arriving(lambda weight, unit: torch.ones_like(unit))
        found = {weight: torch.zeros_like(x, dtype=torch.int64) for weight, x in quiet.items()}
        alone = {weight: ~x.isnan() & moves(layers[weight]) for weight, x in quiet.items()}
        for digit in range(max(1, (sum(sizes) - 1).bit_length())):
            one, other = (arriving(digits(digit, value, first)) for value in (1, 0))
            for weight in {*found} - ({*one} & {*other}):  # the model took another way
                del found[weight]
            for weight in found:
                spelled = one[weight].isnan()
                alone[weight] &= spelled ^ other[weight].isnan()
                found[weight] |= spelled.long() << digit
    known = {weight: torch.where(alone[weight], found[weight], -1) for weight in found}
    inputs = [known[weight] if weight in known else nowhere(weight) for weight in weights]
    has_bias = [getattr(layers.get(weight), "bias", None) is not None for weight in weights]
    return Sources.of(weights, inputs, has_bias)


def nowhere(weight: MultiBitWeight) -> Tensor:
    """Return the sources (C,) of a layer of which none is known."""
    return weight.mask.new_full(weight.grouping.by_outputs[1:2], -1, dtype=torch.int64)


def first_call(model: nn.Module, run: Callable[[], object]) -> Call:
    """Return what the model is called with first as `run` runs it; the model is left as it was."""
    calls: list[Call] = []
    handle = uncompiled(model).register_forward_pre_hook(
        lambda module, args, named: calls.append((args, named)), with_kwargs=True
    )
    try:
        with torch.no_grad(), evaluation(model), restored(model), torch.random.fork_rng([]):
            run()
    finally:
        handle.remove()
    if not calls:
        raise InputError("file_kb: the loss does not call the model", "file_kb")
    return calls[0]


def without_numbers(value: object) -> object:
    """Return NaN in the place of a tensor of floats, anything else as it is."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return torch.full_like(value, torch.nan) if floats else value  # type: ignore[arg-type]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back after `with`, whatever its forward does to them."""
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for buffer, value in buffers.items():
            buffer.copy_(value)


@contextmanager
def failures_on_nan() -> Iterator[None]:
    """Turn what a model raises within `with` into an InputError."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (LookupError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"file_kb: the model does not run on NaN: {why}", "file_kb") from error


def digits(digit: int, value: int, first: dict[MultiBitWeight, int]) -> Callable:
    """Return what gives NaN for units whose binary digit has the value, and 1 for others."""

    def of_units(weight: MultiBitWeight, unit: Tensor) -> Tensor:
        numbers = first[weight] + torch.arange(len(unit), device=unit.device)
        return torch.where((numbers >> digit) & 1 == value, torch.nan, torch.ones_like(unit))

    return of_units


def arrivals(
    layers: Layers, forward: Callable[[], object], of_units: Callable
) -> dict[MultiBitWeight, Tensor]:
    """Return each layer's inputs (C,) where all layers give `of_units`: NaN unless a constant.

    Layers that are not run, more than once or without a batch are not returned; the latter give
    NaN.
    """
    found: dict[MultiBitWeight, Tensor] = {}
    unclear: set[MultiBitWeight] = set()

    def see(weight: MultiBitWeight, layer: Layer, x: Tensor) -> Tensor:
        if weight in found or weight in unclear or x.dim() < 2 or not fits(layer, x):
            unclear.add(weight)
        else:
            found[weight] = constants(x, channel(layer))
        return x

    def give(weight: MultiBitWeight, layer: Layer, y: Tensor) -> Tensor:
        if y.dim() < 2 or not fits(layer, y):
            return torch.full_like(y, torch.nan)
        dim = channel(layer)
        return along(of_units(weight, y.new_zeros(y.shape[dim])), y, dim).expand_as(y).contiguous()

    with hooked(layers, see, give):
        forward()
    return {weight: x for weight, x in found.items() if weight not in unclear}
