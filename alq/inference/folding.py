"""Batch norm that directly follows a packed layer becomes part of its coordinates and its bias.

Where it follows is read from a trace of the network (torch.fx). It is folded where that shows the
layer and the norm each called once, the norm on the layer's output, and nothing else on that nor on
the layer's own tensors. A network that cannot be traced, or takes more than one argument and so may
compute in several ways, keeps its norms as they are.
"""

import inspect
from collections import Counter

import torch
from torch import Tensor, fx, nn

from .layers import PackedLayer


class Tracer(fx.Tracer):
    """Steps into all modules but PyTorch's and the packed ones; shows who reads a buffer."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PackedLayer) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(model: nn.Module) -> None:
    """Fold what can be folded of `model`, which is in evaluation mode."""
    for layer_name, norm_name in foldable(model):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        fold(layer, norm)  # type: ignore[arg-type]
        for name, module in [*model.named_modules(remove_duplicate=False)]:
            if module is norm:  # under each of its names
                model.set_submodule(name, nn.Identity())


def foldable(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of layers and of the batch norms that can be folded into them."""
    if len(inspect.signature(model.forward).parameters) != 1:
        return []
    try:
        graph = Tracer().trace(model)
    except Exception:  # whatever a network that is not made for tracing raises
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = {node: model.get_submodule(str(node.target)) for node in calls}
    count = Counter(map(id, modules.values()))
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    pairs = []
    for node, norm in modules.items():
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        layer = modules.get(before) if isinstance(before, fx.Node) else None
        if layer is None or not isinstance(before, fx.Node):
            continue
        if len(before.users) > 1 or count[id(layer)] > 1 or count[id(norm)] > 1:
            continue
        if str(before.target) in read:  # by something that wants the weights as they are
            continue
        if isinstance(layer, PackedLayer) and fits(layer, norm):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def fits(layer: PackedLayer, norm: nn.Module) -> bool:
    """Return whether `norm` scales the layer's outputs by numbers that are known."""
    kind = nn.BatchNorm2d if layer.axes == 2 else nn.BatchNorm1d
    return (
        type(norm) is kind
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.running_mean.dtype == layer.alpha.dtype == torch.float32
        and norm.num_features == layer.grouping.shape[0]
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def fold(layer: PackedLayer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Make the layer compute what the norm would of its output."""
    mean, var = (value.double() for value in (norm.running_mean, norm.running_var))  # type: ignore
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    bias = -mean if layer.bias is None else layer.bias - mean
    shift: Tensor | float = 0.0 if norm.bias is None else norm.bias.detach()
    layer.bias = (bias * scale + shift).float()
    layer.alpha = (layer.alpha * scale[layer.outputs.long()]).float()
    layer.normalised = True
