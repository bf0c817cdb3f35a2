"""What an optimizer knows of its layers, in as few tensors as its steps can work on.

The arithmetic of a step is on groups of n weights and does not ask which layers they come from. On
an accelerator, where a step of many small operations waits for their launches, layers of one n and
one L are therefore the rows of one matrix, a `Stack`. On a CPU every layer is a stack of its own,
whose matrices are the layer's. The coordinates of all stacks are one vector each besides.

Layers and their states hold views of these tensors. Whoever puts other tensors there need not say
so: `Family.is_current` finds out, and the next step arranges the layers anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .codes import on_accelerator
from .steps import Groups
from .weight import MultiBitWeight, codes_without, copied, live_places

KINDS = 9  # of groups: 0 to 8 bits
MATRICES = ("m", "v", "v_max", "w0")  # of a layer's state, (G, n) each


class Stack:
    """Layers whose groups have one n, one I and one L.

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
        self.m, self.v, self.v_max, self.w0 = (
            None if states[0][key] is None else joined(state[key] for state in states)
            for key in MATRICES
        )
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
        self.find_live()

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
        """Bring up to date what follows from the mask, of which the layers know their L."""
        self.order, self.live = live_places(self.mask, self.L)
        for weight, view in zip(self.weights, self.parts(self.order), strict=True):
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
        g = self.read([weight.parameter.grad.to_dense() for weight in self.weights])
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

    def begin_copy(self) -> None:
        """Let w0 be a copy of what the parameters hold, if there is none yet."""
        if self.w0 is None:
            self.w0 = self.read_w_hat().clone()
            self.share("w0", self.w0)
            self.held = self.holdings()


class Family:
    """Layers of one type, on one device, that have taken as many steps.

    Attributes:
        stacks: the layers, stack by stack.
        alpha, mask, alpha_moments: of all coordinates, in the order of the stacks, one vector each.
    """

    def __init__(self, weights: Sequence[MultiBitWeight], states: Mapping[Tensor, dict]) -> None:
        alike: dict[tuple, list[MultiBitWeight]] = {}
        for weight in weights:
            # The groups of a transposed convolution are no view of its weight.
            stacked = on_accelerator(weight.alpha) and not weight.grouping.transposed
            key = (weight.n, weight.I, weight.L) if stacked else (id(weight),)
            alike.setdefault(key, []).append(weight)
        self.weights = [weight for members in alike.values() for weight in members]
        own = [states[weight.parameter] for weight in self.weights]
        self.alpha = flat(weight.alpha for weight in self.weights)
        self.mask = flat(weight.mask for weight in self.weights)
        if own[0]["alpha_moments"] is None:
            self.alpha_moments = [torch.zeros_like(self.alpha) for _ in range(3)]
        else:
            threes = zip(*(state["alpha_moments"] for state in own), strict=True)
            self.alpha_moments = [flat(moment) for moment in threes]
        sizes = [sum(weight.mask.numel() for weight in members) for members in alike.values()]
        vectors = (self.alpha, self.mask, *self.alpha_moments)
        cuts = zip(*(vector.split(sizes) for vector in vectors), strict=True)
        self.stacks = [
            Stack(members, [states[weight.parameter] for weight in members], alpha, mask, moments)
            for members, (alpha, mask, *moments) in zip(alike.values(), cuts, strict=True)
        ]
        # (sum of G,): the number of each group's layer, times the kinds of groups: 0 to 8 bits
        kinds = torch.arange(len(self.weights)) * KINDS
        groups = torch.tensor([weight.G for weight in self.weights])
        self.first_kind = kinds.repeat_interleave(groups).to(self.alpha.device)

    @property
    def states(self) -> list[dict]:
        """What the optimizer keeps of each layer."""
        return [state for stack in self.stacks for state in stack.states]

    def is_current(self, states: Mapping[Tensor, dict]) -> bool:
        """Return whether all layers still hold what was shared out."""
        return all(stack.is_current(states) for stack in self.stacks)

    def dissolve(self) -> None:
        """Give every layer and state tensors of its own, as copies and pickles need them."""
        for stack in self.stacks:
            stack.dissolve()

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Return each stack's part (G, I) of a vector, views."""
        parts = vector.split([stack.mask.numel() for stack in self.stacks])
        return [part.view_as(stack.mask) for part, stack in zip(parts, self.stacks, strict=True)]

    def of_layers(self, vector: Tensor) -> dict[MultiBitWeight, Tensor]:
        """Return each layer's part (G, I) of a vector, views."""
        parts = vector.split([weight.mask.numel() for weight in self.weights])
        pairs = zip(self.weights, parts, strict=True)
        return {weight: part.view_as(weight.mask) for weight, part in pairs}

    def prune(self, dead: Mapping[MultiBitWeight, Tensor]) -> None:
        """Remove the coordinates that `dead` flags, (G, I) bool of each layer.

        The host waits for the device once. A stack is no longer current if an L became less.
        """
        kept = self.mask & ~flat(dead[weight] for weight in self.weights)
        for stack, part in zip(self.stacks, self.parts(kept), strict=True):
            stack.codes.copy_(codes_without(stack, part))
        self.mask.copy_(kept)
        self.alpha.mul_(kept)
        live = joined(stack.mask.sum(1) for stack in self.stacks)  # (sum of G,)
        kinds = live.new_zeros(len(self.weights) * KINDS)
        kinds.index_add_(0, self.first_kind + live, torch.ones_like(live))
        for weight, counts in zip(self.weights, kinds.view(-1, KINDS).tolist(), strict=True):
            weight.live_total = sum(bits * count for bits, count in enumerate(counts))
            weight.L = max(bits for bits, count in enumerate(counts) if count)
        for stack in self.stacks:
            if all(weight.L == stack.L for weight in stack.weights):
                stack.find_live()


def families(weights: Iterable[MultiBitWeight], states: Mapping[Tensor, dict]) -> list[Family]:
    """Arrange the layers, which then hold views of what the families hold."""
    alike: dict[tuple, list[MultiBitWeight]] = {}
    for weight in weights:
        state = states[weight.parameter]
        absent = (state["w0"] is None, state["alpha_moments"] is None)
        key = (weight.alpha.dtype, weight.alpha.device, state["step"], state["step_a"], absent)
        alike.setdefault(key, []).append(weight)
    return [Family(members, states) for members in alike.values()]


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Return the tensors one behind the other; a single one is returned itself."""
    found = list(tensors)
    return found[0] if len(found) == 1 else torch.cat(found)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return all elements, one behind the other, as a new vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, all at once."""
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
