"""A whole network that computes from the bits of its weights: made of one, or read from a file."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.packed import explain_damage, read_bits, untied_state
from ..method.activations import choices
from ..method.checks import check_of_model
from ..method.network import quantizable, uncompiled
from ..method.quantized_inputs import activations_in, quantize_input, restore_activations
from ..method.structures import Grouping
from ..method.weight import MultiBitWeight
from .compute import blocks_to_decode
from .folding import fold_batch_norms
from .kinds import PACKED
from .layers import PackedLayer
from .plan import KINDS, held_layers
from .rows import Rows, groups_of_rows, rows_of_file, rows_of_weight


def pack_for_inference(
    model: nn.Module, weights: Sequence[MultiBitWeight], tables: str = "float32"
) -> nn.Module:
    """Return a network like `model` that computes from bits; `model` stays as it is.

    Its quantized `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` hold bits, coordinates and biases, and
    those batch norms that directly follow them are folded in; activations in binary bases stay.
    Layers of other kinds, or with hooks of yours, keep float32 weights. The network is in
    evaluation mode and on the CPU or wherever `model` is.

    Arguments:
        weights: all of the model's multi-bit weights, as `alq.quantize` returned them.
        tables: "float32", which computes what `model` does but for rounding, or "int16", which
            rounds each picture's inputs of a layer, as finely as fits (docs/inference.md).

    Raises: InputError names a layer that is not float32 or does not hold its w_hat.
    """
    check_tables(tables)
    model = uncompiled(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight in weights:
        check_of_model(weight, [parameters.get(weight.name)])
    rows: Layers = {
        weight.name: (weight.grouping, partial(rows_of_weight, weight)) for weight in weights
    }
    packed = skeleton(model, [parameters[name] for name in rows])
    device = next((weight.parameter.device for weight in weights), torch.device("cpu"))
    return finish(replace_layers(packed, rows, tables, device))


def load_for_inference(path: str | Path, model: nn.Module, tables: str = "float32") -> nn.Module:
    """Return the network in the packed file `path`, as `pack_for_inference` makes it.

    `model` is the same network, trained or not, or without memory (made under
    `torch.device("meta")`); it stays as it is. The float32 weights are never made, but for those
    of layers that cannot be packed. The result is on the CPU.

    Raises: InputError as `load_packed` does, and for values of `model` that no file holds.
    """
    check_tables(tables)
    model = uncompiled(model)
    layers, rest = read_bits(path, untied_state(model, shapes_only=True))
    parameters = quantizable(model)
    if not {layer.name for layer in layers} <= set(parameters):
        raise InputError(f"{path}: holds another network: layers {[x.name for x in layers]}")
    packed = skeleton(model, [parameters[layer.name] for layer in layers])
    with torch.no_grad(), explain_damage(path):
        restore_activations(packed, rest, like=torch.zeros((), dtype=torch.float32, device="cpu"))
        rows: Layers = {
            layer.name: (layer.grouping, partial(rows_of_file, layer)) for layer in layers
        }
        packed = replace_layers(packed, rows, tables, torch.device("cpu"))
        packed.load_state_dict(own_tensors(packed, rest), strict=False, assign=True)
    for activation in activations_in(packed).values():  # what no file needs to hold
        activation.choices = choices(len(activation.gamma)).to(activation.gamma)
    for name, value in [*packed.named_parameters(), *packed.named_buffers()]:
        if value.is_meta:
            raise InputError(f"{name}: is in no file; make the model with memory for it")
    return finish(packed.to("cpu"))


Layers = dict[str, tuple[Grouping, Callable[[], Rows]]]


def skeleton(model: nn.Module, quantized: Sequence[nn.Parameter]) -> nn.Module:
    """Return a copy of `model` whose `quantized` parameters have no memory."""
    check_forwards(model)
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in quantized
    }
    for module in model.modules():
        for value in vars(module).values():  # such as what torch.nn.utils.prune computes
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def check_forwards(model: nn.Module) -> None:
    """Raise InputError for a `forward` that stands on a module and not in its class.

    In a copy it would go on with the model's own layers.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise InputError(
                f"{name}: is compiled on its own; give the network with it as it was, and compile "
                "the whole"
            )
        if "forward" in vars(module):
            raise InputError(
                f"{name or 'the network'}: its forward was replaced on the module itself, which a "
                f"packed copy cannot follow; put it into the class ({type(module).__name__})"
            )


def replace_layers(
    model: nn.Module, layers: Layers, tables: str, device: torch.device
) -> nn.Module:
    """Return `model` with packed layers in place of those that multiply by `layers`' weights."""
    root = nn.ModuleDict({"network": model})  # for a network that is one layer itself
    users = users_of_parameters(root)
    for name, (grouping, make_rows) in layers.items():
        places = users[root.get_parameter(f"network.{name}")]
        rows = Rows(*(value.to(device) for value in vars(make_rows()).values()))
        modules = [root.get_submodule(path) for path, _ in places]
        if all(map(can_be_packed, modules)):
            made = {id(m): PACKED[type(m)](m, name, grouping, rows, tables) for m in modules}
            for (path, _), module in zip(places, modules, strict=True):
                root.set_submodule(path, made[id(module)])
        else:
            blocks = blocks_to_decode(rows, grouping)
            groups = torch.cat([groups_of_rows(rows, grouping.n, *block) for block in blocks])
            weight = nn.Parameter(grouping.to_weight(groups.flatten(0, 1)).contiguous())
            for (_, own), module in zip(places, modules, strict=True):
                setattr(module, own, weight)
    return root["network"]


def check_tables(tables: str) -> None:
    if tables not in KINDS:
        raise InputError(f"tables: '{tables}' is none; choose from {', '.join(KINDS)}", "tables")


def users_of_parameters(model: nn.Module) -> dict[Tensor, list[tuple[str, str]]]:
    """Return every place (path of the module, name in it) of each parameter."""
    users: dict[Tensor, list[tuple[str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append((path, own))
    return users


def can_be_packed(module: nn.Module) -> bool:
    """Return whether a packed layer does all that `module` does."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return type(module) in PACKED and all(hook is quantize_input for hook in hooks)


def own_tensors(model: nn.Module, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a file under all the names that `model` has for them."""
    names: dict[Tensor, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(value, []).append(name)
    found: dict[str, Tensor] = {}
    for aliases in names.values():
        saved = next((rest[name] for name in aliases if name in rest), None)
        if saved is not None:
            found |= dict.fromkeys(aliases, saved)
    return found


def finish(model: nn.Module) -> nn.Module:
    """Return `model` ready to compute: in evaluation mode, norms folded, small weights held."""
    model.eval().requires_grad_(False)
    fold_batch_norms(model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else torch takes the weights, and calls no layer
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    held = held_layers({layer.name: layer.grouping.numel for layer in layers})
    for layer in layers:
        if layer.name in held:
            layer.hold()
    return model
