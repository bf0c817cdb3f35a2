"""Whole networks: which of their parameters are quantized, and all of them at once."""

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Number
from typing import Any

from torch import nn

from ..errors import InputError
from .checks import check_apart, check_layers, check_memory, check_shape, warn_of_size
from .structures import Grouping, make_grouping
from .weight import MultiBitWeight

# Names of parameters, or a predicate on (name, parameter) that is true for those left alone.
Skip = Collection[str] | Callable[[str, nn.Parameter], bool]


# Layers whose `weight` scales values one by one, and multiplies nothing.
SCALES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
# What recurrent layers and attention call the matrices that they multiply by.
RECURRENT = ("weight_ih", "weight_hh", "weight_hr")
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def quantizable(model: nn.Module, skip: Skip = ()) -> dict[str, nn.Parameter]:
    """Return the parameters that the model's layers multiply by, in `named_parameters` order.

    These are all named `weight` with two or more dimensions (linear layers, convolutions,
    embeddings, layers of one's own), but for those of `SCALES`; and the matrices of recurrent
    layers and of attention, which have other names. What a reparametrisation computes, such as the
    weight of `weight_norm`, `spectral_norm` or `torch.nn.utils.prune`, is no parameter.

    A parameter that modules share appears once, under the first of its names, and is left out if
    `skip` takes any of them.

    Raises: InputError for a name in `skip` that no parameter has, and for a lazy layer that has
    not seen its first batch.
    """
    model = uncompiled(model)
    names: dict[nn.Parameter, list[str]] = {}  # all names of each parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    skipped = _predicate(skip, {name for aliases in names.values() for name in aliases})
    matrices = matrix_names(model)
    chosen = {}
    for parameter, aliases in names.items():
        weights = [name for name in aliases if name in matrices]
        if not weights or any(skipped(name, parameter) for name in aliases):
            continue
        check_shape(weights[0], parameter)
        if parameter.dim() > 1 and parameter.numel():
            chosen[weights[0]] = parameter
    return chosen


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, whose parameters have their own names."""
    return getattr(model, "_orig_mod", model)


def matrix_names(model: nn.Module) -> set[str]:
    """Return all names of parameters that are matrices by their layer and their own name."""
    found = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, _ in module.named_parameters(recurse=False):
            if (
                (name == "weight" and not isinstance(module, SCALES))
                or (isinstance(module, nn.RNNBase | nn.RNNCellBase) and name.startswith(RECURRENT))
                or (isinstance(module, nn.MultiheadAttention) and name in ATTENTION)
            ):
                found.add(f"{path}.{name}" if path else name)
    return found


def _predicate(skip: Skip, names: set[str]) -> Callable[[str, nn.Parameter], bool]:
    if callable(skip):
        return skip
    wanted = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(wanted - names):
        raise InputError(f"skip: the model has no parameter '{unknown[0]}'", "skip")
    return lambda name, parameter: name in wanted


def transposed_groups(model: nn.Module, name: str) -> int:
    """Return the groups of the transposed convolution that parameter `name` is of, else 0."""
    module = uncompiled(model).get_submodule(name.rpartition(".")[0])
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return module.groups if isinstance(module, transposed) else 0


def quantize(
    model: nn.Module,
    structure: str | Sequence[str] | None = None,
    subc: int | Sequence[int] | None = None,
    max_bit: int | Sequence[int] = 6,
    skip: Skip = (),
) -> list[MultiBitWeight]:
    """Sketch every quantizable weight of `model` in place: each parameter then holds its w_hat.

    Arguments:
        structure, subc, max_bit: one value for all layers or one per layer, in
            `named_parameters` order. None chooses by the kind of layer. In a
            list, `subc` is 0 for layers whose structure has no pieces.
        skip: parameters left alone: their names, or a predicate on (name, parameter).

    Raises: InputError names the layer that a value does not fit.
    """
    parameters = quantizable(model, skip)
    check_layers(uncompiled(model), parameters)
    check_apart(uncompiled(model), parameters)
    weights = [
        MultiBitWeight.from_parameter(name, parameters[name], grouping, bit)
        for name, (grouping, bit) in groupings(model, structure, subc, max_bit, skip).items()
    ]
    for weight in weights:
        weight.write()
        warn_of_size(weight)
    return weights


def groupings(
    model: nn.Module,
    structure: str | Sequence[str] | None = None,
    subc: int | Sequence[int] | None = None,
    max_bit: int | Sequence[int] = 6,
    skip: Skip = (),
) -> dict[str, tuple[Grouping, int]]:
    """Return every layer's grouping and largest bitwidth, as `quantize` would take them.

    Of the model only the shapes count, so that it may lie on the device "meta".

    Raises: InputError as `quantize` does.
    """
    parameters = quantizable(model, skip)
    if not parameters:
        raise InputError(
            "the model has no weight to quantize (a `weight` with two or more dimensions)"
        )
    names = list(parameters)
    structures = per_layer("structure", structure, names)
    pieces = per_layer("subc", subc, names)
    bits = per_layer("max_bit", max_bit, names)
    found = {}
    for name, asked, parts, bit in zip(names, structures, pieces, bits, strict=True):
        transposed = transposed_groups(model, name)
        bit = whole_number(name, "max_bit", bit)
        parts = parts if parts is None else whole_number(name, "subc", parts)
        grouping = make_grouping(name, tuple(parameters[name].shape), asked, parts, transposed)
        found[name] = grouping, bit
    return found


def restore(model: nn.Module, states: list[dict]) -> list[MultiBitWeight]:
    """Return the multi-bit weights of `model` of saved `states`; parameters get their w_hat.

    Layers are found by name; those without a state (`skip` of `quantize`) are left alone.
    """
    parameters = quantizable(model)
    saved = [state["name"] for state in states]
    for name in saved:
        if name not in parameters:
            raise InputError(
                f"{name}: is in the saved weights, but not in this network; give the network that "
                "was saved"
            )
        if saved.count(name) > 1:
            raise InputError(f"{name}: is in the saved weights twice; give each once")
    weights = []
    for state in states:
        parameter = parameters[state["name"]]
        check_memory(state["name"], parameter)
        grouping = make_grouping(
            state["name"],
            tuple(parameter.shape),
            state["structure"],
            state["subc"] or None,
            transposed_groups(model, state["name"]),
        )
        weights.append(MultiBitWeight.from_state(state["name"], parameter, grouping, state))
    for weight in weights:  # once all have been found to fit
        weight.write()
    return weights


def per_layer(option: str, value: Any, names: Sequence[str]) -> list:
    """Return `value` for each of the layers `names`; InputError if a list has another length."""
    if value is None or isinstance(value, str | Number):
        return [value] * len(names)
    if not isinstance(value, Sequence):
        raise InputError(
            f"{option}: is a {type(value).__name__}; give one value for all layers or a list, in "
            f"the order {', '.join(names)}",
            option,
        )
    if len(value) != len(names):
        raise InputError(
            f"{option}: {len(value)} values for {len(names)} quantized layers "
            f"({', '.join(names)}); give one for all or one for each",
            option,
        )
    return list(value)


def whole_number(name: str, option: str, value: Any) -> int:
    """Return `value` of layer `name` as an int; InputError if it is none."""
    if isinstance(value, Integral):
        return int(value)
    raise InputError(f"{name}: {option} {value!r} is no whole number")


def average_bitwidth(weights: Sequence[MultiBitWeight]) -> float:
    """Return the mean bitwidth over layers, weighted by their numbers of weights."""
    numel = math.fsum(weight.grouping.numel for weight in weights)
    return math.fsum(weight.bitwidth * weight.grouping.numel for weight in weights) / numel


def storage_bytes(weights: Sequence[MultiBitWeight]) -> float:
    """Return the bytes of the quantized weights: of all live coordinates and their bases."""
    return math.fsum(weight.storage_bytes for weight in weights)
