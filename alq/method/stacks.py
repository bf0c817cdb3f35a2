"""Stacks: layers whose groups have one shape, as one matrix, which is what a step works on.

The arithmetic of a step is on groups of n weights and does not ask which layers they come from. On
an accelerator, where a step of many small operations waits for their launches, layers of one n and
one L are therefore the rows of one matrix. On a CPU every layer is a stack of its own, and its
matrices are the layer's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .codes import blocks, joined
from .loss_model import AMSGrad
from .steps import Groups, alpha_moments
from .weight import MultiBitWeight, copied, live_places

MOMENTS = ("m", "v", "v_max")  # of the weights, (G, n) each
MATRICES = (*MOMENTS, "w0")  # of a layer's state, (G, n) each


class Stack:
    """Layers whose groups have one n, one I and one L.

    The layers and their states hold views of the stack's tensors. Whoever puts others there need
    not say so: `is_current` finds out.

    Attributes:
        weights, states: the layers, in the order of their rows, and what the optimizer keeps of
            each.
        codes, m, v, v_max, w0: (G, n); w0 is None before the first `ste_step`.
        alpha, mask: (G, I).
        alpha_moments: three (G, I), void as long as the states' are None.
        order, live: (G, L), the places of each group's coordinates, live ones first; which live.
    """

    def __init__(
        self, weights: Sequence[MultiBitWeight], states: Sequence[dict], alpha: Tensor,
        mask: Tensor, alpha_moments: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Stack the layers; the last three are parts of the family's vectors and hold values."""
        self.weights, self.states = weights, states
        self.n, self.L = weights[0].n, weights[0].L
        self.sizes = [weight.G for weight in weights]
        self.codes = joined(weight.codes for weight in weights)
        self.m, self.v, self.v_max = (joined(state[key] for state in states) for key in MOMENTS)
        copied_yet = states[0]["w0"] is not None
        self.w0 = joined(state["w0"] for state in states) if copied_yet else None
        shape = (sum(self.sizes), weights[0].I)
        self.alpha, self.mask = alpha.view(shape), mask.view(shape)
        self.alpha_moments = [moment.view(shape) for moment in alpha_moments]
        threes = zip(*map(self.parts, self.alpha_moments), strict=True)
        self.moments_of_layers = [list(three) for three in threes]
        for key in ("codes", "alpha", "mask"):
            for weight, view in zip(weights, self.parts(getattr(self, key)), strict=True):
                setattr(weight, key, view)
        for key in MATRICES:
            self.share(key, getattr(self, key))
        self.share_moments(states[0]["alpha_moments"] is not None)
        self.hold_order(joined(weight.order for weight in weights))

    # ------------------------------------------------------------------------ what layers hold

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """Return each layer's rows, views; a single layer's are `rows` itself."""
        return [rows] if len(self.sizes) == 1 else rows.split(self.sizes)

    def share(self, key: str, matrix: Tensor | None) -> None:
        """Let the states hold their rows of a matrix, or None."""
        views = [None] * len(self.sizes) if matrix is None else self.parts(matrix)
        for state, view in zip(self.states, views, strict=True):
            state[key] = view

    def share_moments(self, known: bool) -> None:
        """Let the states hold the coordinates' moments, or None while these are void."""
        for state, three in zip(self.states, self.moments_of_layers, strict=True):
            state["alpha_moments"] = three if known else None

    def find_live(self) -> None:
        """Bring up to date what follows from the mask; a stack whose L became less is void."""
        if all(weight.L == self.L for weight in self.weights):
            self.hold_order(live_places(self.mask, self.L))
        else:
            for weight in self.weights:
                weight.order = live_places(weight.mask, weight.L)

    def hold_order(self, order: Tensor) -> None:
        """Take the places of live coordinates (G, L), and share them."""
        self.order, self.live = order, self.mask.gather(1, order)
        for weight, view in zip(self.weights, self.parts(order), strict=True):
            weight.order = view
        self.held = self.holdings()

    def holdings(self) -> list[Any]:
        """Return what the layers and their states hold now."""
        found: list[Any] = []
        for weight, state in zip(self.weights, self.states, strict=True):
            found += [weight.codes, weight.alpha, weight.mask, weight.order]
            found += [state[key] for key in MATRICES]
        return found

    def is_current(self, states: Mapping[Tensor, dict]) -> bool:
        """Return whether the layers and their states still hold what was shared."""
        return (
            all(weight.L == self.L for weight in self.weights)
            and all(
                states[w.parameter] is s for w, s in zip(self.weights, self.states, strict=True)
            )
            and all(map(is_, self.holdings(), self.held))
            and all(
                state["alpha_moments"] is None or state["alpha_moments"] is three
                for state, three in zip(self.states, self.moments_of_layers, strict=True)
            )
        )

    # ------------------------------------------------------------------------ what steps ask for

    def groups(self) -> Groups:
        """Return the groups with the gradients that the parameters have."""
        g = self.read(gradients(self.weights))
        return Groups(
            g, self.m, self.v, self.v_max, self.codes, self.live_first(self.alpha), self.live
        )

    def live_first(self, x: Tensor) -> Tensor:
        """Return the values of the live coordinates, dead ones behind: (G, I) -> (G, L)."""
        return x.gather(1, self.order)

    def put_in_place(self, x: Tensor, target: Tensor) -> None:
        """Write (G, L) of `live_first` to their own places in `target` (G, I)."""
        target.scatter_(1, self.order, x)

    def read_w_hat(self) -> Tensor:
        """Return what the parameters hold (G, n), a view where there is one."""
        return self.read([weight.parameter for weight in self.weights])

    def room_for_w_hat(self) -> Tensor:
        """Return a (G, n) to be overwritten and then given to `write`."""
        return self.read_w_hat() if len(self.weights) == 1 else torch.empty_like(self.m)

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors in the layers' shapes as (G, n); of one layer a view if there is one."""
        groupings = [weight.grouping for weight in self.weights]
        if len(tensors) == 1:
            return groupings[0].to_groups(tensors[0])
        whole = torch.empty_like(self.m)
        copies = []
        for grouping, part, tensor in zip(groupings, self.parts(whole), tensors, strict=True):
            view = grouping.view_groups(tensor)
            if view is None:
                grouping.to_weight(part).copy_(tensor)
            else:
                copies.append((part, view))
        copy_all(copies)
        return whole

    def write(self, w_hat: Tensor) -> None:
        """Put w_hat (G, n) into the parameters, unless it is a view of one."""
        if len(self.weights) == 1:
            self.weights[0].write(w_hat)
            return
        copies = []
        for weight, part in zip(self.weights, self.parts(w_hat), strict=True):
            view = weight.grouping.view_groups(weight.parameter)
            if view is None:
                weight.parameter.copy_(weight.grouping.to_weight(part))
            else:
                copies.append((view, part))
        copy_all(copies)

    def dissolve(self) -> None:
        """Give every layer and state tensors of its own, in memory that no other has a part of."""
        for weight, state in zip(self.weights, self.states, strict=True):
            weight.codes, weight.alpha, weight.mask, weight.order = (
                x.clone() for x in (weight.codes, weight.alpha, weight.mask, weight.order)
            )
            for key, value in state.items():
                state[key] = copied(value, weight.alpha.device)

    # ------------------------------------------------------------------------ steps

    def blocks(self, arithmetic: Any) -> Iterator[slice]:
        """Yield the groups, as many at a time as the arithmetic likes."""
        return blocks(self.codes, self.L, arithmetic.BLOCK)

    def optimise_bases(
        self, arithmetic: Any, amsgrad: AMSGrad, ridge: float | None, w0: Tensor | None = None
    ) -> None:
        """Take a basis step from the copy `w0` (G, n), which then moves, or else from w_hat."""
        groups, t = self.groups(), self.states[0]["step"]
        w_hat = self.read_w_hat() if w0 is None else self.room_for_w_hat()
        base, move_base = (w_hat, False) if w0 is None else (w0, True)
        for b in self.blocks(arithmetic):
            arithmetic.basis_step(groups[b], base[b], w_hat[b], t, amsgrad, move_base, ridge)
        self.put_in_place(groups.alpha, self.alpha)
        self.write(w_hat)
        self.share_moments(False)

    def project(self, arithmetic: Any, betas: tuple[float, float], g_a: Tensor) -> None:
        """Update the moments of the weights, and write B g to `g_a` (G, I), which is 0.

        After a new B the coordinates first get the moments that follow from the weights'.
        """
        groups, known = self.groups(), self.states[0]["alpha_moments"] is not None
        inherited, products = [], []  # of blocks, (G, L)
        for part in (groups[b] for b in self.blocks(arithmetic)):
            if not known:
                inherited.append(alpha_moments(part, arithmetic.basis_products))
            products.append(arithmetic.coordinate_gradients(part, betas))
        self.put_in_place(joined(products), g_a)
        for moment, parts in zip(self.alpha_moments, zip(*inherited, strict=True), strict=False):
            self.put_in_place(joined(parts), moment.zero_())
        self.share_moments(True)

    def rebuild(self, arithmetic: Any) -> None:
        """Put w_hat of new coordinates into the parameters."""
        w_hat, alpha = self.room_for_w_hat(), self.live_first(self.alpha)
        for b in self.blocks(arithmetic):
            arithmetic.rebuild(self.codes[b], alpha[b], w_hat[b])
        self.write(w_hat)

    def begin_copy(self) -> None:
        """Let w0 be a copy of what the parameters hold, if there is none yet."""
        if self.w0 is None:
            self.w0 = self.read_w_hat().clone()
            self.share("w0", self.w0)
            self.held = self.holdings()


def gradients(weights: Iterable[MultiBitWeight]) -> list[Tensor]:
    """Return the gradients of the weights' parameters, dense."""
    found = (weight.parameter.grad for weight in weights)
    return [gradient.to_dense() for gradient in found if gradient is not None]


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, all at once."""
    if pairs:
        targets, sources = (list(side) for side in zip(*pairs, strict=True))
        torch._foreach_copy_(targets, sources)
