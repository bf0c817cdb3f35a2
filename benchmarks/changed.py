"""What the ablations change in the method: other steps, other ways to prune, the authors' defects.

Nothing of this is in `alq`: a quantizer of another class, a pruning plan of another class, or a
function that chooses what a prune step removes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from alq.method import steps
from alq.method.codes import pack_bits, weights_by_code
from alq.method.loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from alq.method.nearest import nearest_codes
from alq.method.optimizer import ALQ
from alq.method.sketch import sketch
from alq.method.steps import Groups, finite_or, solve_coordinates
from alq.method.weight import MultiBitWeight
from alq.training.pruning import PruneToTarget


class Reconstruction(ALQ):
    """Straight-through with the reconstruction error in the place of the loss model.

    The full-precision copy w0 takes its AMSGrad step, then every group is sketched anew from it:
    the bases and coordinates are those nearest to w0, whatever that does to the loss.
    """

    @torch.no_grad()
    def ste_step(self) -> None:
        for stack in (stack for family in self._advance() for stack in family.stacks):
            stack.begin_copy()
            groups, t = stack.groups(), stack.states[0]["step"]
            update_moments(groups.g, groups.m, groups.v, groups.v_max, self.amsgrad.betas)
            p, h = pseudo_gradient_and_hessian(groups.m, groups.v_max, *self.amsgrad.at(t))
            stack.w0.addcdiv_(p, h, value=-1)
            for weight, state in zip(stack.weights, stack.states, strict=True):
                B, alpha, mask = sketch(state["w0"], weight.I)
                weight.set_form(pack_bits(B.transpose(1, 2) > 0), alpha, mask)


# ---------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class WithinLayers:
    """The same share of every layer, the layer's own cheapest, a share pr/batches at each batch.

    Counts are rounded to what should be left of the sketch, not at random batch by batch, so that
    a layer of few coordinates keeps its share.
    """

    pr: float
    batches: int

    def step(self, quantizer: ALQ, round_number: int, batch: int) -> None:
        done = (round_number - 1) * self.batches + batch + 1
        left = (1 - self.pr / self.batches) ** done

        def choose(costs: list[Tensor], masks: list[Tensor], *rest: object) -> list[Tensor]:
            dead = []
            for f, mask in zip(costs, masks, strict=True):
                flags = torch.zeros(mask.numel(), dtype=torch.bool)
                surplus = max(0, int(mask.sum()) - round(left * mask.numel()))
                ranked = torch.where(mask, f, torch.inf).flatten()
                flags[ranked.topk(surplus, largest=False).indices] = True
                dead.append(flags.view_as(mask))
            return dead

        quantizer.prune_step(1.0, 0.0, choose=choose)


class OneCut:
    """To the bits at which `plan` ends its rounds, all at the first batch of a pruning epoch."""

    def __init__(self, plan: PruneToTarget) -> None:
        self.plan = replace(plan, prune_batches=1)

    def step(self, quantizer: ALQ, round_number: int, batch: int) -> None:
        if batch == 0:
            self.plan.step(quantizer, round_number, 0)
        else:
            quantizer.prune_step(1.0, 0.0)


@dataclass(frozen=True)
class Uniform:
    """Every group keeps the same number of bits: `bits[r]` after round r, its cheapest go first.

    At each batch of a pruning epoch some more of each layer's groups are cut to it.
    """

    bits: Sequence[int]
    batches: int

    def step(self, quantizer: ALQ, round_number: int, batch: int) -> None:
        done = (batch + 1) / self.batches

        def choose(costs: list[Tensor], masks: list[Tensor], *rest: object) -> list[Tensor]:
            return [
                cheapest(f, mask, self.bits[round_number - 1], done)
                for f, mask in zip(costs, masks, strict=True)
            ]

        quantizer.prune_step(1.0, 0.0, choose=choose)


def cheapest(f: Tensor, mask: Tensor, kept: int, share: float) -> Tensor:
    """Return (G, I) bool: all but the `kept` costliest of the first `share` of the groups."""
    rank = torch.where(mask, f, -torch.inf).argsort(1, descending=True).argsort(1)  # (G, I)
    reached = torch.arange(len(mask)).unsqueeze(1) < round(share * len(mask))  # (G, 1)
    return mask & (rank >= kept) & reached


# ---------------------------------------------------------------------------- defects


def bases_losing_flips(
    w0: Tensor, p: Tensor, h: Tensor, alpha: Tensor, live: Tensor, ridge: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `steps.optimise_bases` does, but change a negative coordinate's sign alone.

    Its basis stays, so that the weights change.
    """
    target = w0 - p / h
    codes = nearest_codes(target, alpha, live)  # (G, n)
    alpha = finite_or(
        alpha, solve_coordinates(codes.long(), live, w0, p, h, alpha, ridge)
    ).abs()  # (G, L)
    return codes.to(torch.uint8), alpha, weights_by_code(alpha, codes), target


def basis_step_losing_flips(
    groups: Groups, w0: Tensor, w_hat: Tensor, t: int, amsgrad: AMSGrad, move_base: bool,
    ridge: float | None = None,
) -> None:  # fmt: skip
    """Do what `steps.basis_step` does, by `bases_losing_flips`."""
    update_moments(groups.g, groups.m, groups.v, groups.v_max, amsgrad.betas)
    p, h = pseudo_gradient_and_hessian(groups.m, groups.v_max, *amsgrad.at(t))
    codes, alpha, product, target = bases_losing_flips(w0, p, h, groups.alpha, groups.live, ridge)
    groups.codes.copy_(codes)
    groups.alpha.copy_(alpha)
    w_hat.copy_(product)
    if move_base:
        w0.copy_(target)


class LosingFlips(ALQ):
    """`ALQ` with the authors' defect in its basis steps."""

    def arithmetic(self, weight: MultiBitWeight) -> SimpleNamespace:
        return SimpleNamespace(**{**vars(steps), "basis_step": basis_step_losing_flips})


class RankingWrongly(ALQ):
    """`ALQ` with the authors' defect in its prune steps."""

    def prune_step(self, *arguments: object, **named: object) -> None:
        super().prune_step(*arguments, **named, choose=choose_by_wrong_values)


def choose_by_wrong_values(
    costs: Sequence[Tensor], masks: Sequence[Tensor], candidates: Sequence[int], M_p: float,
    prices: Sequence[int] | None = None, budget: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Do what `steps.choose_pruned` does, except for the values that layers are compared by.

    A layer's candidates are found in the list of its live coordinates; their values are then read
    at these numbers in the array of all its coordinates, dead ones (of value 0) included.
    """
    values, places = [], []
    for f, mask, k in zip(costs, masks, candidates, strict=True):
        alive = mask.flatten().nonzero().squeeze(1)
        cheapest = f.flatten()[alive].topk(k, largest=False).indices
        values.append(torch.where(mask, f, 0.0).flatten()[cheapest])
        places.append(alive[cheapest])
    chosen = torch.cat(values).topk(int(M_p * sum(candidates)), largest=False).indices
    if prices is not None:
        bits = torch.tensor(prices).repeat_interleave(torch.tensor(candidates))[chosen]
        chosen = chosen[bits.cumsum(0) - bits < budget]
    gone = torch.zeros(sum(candidates), dtype=torch.bool)
    gone[chosen] = True
    dead = []
    for mask, place, part in zip(masks, places, gone.split(list(candidates)), strict=True):
        flags = torch.zeros_like(mask).flatten()
        flags[place[part]] = True
        dead.append(flags.view_as(mask))
    return dead


# ---------------------------------------------------------------------------- the ridge


class PublishedRidge(ALQ):
    """`ALQ` with the published ridge of the coordinate solve: 1e-6, towards 0."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named, ridge=1e-6)
