"""What the smallest packed file of a network takes, and what each coordinate takes of it.

    file    =  fixed + sum over all groups of  I (kept/8 + number)  + entropy of all I
    kept    a group's signs that are stored: those whose input comes from a unit that has bits
    number  bytes of a coordinate
    fixed   container, names, and all that is not quantized; a unit without bits frees its bias

A unit without bits frees also the signs that multiply it in the next layer. So a coordinate is
worth more than its own bytes: its part of what its unit takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..method.structures import Grouping
from ..method.weight import MultiBitWeight
from .sizes import Layers

CONTAINER = 120  # bytes, of names and shapes too
CODED = 8  # bits of a number at most that is entropy-coded whole; of a float, the first 8 are
SAVED = 1.2, 4.0  # bits that coding takes off such a number, and off a float
BITWIDTH = 0.3  # bytes that a coordinate adds to the coded bitwidths, about
FLOATS_OF_BUFFERS = 16  # bits at least


def number_bytes(bits: int) -> float:
    """Return what a number of so many bits takes in the file on average."""
    return (bits - SAVED[bits > CODED]) / 8


def zero_saves(bits: int) -> float:
    """Return the bytes less that a number takes where it is known to be 0."""
    return number_bytes(bits) if bits <= CODED else 1 - SAVED[1] / 8


@dataclass(frozen=True, eq=False)
class FileSize:
    """The size of a network's smallest file, after `alq.fold_constant_units`.

    Attributes:
        fixed: bytes that no coordinate takes, with the biases of all units.
        number: bytes of a coordinate.
        bias: bytes that go with a unit's last bit.
        sources: for each layer, of each of its inputs (C,), the number of the unit that it comes
            from, units being counted over all layers; -1 where that is not known. None where only
            counts are known, and all units have bits.
    """

    fixed: float
    number: float
    bias: float
    sources: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module, layers: Layers, bits: int) -> "FileSize":
        """Return that of a model, of whose weights all but `layers` stay numbers of `bits` bits."""
        fixed = -sum(layer.grouping.numel for layer in layers) * number_bytes(bits)
        seen = set()
        for value in model.state_dict(keep_vars=True).values():
            if not isinstance(value, Tensor) or id(value) in seen:
                continue
            seen.add(id(value))  # a tied one is stored once
            most = bits if isinstance(value, nn.Parameter) else max(bits, FLOATS_OF_BUFFERS)
            size = number_bytes(most) if value.is_floating_point() else value.itemsize
            fixed += size * value.numel()
        return cls(CONTAINER + fixed, number_bytes(bits), zero_saves(bits))

    def knowing(self, sources: Sequence[Tensor]) -> "FileSize":
        """Return the same, of a network in which inputs come from these units."""
        return replace(self, sources=sources)

    def kb(self, layers: Layers) -> float:
        """Return the size in 1e3 bytes; on a device of `layers`, waits for it."""
        if self.sources is None:
            parts = (layer.live_total * (layer.n / 8 + self.number) for layer in layers)
            return (self.fixed + sum(parts)) / 1e3
        weights: Sequence[MultiBitWeight] = layers  # type: ignore[assignment]
        has_bits = torch.cat([units_with_bits(weight) for weight in weights])
        size = self.fixed - self.bias * (~has_bits).sum()
        for weight, sources in zip(weights, self.sources, strict=True):
            I, kept = weight.mask.sum(1), kept_signs(weight, sources, has_bits)
            used = kept > 0  # a group that multiplies constants alone goes
            size = size + (I * (kept / 8 + self.number) * used).sum() + entropy(I * used) / 8
        return float(size) / 1e3

    def least_kb(self, layers: Layers) -> float:
        """Return the size of the file with one coordinate left, or a little more."""
        return (self.fixed + min(layer.n / 8 + self.number for layer in layers)) / 1e3

    def prices(self, weights: Sequence[MultiBitWeight]) -> tuple[list[Tensor], list[Tensor]]:
        """Return (freed, worth), what a coordinate of each group (G, 1) takes of the file.

        freed: bits, in whole numbers, that its removal frees for certain.
        worth: bytes, with its part of what its unit takes as long as that has bits.
        """
        assert self.sources is not None
        has_bits = torch.cat([units_with_bits(weight) for weight in weights])
        of_units = torch.zeros_like(has_bits, dtype=torch.float32)  # bytes
        own = []
        for weight, sources in zip(weights, self.sources, strict=True):
            own.append(kept_signs(weight, sources, has_bits) / 8 + self.number + BITWIDTH)
            per_input = signs_of_inputs(weight) / 8  # (C,)
            known = sources >= 0
            of_units.index_add_(0, sources[known], per_input[known])
        freed = [(8 * price).round().long().unsqueeze(1) for price in own]
        worth, units = [], of_units.split([weight.grouping.by_outputs[0] for weight in weights])
        for weight, price, unit in zip(weights, own, units, strict=True):
            coordinates = weight.mask.reshape(len(unit), -1).sum(1).clamp(min=1)
            groups = weight.grouping.G // len(unit)
            share = (unit + self.bias) / coordinates
            worth.append((price + share.repeat_interleave(groups)).unsqueeze(1))
        return freed, worth


def units_with_bits(weight: MultiBitWeight) -> Tensor:
    """Return (O,) bool, which outputs of the layer have a bit in any of their groups."""
    return weight.mask.reshape(weight.grouping.by_outputs[0], -1).any(1)


def inputs_of_one_output(weight: MultiBitWeight) -> Tensor:
    """Return (groups of an output, n): which of the C inputs each weight of an output multiplies.

    It is the same for all outputs.
    """
    grouping = weight.grouping
    one = Grouping(grouping.structure, (1, *grouping.by_outputs[1:]), grouping.subc)
    return one.inputs_of().to(weight.mask.device)


def kept_signs(weight: MultiBitWeight, sources: Tensor, has_bits: Tensor) -> Tensor:
    """Return (G,) how many signs of each group multiply an input that is not constant."""
    live = (sources < 0) | has_bits[sources]  # (C,); -1 takes the last unit, which is of no effect
    kept = live[inputs_of_one_output(weight)].sum(1)
    return kept.repeat(weight.grouping.by_outputs[0])


def signs_of_inputs(weight: MultiBitWeight) -> Tensor:
    """Return (C,) how many signs multiply each input, over all outputs and bases."""
    outputs, inputs = weight.grouping.by_outputs[:2]
    bases = weight.mask.view(outputs, -1, weight.mask.shape[1]).sum((0, 2)).float()
    places = inputs_of_one_output(weight)
    total = bases.new_zeros(inputs)
    return total.index_add_(0, places.flatten(), bases.repeat_interleave(places.shape[1]))


def entropy(numbers: Tensor) -> Tensor:
    """Return the bits of these whole numbers coded by how often each occurs."""
    counts = torch.bincount(numbers.flatten())
    shares = counts[counts > 0] / numbers.numel()
    return -(shares * shares.log2()).sum() * numbers.numel()
