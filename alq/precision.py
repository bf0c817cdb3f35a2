"""Products in full float32, whatever the caller of a step has allowed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Without autocast, and without TensorFloat-32 or bfloat16 in float32 matrix products.

    The caller's settings, by torch's older interface or its newer one, are put back.
    """
    backends = [getattr(torch.backends, name) for name in ("cuda", "mkldnn")]
    backends = [getattr(backend, "matmul", None) for backend in backends]
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface was used, so the older one does not answer
        older = None
    torch.set_float32_matmul_precision("highest")  # in both interfaces
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, newer, strict=True):
            backend.fp32_precision = precision


def optimizer_step(step: Callable) -> Callable:
    """Decorator of `ALQ`'s steps: no autograd, and `float32_products` on the weights' device."""

    @wraps(step)
    def guarded(self, *arguments: object, **named: object) -> None:
        with torch.no_grad(), float32_products(self.weights[0].parameter.device):
            step(self, *arguments, **named)

    return guarded
