"""What the smallest packed file of a network takes, and what each coordinate takes of it.

    file    =  fixed + sum over all groups of  I (kept/8 + number)  + entropy of all I
    kept    a group's signs that are stored: those whose input comes from a unit that has bits
    number  bytes of a coordinate
    fixed   container, names, and all that is not quantized; a unit without bits frees its bias

A unit without bits frees also the signs that multiply it in the next layer. So a coordinate is
worth more than its own bytes: its part of what its unit takes. The constants below are of the
published LeNet5 files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..method.weight import MultiBitWeight
from .sizes import Layers

CONTAINER = 150  # bytes, of names and shapes too, and some to spare: files end below the target
CODED = 8  # bits of a number at most that is entropy-coded whole; of a float, the first 8 are
SAVED = 1.2, 4.0  # bits that coding takes off such a number, and off a float
BITWIDTH = 0.3  # bytes that a coordinate adds to the coded bitwidths, about
LEAST_OF_BUFFERS = 16  # bits of a value, as `alq.files.floats` has it


def number_bytes(bits: int) -> float:
    """Return what a number of so many bits takes in the file on average."""
    return (bits - SAVED[bits > CODED]) / 8


def zero_saves(bits: int) -> float:
    """Return the bytes less that a number takes where it is known to be 0."""
    return number_bytes(bits) if bits <= CODED else 1 - SAVED[1] / 8


class Sources(NamedTuple):
    """Where the inputs of a network's layers come from; units are counted over all layers.

    inputs: for each layer, of each of its inputs (C,), the unit that it comes from; -1 if unknown.
    places: for each layer (groups of an output, n), which of these its weights multiply; all of its
        outputs' weights lie in the same order.
    biased: (U,) bool, of which units the bias goes with the last bit.
    """

    inputs: Sequence[Tensor]
    places: Sequence[Tensor]
    biased: Tensor

    @classmethod
    def of(
        cls, weights: Sequence[MultiBitWeight], inputs: Sequence[Tensor], has_bias: Sequence[bool]
    ) -> "Sources":
        """Return the sources of `inputs`; `has_bias` says which of the layers have one."""
        device = weights[0].mask.device
        sizes = torch.tensor([weight.grouping.by_outputs[0] for weight in weights], device=device)
        biased = torch.tensor(list(has_bias), device=device).repeat_interleave(sizes)
        named = torch.zeros_like(biased)
        places = []
        for weight, of_layer in zip(weights, inputs, strict=True):
            named[of_layer[of_layer >= 0]] = True
            places.append(weight.grouping.inputs_of_one_output().to(device))
        return cls(inputs, places, biased & named)


@dataclass(frozen=True, eq=False)
class FileSize:
    """The size of a network's smallest file, after `alq.fold_constant_units`.

    Attributes:
        fixed: bytes that no coordinate takes, with the biases of all units.
        number: bytes of a coordinate.
        bias: bytes of a bias that go with its unit's last bit.
        sources: None where only counts are known, and all units have bits.
    """

    fixed: float
    number: float
    bias: float
    sources: Sources | None = None

    @classmethod
    def of(cls, model: nn.Module, layers: Layers, bits: int) -> "FileSize":
        """Return that of a model, of whose weights all but `layers` stay numbers of `bits` bits."""
        fixed = -sum(layer.grouping.numel for layer in layers) * number_bytes(bits)
        seen = set()
        for value in model.state_dict(keep_vars=True).values():
            if not isinstance(value, Tensor) or id(value) in seen:
                continue
            seen.add(id(value))  # a tied one is stored once
            most = bits if isinstance(value, nn.Parameter) else max(bits, LEAST_OF_BUFFERS)
            size = number_bytes(most) if value.is_floating_point() else value.itemsize
            fixed += size * value.numel()
        return cls(CONTAINER + fixed, number_bytes(bits), zero_saves(bits))

    def knowing(self, sources: Sources) -> "FileSize":
        """Return the same, of a network in which inputs come from these units."""
        return replace(self, sources=sources)

    def counted_kb(self, layers: Layers) -> float:
        """Return the size in KB (1e3 bytes) of layers of which all units have bits."""
        parts = (layer.live_total * (layer.n / 8 + self.number) for layer in layers)
        return (self.fixed + sum(parts)) / 1e3

    def least_kb(self, layers: Layers) -> float:
        """Return the size of the file with one coordinate left, or a little more."""
        return (self.fixed + min(layer.n / 8 + self.number for layer in layers)) / 1e3

    def kb(self, weights: Sequence[MultiBitWeight], masks: Sequence[Tensor]) -> float:
        """Return the size in KB of the layers with these masks; waits for their device."""
        has_bits, kept = self.living(weights, masks)
        size = self.fixed - self.bias * (~has_bits & self.known.biased).sum()
        for signs, mask in zip(kept, masks, strict=True):
            I = mask.sum(1) * (signs > 0)  # a group that multiplies constants alone goes
            size = size + (I * (signs / 8 + self.number)).sum() + entropy(I) / 8
        return float(size) / 1e3

    def worth(
        self, weights: Sequence[MultiBitWeight], masks: Sequence[Tensor], staying: float = 1.0
    ) -> list[Tensor]:
        """Return what a coordinate of each group (G, 1) takes, in bytes of the file.

        To its own come its part of its unit's bias, and of the signs that multiply the unit: of the
        share of them that is `staying` when all pruning is done. Else units would go first whose
        signs go anyway.
        """
        has_bits, kept = self.living(weights, masks)
        signs_of_units = torch.zeros_like(has_bits, dtype=torch.float32)
        rows = [w.grouping.by_outputs[0] for w in weights]
        for k, (inputs, places) in enumerate(zip(*self.known[:2], strict=True)):
            bases = masks[k].view(rows[k], len(places), -1).sum((0, 2))  # of all outputs
            bases = bases.float().repeat_interleave(places.shape[1])
            signs = bases.new_zeros(len(inputs)).index_add_(0, places.flatten(), bases)
            signs_of_units.index_add_(0, inputs[inputs >= 0], signs[inputs >= 0])
        shared = (staying * signs_of_units / 8 + self.bias * self.known.biased).split(rows)
        found = []
        for mask, signs, of_units in zip(masks, kept, shared, strict=True):
            coordinates = mask.reshape(len(of_units), -1).sum(1).clamp(min=1)
            part = (of_units / coordinates).repeat_interleave(len(mask) // len(of_units))
            own = torch.where(signs > 0, signs / 8 + self.number + BITWIDTH, 0.0)
            found.append((own + part).unsqueeze(1))
        return found

    def living(
        self, weights: Sequence[MultiBitWeight], masks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (U,) bool, which units are not constant, and of each group (G,) the kept signs."""
        outputs = [weight.grouping.by_outputs[0] for weight in weights]
        has_bits = torch.cat([m.reshape(O, -1).any(1) for m, O in zip(masks, outputs, strict=True)])
        parts, kept = has_bits.split(outputs), []
        for k, (inputs, places) in enumerate(zip(*self.known[:2], strict=True)):
            live = (inputs < 0) | has_bits[inputs]  # (C,); -1 takes the last unit, to no effect
            kept.append(live[places].sum(1).repeat(outputs[k]))
            used = masks[k].any(1) & (kept[k] > 0)  # a unit of constants alone is one
            parts[k].copy_(used.view(outputs[k], -1).any(1))
        return has_bits, kept

    @property
    def known(self) -> Sources:
        """The sources, where they are needed."""
        assert self.sources is not None, "FileSize.knowing(sources) comes first"
        return self.sources


def entropy(numbers: Tensor) -> Tensor:
    """Return the bits of these whole numbers coded by how often each occurs."""
    counts = torch.bincount(numbers.flatten())
    shares = counts[counts > 0] / numbers.numel()
    return -(shares * shares.log2()).sum() * numbers.numel()
