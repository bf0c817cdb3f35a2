"""Which layers of a network are fed activations in binary bases, and how they are put there.

A layer's `BinaryActivation` is a module within the layer, so that the state dict holds it under the
layer's name, and a hook passes the layer's input through it before the layer sees it. The layer
stays what it was, and its weight keeps its name.
"""

from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..machine.modes import anything_compiled
from .activations import BinaryActivation
from .network import Skip, quantizable, uncompiled

PLACE = "binary_input"  # the name of the module within the layer
MOST_BITS = 8
# What is quantized of the arguments of attention, and of all other layers.
QUERIES, INPUT = ("query", "key", "value"), ("input",)


def quantize_activations(
    model: nn.Module, act_bit: int, skip: Skip = (), first: str | None = None
) -> dict[str, BinaryActivation]:
    """Let every layer of `model` but the first take its input in `act_bit` binary bases.

    Those are the layers that `alq.quantize(model, skip=skip)` takes, and whose input is numbers:
    not embeddings. A layer's input is its first argument, of attention query, key and value; what
    recurrent layers and attention compute within stays in float. The levels fit themselves to the
    first batch, and go on with every batch in training mode.

    Arguments:
        skip: names of parameters whose layers are left alone, or a predicate on (name, parameter).
        first: name of the parameter whose layer comes first, and is fed the data as they are; None
            takes the first in `named_parameters` order.

    Returns: the levels by the layer's name.
    Raises: InputError for what cannot be done; the model then is as it was.
    """
    if not isinstance(act_bit, Integral) or isinstance(act_bit, bool):
        raise InputError(f"act_bit {act_bit!r}: must be a whole number", "act_bit")
    if not 1 <= act_bit <= MOST_BITS:
        raise InputError(f"act_bit {act_bit}: must be 1 to {MOST_BITS}", "act_bit")
    model = uncompiled(model)
    if found := activations_in(model):
        name, bits = next((name, len(each.gamma)) for name, each in found.items())
        raise InputError(f"act_bit {act_bit}: {name} has an input of {bits} bit already", "act_bit")
    every = quantizable(model)
    first = next(iter(every), None) if first is None else first
    if first is not None and first not in every:
        raise InputError(f"first: the model has no layer with a weight '{first}'", "first")
    layers = fed_layers(model, quantizable(model, skip))
    layers.pop((first or "").rpartition(".")[0], None)
    if not layers:
        raise InputError(
            f"act_bit {act_bit}: no quantized layer but the first is fed numbers", "act_bit"
        )
    return place(layers, dict.fromkeys(layers, int(act_bit)))


def fed_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Return the `owners` that are fed numbers, by name.

    Attention's last layer is fed nothing: attention takes its weight and never calls it.
    """
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    unfed: set[nn.Module] = {module.out_proj for module in attention}
    unfed |= {m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return {name: m for name, m in owners(model, parameters).items() if m not in unfed}


def owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Return the modules, by name, that have one of `parameters` as their own."""
    chosen, modules = set(parameters.values()), uncompiled(model).named_modules()
    return {name: m for name, m in modules if chosen.intersection(m.parameters(recurse=False))}


def place(
    layers: Mapping[str, nn.Module], bits: Mapping[str, int], like: Tensor | None = None
) -> dict[str, BinaryActivation]:
    """Let each of `layers` that `bits` names take its input in so many, and return these.

    Device and type of what they keep are those of `like`, or of the layer's own parameters.
    """
    placed = {}
    for name, act_bit in bits.items():
        layer = layers[name]
        own = next(layer.parameters(recurse=False)).detach() if like is None else like
        placed[name] = BinaryActivation(act_bit, own)
        feed(layer, placed[name].train(layer.training))
    if placed and anything_compiled():  # a network that ran so would go on without the hooks
        torch.compiler.reset()
    return placed


def feed(layer: nn.Module, activation: BinaryActivation) -> None:
    """Let `layer` take its input through `activation`."""
    layer.add_module(PLACE, activation)
    layer.register_forward_pre_hook(quantize_input, with_kwargs=True)


def quantize_input(layer: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """Return a layer's arguments with its input in binary bases: what its hook does.

    It holds no layer of its own, so that copies of the layer use what is theirs.
    """
    names = QUERIES if isinstance(layer, nn.MultiheadAttention) else INPUT
    count = min(len(names), len(inputs))
    by_name = {name: named[name] for name in names[count:] if name in named}
    fed = [*inputs[:count], *by_name.values()]
    if not fed or not isinstance(fed[0], Tensor):
        raise InputError(
            f"{type(layer).__name__}: its first argument is no tensor, so its input cannot be "
            "quantized; leave it out with skip="
        )
    if fed[0].is_nested:
        raise InputError(
            f"{type(layer).__name__}: its input is a nested tensor, which cannot be quantized; "
            "make the nn.TransformerEncoder with enable_nested_tensor=False"
        )
    activation = getattr(layer, PLACE)
    done: dict[int, Tensor] = {}  # attention to itself is fed one tensor three times
    for x in fed:
        if id(x) not in done:
            done[id(x)] = activation(x)
    in_levels = {name: done[id(x)] for name, x in by_name.items()}
    return (*(done[id(x)] for x in inputs[:count]), *inputs[count:]), named | in_levels


def activations_in(model: nn.Module) -> dict[str, BinaryActivation]:
    """Return the model's binary activations by the names of their layers."""
    modules = uncompiled(model).named_modules()
    found = ((name, m) for name, m in modules if isinstance(m, BinaryActivation))
    return {name.removesuffix(PLACE).removesuffix("."): module for name, module in found}


def act_bit(model: nn.Module) -> int:
    """Return the bits of the model's activations, 0 where all are float."""
    return max((len(each.gamma) for each in activations_in(model).values()), default=0)


def check_places(model: nn.Module) -> None:
    """Raise InputError for a module under the name that files know activations by."""
    for name, module in uncompiled(model).named_modules():
        if name.rpartition(".")[2] == PLACE and not isinstance(module, BinaryActivation):
            raise InputError(f"{name}: files keep activations' levels under this name; rename it")


def is_activations(name: str) -> bool:
    """Tell whether a name in a state dict is of what a `BinaryActivation` keeps."""
    return PLACE in name.split(".")[:-1]


def activation_bits(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bits of the activations in a network's state dict by the names of their layers.

    Raises: InputError if what it holds under their names is none.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if is_activations(name):
            path, _, key = name.rpartition(".")
            found.setdefault(path.removesuffix(PLACE).removesuffix("."), {})[key] = value
    for name, kept in found.items():
        shapes = {key: tuple(value.shape) for key, value in kept.items()}
        if shapes not in ({"gamma": (bits,), "lowest": ()} for bits in range(1, MOST_BITS + 1)):
            raise InputError(f"{name}: its activations' levels are of no use: {shapes}")
    return {name: len(kept["gamma"]) for name, kept in found.items()}


def layers_of_activations(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Return the model's layers, and the bits of their inputs, that a network's `state` names.

    Raises: InputError for a layer that `model` does not have.
    """
    bits, layers = activation_bits(state), owners(model, quantizable(model))
    if lacking := [name for name in bits if name not in layers]:
        raise InputError(f"{lacking[0]}: has binary activations there, and is no layer here")
    return layers, bits


def restore_activations(
    model: nn.Module, state: Mapping[str, Tensor], like: Tensor | None = None
) -> None:
    """Make the places that the activations in a network's `state` go to, where `model` has none.

    `like` is that of `place`.
    Raises: InputError as `layers_of_activations`; the model then is as it was.
    """
    layers, bits = layers_of_activations(model, state)
    own = activations_in(model)
    place(layers, {name: M for name, M in bits.items() if name not in own}, like)
