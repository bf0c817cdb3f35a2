"""Activations in binary bases: what a layer is fed becomes x_ref + sum_m gamma_m D_m.

With D_m in {-1, +1} elementwise, b_m = (1 + D_m) / 2 in {0, 1}, and one set (x_ref, gamma) a layer:

    levels     lowest + {0, 2 gamma_1} + ... + {0, 2 gamma_M}            2^M of them, ascending
               lowest = x_ref - sum_m gamma_m
    x_hat      the level nearest to x, which the midpoints of neighbours tell
               = lowest + sum_m 2 gamma_m b_m = x_ref + sum_m gamma_m D_m
    gradient   dLoss/dx = dLoss/dx_hat where levels[0] <= x <= levels[-1], else 0
    reach      x = clamp(x, 0, 1.25 (1 + M/2) mean of the x's above 0)   for the fit alone
    fit        theta = (lowest, 2 gamma_1, .., 2 gamma_M), C = (1, b_1, .., b_M) of each x
               (C^T C + R) d = C^T (x - x_hat),  R = 1e-4 times the number of x's
    update     theta = theta + 0.1 d;  gamma = max(gamma, 0)             once a training batch

The fit is the least squares of x on its codes, written for the change d: what the batch does not
determine stays as it is. 0.1 d makes it a running average of decay 0.9. Where the first batch has
zeros and nothing below, as behind ReLU, the lowest level is 0 and stays exactly that: its column of
C is 0. ReLU then changes nothing, and zero padding is a level. Once negative values come, the
lowest level is fitted as gamma is, and the reach is to both sides of the mean.
The reach keeps a few large values, as of one unit, from taking levels that all others need.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import InputError
from ..machine.modes import in_backward
from ..machine.processes import process_count, sum_over_processes

DECAY = 0.9  # of the running average, once a training batch
RIDGE = 1e-4  # of the fit, relative to the number of values
SAMPLE = 2**14  # values of a batch, over the whole of it, that its fit is of
PRIME = 2654435761  # steps of this length meet every place of a tensor before one comes again
FIRST_FITS = 30  # turns of codes, then fit, on the first batch
REACH = 1.25  # times the mean of |x| is a normal distribution's standard deviation
COUNTED_BITS = 3  # up to 2^3 levels it is faster to add up their steps than to search


def choices(M: int) -> Tensor:
    """Return every code behind a 1, (1, b_1, .., b_M), which gives its level: (2^M, M + 1)."""
    codes = torch.arange(2**M).unsqueeze(1) >> torch.arange(M)
    return torch.cat([torch.ones(2**M, 1), (codes & 1).float()], dim=1)


def midpoints(levels: Tensor) -> Tensor:
    """Return the midpoints of neighbours: (K,) ascending -> (K - 1,)."""
    return levels[:-1] / 2 + levels[1:] / 2


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest of `levels` (2^M,), ascending, to each x; halfway the lower one.

    What is not a number stays that. Memory keeps its order.
    """
    middle = midpoints(levels)
    if len(levels) <= 2**COUNTED_BITS:
        # x_hat = levels[0] + sum_k (levels[k+1] - levels[k]) [x > middle[k]]
        x_hat, above = x.clamp(levels[0], levels[0]), torch.empty_like(x)
        for step, low in zip(levels.diff(), middle, strict=True):
            x_hat.addcmul_(torch.gt(x, low, out=above), step)
        return x_hat
    order = in_memory(x)
    x = x.permute(order).contiguous()
    if torch.compiler.is_exporting():  # ONNX has no search
        rank = (x.unsqueeze(-1) > middle).sum(-1)
    else:
        rank = torch.bucketize(x, middle, out_int32=True)
    x_hat = levels[rank] + x.clamp(0, 0)  # of what is not a number the search makes one
    return x_hat.permute([order.index(k) for k in range(x.dim())])


def in_memory(x: Tensor) -> list[int]:
    """Return the dimensions of x from the outermost in memory to the innermost."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


class _StraightThrough(torch.autograd.Function):
    """`nearest_level`, with the gradient of a clamp to the range of the levels."""

    @staticmethod
    def forward(x: Tensor, levels: Tensor) -> Tensor:
        return nearest_level(x, levels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, levels = ctx.saved_tensors
        inside = torch.eq(x, x.clamp(levels[0], levels[-1]), out=torch.empty_like(x))
        return inside.mul_(gradient), None


def quantize(x: Tensor, levels: Tensor) -> Tensor:
    """Return the level nearest to each x, in x's type; its gradient is straight through."""
    return _StraightThrough.apply(x, levels.to(x.dtype))


def sample(x: Tensor) -> Tensor:
    """Return up to SAMPLE values spread over all of x, the same places for equal shapes (S,)."""
    flat = x.detach().permute(in_memory(x)).reshape(-1)  # a view, but for x that has gaps
    if flat.numel() <= SAMPLE:
        return flat
    places = torch.arange(SAMPLE, device=x.device) * PRIME % flat.numel()
    return flat[places]


def normal_equations(x: Tensor, theta: Tensor, C: Tensor) -> Tensor:
    """Return C^T C and C^T (x - x_hat) of the values x (S,), in one row.

    `theta` (M + 1,), `C` (2^M, M + 1) as `choices`. Rows of several batches add up.
    """
    levels, order = (C @ theta).sort()
    rank = torch.bucketize(x, midpoints(levels), out_int32=True)
    rows = C[order].index_select(0, rank)  # (S, M + 1)
    return torch.cat([(rows.T @ rows).flatten(), rows.T @ (x - levels.index_select(0, rank))])


def solve(sums: Tensor, theta: Tensor, from_zero: Tensor) -> Tensor:
    """Return the change d of `theta` (M + 1,), the lowest level's 0 `from_zero`, that fits best."""
    size = len(theta)
    A, b = sums[:-size].view(size, size), sums[-size:]
    free = torch.ones_like(theta)
    free[0] = ~from_zero
    R = RIDGE * A[0, 0].clamp(min=1) * torch.eye(size, dtype=A.dtype, device=A.device)
    return torch.linalg.solve_ex(free * A * free.unsqueeze(1) + R, free * b).result


def extent(x: Tensor, M: int, lowest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (low, high, from_zero): what the levels for most of the x's (S,) should reach.

    They are from 0 where no x is negative, and either `lowest` is 0 or, without it, some x is.
    """
    zeros, values = (x == 0).sum(dtype=x.dtype), x.new_full((), len(x))
    sums = sum_over_processes(torch.stack([x.sum(), x.clamp(max=0).sum(), zeros, values]))
    total, below, zeros, values = sums
    from_zero = (below == 0) & (zeros > 0 if lowest is None else lowest == 0)
    middle = torch.where(from_zero, 0, total / values)
    counted = (values - zeros * from_zero).clamp(min=1)
    reach = REACH * (1 + M / 2) * sum_over_processes((x - middle).abs().sum()) / counted
    return torch.where(from_zero, 0, middle - reach), middle + reach, from_zero


def start(x: Tensor, low: Tensor, high: Tensor, M: int) -> Tensor:
    """Return theta (M + 1,) of levels evenly from `low` to `high`, no wider than the x's (S,)."""
    width, processes = sum_over_processes(torch.stack([x.amax() - x.amin(), x.new_ones(())]))
    reach = torch.minimum(high - low, width / processes)
    steps = 2.0 ** torch.arange(M, dtype=x.dtype, device=x.device) / (2**M - 1)
    low = torch.where(low == 0, low, (low + high - reach) / 2)
    return torch.cat([low.reshape(1), reach * steps])


class BinaryActivation(nn.Module):
    """Puts the levels of M bits in the place of an input.

    It fits itself to the first batch that it sees of values that differ. From then on every batch
    in training mode moves the levels a little, and takes them so moved; in eval mode they stay.
    Several processes fit to the batches of all, so that training takes equally many in each.

    Attributes:
        gamma: (M,), not negative.
        lowest: (), the lowest level; x_ref is `lowest + gamma.sum()`.
        fitted: whether it has seen such a batch, or was loaded from one that had.
    """

    gamma: Tensor
    lowest: Tensor
    choices: Tensor

    def __init__(self, act_bit: int, like: Tensor) -> None:
        """Make one of `act_bit` bits; device and type of what it keeps are those of `like`."""
        super().__init__()
        self.register_buffer("gamma", like.new_full((act_bit,), torch.nan))  # until fitted
        self.register_buffer("lowest", like.new_zeros(()))
        self.register_buffer("choices", choices(act_bit).to(like), persistent=False)
        self.fitted = False

    @property
    def x_ref(self) -> Tensor:
        """The middle between the lowest and the highest level."""
        return self.lowest + self.gamma.sum()

    def levels(self) -> Tensor:
        """Return the 2^M levels, ascending."""
        return (self.choices[:, 1:] @ (2 * self.gamma) + self.lowest).sort().values

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat in x's shape and type."""
        with torch.autocast(x.device.type, enabled=False):
            if not self.fitted:
                if torch.compiler.is_exporting():
                    raise InputError("no batch has passed the model's activations; pass one first")
                self.fit_first(x)
            elif self.training and not in_backward():
                self.update(x)
            return quantize(x, self.levels())

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move the levels as the running average of the fits, by that to one batch."""
        x = self.values(x)
        low, high, from_zero = extent(x, len(self.gamma), self.lowest)
        self.put(self.refitted(x.clamp(low, high), self.theta(), from_zero, 1 - DECAY))

    @torch.compiler.disable
    @torch.no_grad()
    def fit_first(self, x: Tensor) -> None:
        """Fit the levels to one batch, in turns of codes and fit."""
        x = self.values(x if x.numel() else x.new_zeros(1))
        low, high, from_zero = extent(x, len(self.gamma))
        theta = start(x := x.clamp(low, high), low, high, len(self.gamma))
        # Else all are one value, and tell nothing. Several processes fit together, so in training.
        self.fitted = process_count() > 1 or bool((theta[1:] != 0).any())
        for _ in range(FIRST_FITS if self.fitted else 0):
            theta = self.refitted(x, theta, from_zero, 1.0)
        self.put(theta)

    def values(self, x: Tensor) -> Tensor:
        """Return the values of x that are fitted to, in the type of the fit."""
        return sample(x).to(torch.promote_types(self.gamma.dtype, torch.float32))

    def theta(self) -> Tensor:
        """Return (lowest, 2 gamma) in the type of the fit."""
        theta = torch.cat([self.lowest.reshape(1), 2 * self.gamma])
        return theta.to(torch.promote_types(theta.dtype, torch.float32))

    def refitted(self, x: Tensor, theta: Tensor, from_zero: Tensor, rate: float) -> Tensor:
        """Return `theta` moved by a share `rate` of the way to its fit to the values x (S,)."""
        C = self.choices.to(theta.dtype)
        sums = sum_over_processes(normal_equations(x, theta, C))
        theta = theta + rate * solve(sums, theta, from_zero)
        return torch.cat([theta[:1], theta[1:].clamp(min=0)])

    def put(self, theta: Tensor) -> None:
        """Take `theta` over."""
        self.lowest.copy_(theta[0])
        self.gamma.copy_(theta[1:] / 2)

    def _load_from_state_dict(self, state: Mapping, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        saved = state.get(f"{prefix}gamma", self.gamma)
        self.fitted = not saved.is_meta and bool((saved > 0).any())

    def extra_repr(self) -> str:
        return f"act_bit={len(self.gamma)}"
