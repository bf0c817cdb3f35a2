"""What callers can get wrong about multi-bit weights: InputError, in one line."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import InputError
from .weight import MultiBitWeight


def list_of(weights: Iterable[MultiBitWeight]) -> list[MultiBitWeight]:
    """Return the multi-bit weights as a list; InputError if they are a single one."""
    if isinstance(weights, MultiBitWeight):
        raise InputError("weights: is a single one; pass the list of all", "weights")
    return list(weights)


def check_weights(weights: Sequence[MultiBitWeight]) -> None:
    """Check that these are multi-bit weights, at least one, and each once."""
    if not weights or not all(isinstance(weight, MultiBitWeight) for weight in weights):
        what = "not all are multi-bit weights" if weights else "none given"
        raise InputError(f"weights: {what}; pass what alq.quantize(model) returned", "weights")
    if len({weight.parameter for weight in weights}) < len(weights):
        raise InputError("weights: one of them is given twice; give each once", "weights")


def check_gradients(weights: Sequence[MultiBitWeight]) -> None:
    """Check that each weight has a gradient, and is what it was when quantized."""
    for weight in weights:
        if weight.parameter.grad is None:
            if not weight.parameter.requires_grad:
                why = "its requires_grad is False; set it, or leave the layer out with skip="
            elif any(other.parameter.grad is not None for other in weights):
                why = "no batch has reached it; leave the layer out with skip= if none does"
            else:
                why = "nor has any other; call backward() first, on this model and not on a copy"
            raise InputError(f"{weight.name}: no gradient; {why}")
        check_type(weight)


def check_type(weight: MultiBitWeight) -> None:
    """Check that the weight was neither converted nor moved since it was quantized."""
    now, then = ((x.dtype, x.device) for x in (weight.parameter, weight.alpha))
    if now != then:
        raise InputError(
            f"{weight.name}: was {then[0]} on {then[1]} when it was quantized and is {now[0]} on "
            f"{now[1]}; convert and move the model before alq.quantize"
        )


def check_named(weight: MultiBitWeight, state: Mapping[str, Tensor]) -> None:
    """Check that a model's `state` has the weight's parameter by its name, which holds w_hat."""
    own = state.get(weight.name)
    others = [name for name, value in state.items() if value is weight.parameter]
    if others and own is not weight.parameter:
        raise InputError(
            f"{weight.name}: is {others[0]} in this model; give the model that alq.quantize was "
            "given (of DistributedDataParallel its .module)"
        )
    check_of_model(weight, [own])


def check_of_model(weight: MultiBitWeight, parameters: Iterable[Tensor | None]) -> None:
    """Check that the weight's is one of the model's `parameters`, and holds w_hat."""
    if not any(parameter is weight.parameter for parameter in parameters):
        raise InputError(
            f"{weight.name}: is not this model's; give the weights of this model (a copy of it, "
            "and load_state_dict(assign=True), have other parameters)"
        )
    check_type(weight)
    if not torch.equal(weight.parameter, weight.w_hat()):
        raise InputError(
            f"{weight.name}: the parameter does not hold w_hat (it was changed, or is not finite); "
            "weight.write() puts the last w_hat there, and alq.restore(model, states) the w_hat "
            "of saved weight.state_dict(), which model.load_state_dict() does not bring back"
        )


def check_shape(name: str, value: Tensor) -> None:
    """Check that `value` is not of a lazy layer that has seen no batch."""
    if isinstance(value, UninitializedParameter):
        raise InputError(f"{name}: has no shape yet; pass a batch through the model first")


def check_memory(name: str, value: Tensor) -> None:
    """Check that `value` holds numbers, and does not lie on the device "meta"."""
    if value.is_meta:
        raise InputError(f"{name}: has no memory; use model.to_empty(device=...) first")


def check_apart(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """InputError if another parameter lies in the memory of one of `parameters`."""
    quantized = set(parameters.values())
    first: dict[tuple, tuple[str, nn.Parameter]] = {}
    for name, own in model.named_parameters():
        if isinstance(own, UninitializedParameter) or not own.data_ptr():  # as on "meta"
            continue
        other, parameter = first.setdefault((own.device, own.data_ptr()), (name, own))
        if parameter is not own and not quantized.isdisjoint((own, parameter)):
            raise InputError(
                f"{name}: lies in the memory of {other}, but is another parameter; make them one "
                "(b.weight = a.weight), or give it memory of its own (.clone())"
            )


def check_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """InputError if one of `parameters` cannot be trained as a multi-bit weight."""
    quantized: dict[object, str] = {parameter: name for name, parameter in parameters.items()}
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
            continue
        if module.weight in quantized:
            raise InputError(
                f"{quantized[module.weight]}: its embedding has max_norm, which changes the weight "
                "whenever it is used; leave it out with skip=, or set max_norm to None"
            )
    for name, parameter in parameters.items():
        check_memory(name, parameter)


def warn_of_size(weight: MultiBitWeight) -> None:
    """Warn of a layer without bits, and of one whose coordinates take more bytes than float32."""
    if not weight.live_total:
        warnings.warn(
            f"{weight.name}: all its weights are 0, so it gets no bits and stays 0; train the "
            "network first, or leave the layer out with skip=",
            stacklevel=3,
        )
    full = 4 * weight.grouping.numel
    if weight.storage_bytes > full:
        warnings.warn(
            f"{weight.name}: its groups of {weight.n} weights take "
            f"{weight.storage_bytes:.0f} bytes at {weight.bitwidth:.3g} bit, "
            f"more than the {full} of float32; choose larger groups "
            "(structure, subc), a smaller max_bit, or leave it out with skip=",
            stacklevel=3,
        )
