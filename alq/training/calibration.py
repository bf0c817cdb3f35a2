"""Binary activations fit themselves to a stage's first batches, before its first step."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..errors import InputError
from ..machine.modes import evaluation
from ..method.network import quantizable
from ..method.quantized_inputs import PLACE, activations_in, owners
from .epoch import Batches
from .loop import Training, batches_left, set_epoch

BATCHES = 16  # after as many a running average of decay 0.9 has forgotten most of the first


@torch.no_grad()
def calibrate(training: Training, train_batches: Batches) -> None:
    """Fit the activations of the stage's network, if it has any, to BATCHES batches.

    All else is in eval mode and stays as it is; so does the order of the stage's batches.

    Raises: InputError if the layer that is called first is fed binary activations.
    """
    model, activations = training.model, activations_in(training.model)
    if not activations:
        return
    set_epoch(train_batches, training.first_order, 0)
    batches = itertools.islice(batches_left(train_batches, 0), BATCHES)
    with evaluation(model):
        for activation in activations.values():
            activation.train()
        for number, (batch, _) in enumerate(batches):
            with nullcontext() if number else first_layer_checked(model):
                training.loss(model, batch)


@contextmanager
def first_layer_checked(model: nn.Module) -> Iterator[None]:
    """Raise InputError after a batch if the layer that was called first has binary activations."""
    called: list[str] = []
    layers = owners(model, quantizable(model))
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if called and hasattr(layers[called[0]], PLACE):
        raise InputError(
            f"{called[0]}: is the first layer that is called, but its input is quantized; give "
            "quantize_activations the name of its weight as first"
        )
