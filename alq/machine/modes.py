"""How a model computes for a while: in eval mode, or eagerly though it was compiled."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


def eagerly() -> AbstractContextManager:
    """Return a context in which compiled models compute eagerly."""
    return torch.compiler.set_stance("force_eager") if anything_compiled() else nullcontext()


def anything_compiled() -> bool:
    """Return whether torch.compile may have been used; to import it to ask would take seconds."""
    return "torch._dynamo" in sys.modules
