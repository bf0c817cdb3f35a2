"""Families: all layers that take a step together, as stacks, and their coordinates as vectors.

What a step does to the weights it does stack by stack (see `alq.method.stacks`); what it does to
the coordinates, of which there are few, it does to all of them at once.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .codes import joined, on_accelerator
from .stacks import Stack, gradients
from .weight import MultiBitWeight, codes_without

KINDS = 9  # of groups: 0 to 8 bits


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
        self.first_kind = joined(
            self.alpha.new_full((weight.G,), number * KINDS, dtype=torch.int64)
            for number, weight in enumerate(self.weights)
        )

    @property
    def step_a(self) -> int:
        """How often the moments of the coordinates were updated."""
        return self.states[0]["step_a"]

    @property
    def states(self) -> list[dict]:
        """What the optimizer keeps of each layer."""
        return [state for stack in self.stacks for state in stack.states]

    def is_current(self, states: Mapping[Tensor, dict]) -> bool:
        """Return whether all layers still hold what was shared, and have taken as many steps."""
        kinds = {(s["step"], s["step_a"], s["alpha_moments"] is None) for s in self.states}
        return len(kinds) == 1 and all(stack.is_current(states) for stack in self.stacks)

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

    def spoil_if_not_finite(self) -> None:
        """Make all coordinates NaN if a gradient is not finite, so that the weights become NaN.

        The search for the nearest level would else make weights of it that look like others.
        """
        norms = torch._foreach_norm(gradients(self.weights), torch.inf)
        largest = torch.stack(norms).max()
        self.alpha.add_(largest, alpha=0)  # what is not finite is NaN, times 0

    def prune(self, dead: Mapping[MultiBitWeight, Tensor]) -> None:
        """Remove the coordinates that `dead` flags, (G, I) bool of each layer.

        The host waits for the device once. A stack is no longer current if an L became less.
        """
        kept = self.mask & ~flat(dead[weight] for weight in self.weights)
        for stack, part in zip(self.stacks, self.parts(kept), strict=True):
            stack.codes.copy_(codes_without(stack.codes, stack.live_first(part)))
        self.mask.copy_(kept)
        self.alpha.mul_(kept)
        live = joined(stack.mask.sum(1) for stack in self.stacks)  # (sum of G,)
        kinds = live.new_zeros(len(self.weights) * KINDS)
        kinds.index_add_(0, self.first_kind + live, torch.ones_like(live))
        for weight, counts in zip(self.weights, kinds.view(-1, KINDS).tolist(), strict=True):
            weight.live_total = sum(bits * count for bits, count in enumerate(counts))
            weight.L = max(bits for bits, count in enumerate(counts) if count)
        for stack in self.stacks:
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


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return all elements, one behind the other, as a new vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])
