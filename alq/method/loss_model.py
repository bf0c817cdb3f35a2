"""The quadratic model of the loss that every step minimises (SPEC section 4; paper section 4.1).

Loss(w_hat + d)  ~  Loss(w_hat) + p.d + 1/2 d.(h*d)
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_moments(
    g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, betas: tuple[float, float]
) -> None:
    """AMSGrad's moments of gradient `g`, in place. All of one shape.

    m = beta1*m + (1-beta1)*g;   v = beta2*v + (1-beta2)*g*g;   v_max = max(v_max, v)
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    torch.maximum(v_max, v, out=v_max)


def pseudo_gradient_and_hessian(
    m: Tensor, v_max: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """p and h after `t` updates, new tensors of m's shape.

        p = lr/(1-beta1^t) * m
        h = (sqrt(v_max) + eps) / sqrt(1-beta2^t)

    The learning rate sits in p, so that the unconstrained minimum d = -p/h is one AMSGrad step.
    """
    return scale_moments(m, v_max, *scales(t, lr, betas), eps)


def scales(t: int, lr: float, betas: tuple[float, float]) -> tuple[float, float]:
    """What `pseudo_gradient_and_hessian` multiplies m and sqrt(v_max) + eps by."""
    beta1, beta2 = betas
    return lr / (1 - beta1**t), (1 - beta2**t) ** -0.5


def scale_moments(
    m: Tensor, v_max: Tensor, p_scale: float, h_scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """p and h from the two `scales`."""
    return m * p_scale, v_max.sqrt().add_(eps).mul_(h_scale)
