"""`CompiledALQ`: the quantizer with its steps compiled."""

from functools import cache
from types import ModuleType
from typing import Any

import torch

from ..errors import InputError
from ..method import steps
from ..method.optimizer import ALQ
from ..method.weight import MultiBitWeight
from . import compiled_steps


class CompiledALQ(ALQ):
    """`ALQ`, compiled. The first step with each number of live bases L takes seconds to compile."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        require_compiler(self.weights[0].parameter.device)

    def arithmetic(self, weight: MultiBitWeight) -> Any:
        """Return the compiled steps; the eager ones without live bases or in another type."""
        can_compile = weight.L > 0 and weight.parameter.dtype == torch.float32
        return steps_for(weight.parameter.device) if can_compile else steps


def steps_for(device: torch.device) -> ModuleType:
    """Return the module of compiled steps: kernels in Triton on CUDA, elsewhere `torch.compile`'s.

    Raises: ImportError where Triton is needed and not installed.
    """
    if device.type != "cuda":
        return compiled_steps
    from . import fused_steps  # imports Triton, which nothing else needs

    return fused_steps


def quantizer_class(compile: bool) -> type[ALQ]:
    """Return the class that `--compile` chooses."""
    return CompiledALQ if compile else ALQ


@cache
def require_compiler(device: torch.device) -> None:
    """InputError if no kernel can be made for `device`."""
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    w_hat = torch.zeros(4, 64, device=device)
    try:
        # One of the kernels themselves: trivial ones work where vector code cannot be compiled.
        steps_for(device).rebuild(codes, torch.ones(4, 1, device=device), w_hat)
    except Exception as error:  # whatever is missing: torch has no one class for it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"compile: torch.compile does not work for {device} here ({reason[0]}); "
            "install a C++ compiler such as g++ (for CUDA also triton), or leave it out",
            "compile",
        ) from error
