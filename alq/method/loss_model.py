"""The quadratic model of the loss that every step minimises (docs/method.md, Loss model).

Loss(w_hat + d)  ~  Loss(w_hat) + p.d + 1/2 d.(h*d)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .codes import on_accelerator


class AMSGrad(NamedTuple):
    """The numbers of AMSGrad: learning rate, decay of the two moments, and eps."""

    lr: float
    betas: tuple[float, float]
    eps: float

    def at(self, t: int) -> tuple[float, float, float]:
        """Return lr/(1-beta1^t), 1/sqrt(1-beta2^t) and eps, of the loss model after `t` updates."""
        beta1, beta2 = self.betas
        return self.lr / (1 - beta1**t), (1 - beta2**t) ** -0.5, self.eps


def update_moments(
    g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, betas: tuple[float, float]
) -> None:
    """Update AMSGrad's moments with gradient `g`, in place; all of one shape.

    m = beta1*m + (1-beta1)*g;   v = beta2*v + (1-beta2)*g*g;   v_max = max(v_max, v)
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    torch.maximum(v_max, v, out=v_max)


def pseudo_gradient_and_hessian(
    m: Tensor, v_max: Tensor, p_factor: float, h_factor: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return p and h, new tensors of m's shape; the numbers are `AMSGrad.at(t)`.

        p = lr/(1-beta1^t) * m
        h = (sqrt(v_max) + eps) / sqrt(1-beta2^t)

    The learning rate sits in p, so that the unconstrained minimum d = -p/h is one AMSGrad step.
    """
    root = v_max.sqrt()
    if on_accelerator(root):  # an operation less
        return m * p_factor, torch.rsub(root, eps * h_factor, alpha=-h_factor)
    return m * p_factor, root.add_(eps).mul_(h_factor)
