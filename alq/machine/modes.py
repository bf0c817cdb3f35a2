"""How a model computes: in eval mode, eagerly though it was compiled, again within backward."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within `with`; every module's mode is put back after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within `with`, and compute eagerly what was compiled."""
    eagerly = torch.compiler.set_stance("force_eager") if anything_compiled() else nullcontext()
    with eval_mode(model), eagerly:
        yield


def anything_compiled() -> bool:
    """Return whether torch.compile may have been used; to import it to ask would take seconds."""
    return "torch._dynamo" in sys.modules


def in_backward() -> bool:
    """Return whether a backward pass is under way.

    Activation checkpointing computes a forward pass again there, which is to give what the first
    one gave.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
