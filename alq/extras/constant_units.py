"""Units without bits give a constant: it moves into the biases behind them, for a smaller file.

Pruning leaves many a unit without any bit. What it gives is its bias, passed through whatever comes
before the next layer: a constant v. In that layer,

    y = W x + b,  x_c = v    =>    b <- b + W_c v - W'_c v',  with any other signs in column W'_c

so the signs that multiply it are free, and so is the unit's own bias, which may make it v'. The
smallest file (`alq.files.small`) stores neither once the signs are + and the bias is 0. A group
that multiplies nothing but constants goes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..machine.modes import evaluation
from ..method.quantized_inputs import activations_in
from ..method.weight import MultiBitWeight, prune
from .probing import (
    Layer,
    Layers,
    constant_inputs,
    first_outputs,
    layers_of,
    moves,
    outputs,
    reaches_elsewhere,
    without_bits,
)

TOLERANCE = 1e-3  # of the largest output; rounding stays far below


@torch.no_grad()
def fold_constant_units(
    model: nn.Module, weights: Sequence[MultiBitWeight], inputs: Tensor
) -> None:
    """Fold the constants of units without bits; `model` in eval mode computes what it did.

    Where a constant cannot move, as into a layer without a bias, or past the padding of a
    convolution, all stays as it is; so it does in layers other than linear and convolutions.

    Arguments:
        weights: all of the model's multi-bit weights, as `alq.quantize` returned them.
        inputs: a batch for the model, of floats, on which its outputs are compared. Sequences and
            pictures in it are of the size that the network is used on: what is constant is decided
            on their positions. Where a layer sees only one position, nothing is.

    Raises: InputError if the outputs would change; if the model has activations in binary bases,
    does not take such inputs, or takes or returns anything but a tensor of floats. After an error
    of any kind the model is as before.
    """
    if activations_in(model):
        raise InputError("fold: the model's activations are in binary bases, not in float", "fold")
    layers = layers_of(model, weights)
    states = [weight.state_dict() for weight in layers]
    biases = {layer.bias: layer.bias.clone() for layer in layers.values() if layer.bias is not None}
    try:
        with evaluation(model):
            before = first_outputs(model, inputs)
            while fold_once(model, layers, inputs):
                pass
            check_change(outputs(model, inputs), before)
    except BaseException:  # an interruption, too, must not leave it half folded
        for weight, state in zip(layers, states, strict=True):
            weight.load_state_dict(state)
        for bias, value in biases.items():
            bias.copy_(value)
        raise


def check_change(after: Tensor, before: Tensor) -> None:
    """Raise InputError if outputs have changed by more than rounding."""
    change = (after - before).abs().max()
    if not change <= TOLERANCE * before.abs().max():
        raise InputError(
            f"fold: outputs would change by {change:.2g}; the model does more with its constants "
            "than pass them from layer to layer",
            "fold",
        )


def fold_once(model: nn.Module, layers: Layers, inputs: Tensor) -> bool:
    """Fold what is constant now; return whether that has changed anything."""
    now = constant_inputs(model, layers, inputs)
    biases = {}  # of layers that have units without bits, as they were
    for weight, layer in layers.items():
        dead = without_bits(weight)
        if layer.bias is not None and layer.bias[dead].any():
            biases[weight] = layer.bias.clone()
            layer.bias[dead] = 0
    while True:
        then = constant_inputs(model, layers, inputs)
        free = {weight: can_move(layers[weight], now[weight], then[weight]) for weight in layers}
        back = [w for w in biases if reaches_elsewhere(model, layers, inputs, w, free)]
        if not back:
            break
        for weight in back:  # what depends on them is no longer 0, and may not be free
            layers[weight].bias.copy_(biases.pop(weight))  # type: ignore[union-attr]
    changed = bool(biases)
    for weight, layer in layers.items():
        changed |= release(weight, layer, free[weight], now[weight], then[weight])
    return changed


def can_move(layer: Layer, now: Tensor, then: Tensor) -> Tensor:
    """Return (C,) bool, for which inputs the layer's bias can make up; NaN is not constant.

    These inputs were `now`, and are `then` as biases of units without bits became 0. Of a padded
    convolution some outputs see the padding and not the constant, unless it is 0.
    """
    if not moves(layer):
        return (now == 0) & (then == 0)
    return ~(now.isnan() | then.isnan())


def release(weight: MultiBitWeight, layer: Layer, free: Tensor, now: Tensor, then: Tensor) -> bool:
    """Make the signs that multiply the `free` inputs (C,) +; return whether that changed any.

    These inputs were `now`, and are `then`; the bias makes up for it.
    """
    if not free.any():
        return False
    before = by_input(weight.w_hat())
    columns = free[weight.grouping.inputs_of().to(free.device)]  # (G, n)
    nothing_else = weight.mask & columns.all(1, keepdim=True)  # (G, I)
    plus = (2 ** weight.mask.sum(1, keepdim=True) - 1).to(torch.uint8)  # (G, 1)
    codes = torch.where(columns, plus, weight.codes)
    changed = bool(nothing_else.any() or (codes != weight.codes).any())
    weight.set_form(codes, weight.alpha, weight.mask)
    prune([weight], [nothing_else])
    if layer.bias is not None:
        moved = before * now.double() - by_input(weight.w_hat()) * then.double()
        layer.bias += moved[:, free].sum(1).to(layer.bias.dtype)
    return changed


def by_input(w_hat: Tensor) -> Tensor:
    """Return what each output gets of a constant 1 at each input, (O, C) in float64."""
    return w_hat.double().flatten(2).sum(2) if w_hat.dim() > 2 else w_hat.double()
