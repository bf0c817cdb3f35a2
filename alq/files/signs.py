"""Bitwidths and signs of the smallest packed file (`alq.files.small`), without signs of no use.

An input that comes from a unit without bits is constant, and `alq.fold_constant_units` makes all
signs that multiply it +. A flag for each input of a layer says whether all its signs are +; then
none of them is stored. The flags are coded given what the layer before leads one to expect.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
import torch

from ..method.structures import Grouping
from .bits import LayerBits
from .entropy import Decoder, Encoder, code_numbers, decode_numbers

BIT_PLACES = 4  # that hold a bitwidth, 0 to 8
ENOUGH_SIGNS = 16  # all + by chance no oftener than a flag pays


def columns_of(layer: LayerBits) -> np.ndarray:
    """Return of each sign (live bases, n) which of the layer's inputs it multiplies."""
    return layer.grouping.inputs_of().numpy()[np.repeat(np.arange(len(layer.bits)), layer.bits)]


def outputs_without_bits(layer: LayerBits) -> np.ndarray:
    """Return (O,) bool, whether an output of the layer has no bit in any of its groups."""
    return layer.bits.reshape(layer.grouping.by_outputs[0], -1).sum(1) == 0


def expected_flags(layers: Sequence[LayerBits], place: int, inputs: int) -> np.ndarray:
    """Return (inputs,) bool, whether each comes from a unit without bits of the layer before.

    That is a guess from the order in the file; a wrong one costs bytes and nothing else.
    """
    if place:
        dead = outputs_without_bits(layers[place - 1])
        if inputs % len(dead) == 0:
            return np.repeat(dead, inputs // len(dead))
    return np.zeros(inputs, bool)


def contexts_of(name: str, count: int, layers: Sequence[LayerBits]) -> Iterable[bool]:
    """Return whether the units of tensor `name`, if that is a bias of so many, have no bits."""
    module = name.rpartition(".")[0]
    for layer in layers:
        if layer.name.rpartition(".")[0] == module and layer.grouping.by_outputs[0] == count:
            return outputs_without_bits(layer).tolist()
    return repeat(False)


def encode_bits(encoder: Encoder, layers: Sequence[LayerBits], place: int) -> np.ndarray:
    """Encode the layer's bitwidths and flags; return the signs that the flags leave, as bools."""
    layer = layers[place]
    code_numbers(encoder, layer.bits.tolist(), BIT_PLACES)
    n = layer.grouping.n
    count = int(layer.bits.sum()) * n
    signs = np.unpackbits(layer.signs, count=count, bitorder="little").reshape(-1, n).astype(bool)
    columns = columns_of(layer)
    inputs = layer.grouping.by_outputs[1]
    has_minus = np.bincount(columns[~signs], minlength=inputs) > 0
    many = np.bincount(columns.reshape(-1), minlength=inputs) >= ENOUGH_SIGNS
    expected = expected_flags(layers, place, inputs)
    flags = ~has_minus & (expected | many)
    code_numbers(encoder, flags.tolist(), 1, contexts=expected.tolist())
    return signs[~flags[columns]]


def decode_bits(
    decoder: Decoder, found: Sequence[LayerBits], name: str, grouping: Grouping, I: int
) -> tuple[LayerBits, np.ndarray]:
    """Return the layer after those `found`, with its bitwidths alone, and its flags."""
    bits = np.array(decode_numbers(decoder, grouping.G, BIT_PLACES), np.int64)
    if not bits.max() <= I <= 8:
        raise ValueError(f"{name}: bitwidths up to {bits.max()} of {I}")
    layer = LayerBits(name, grouping, bits, np.empty(0, np.uint8), torch.empty(0))
    inputs = grouping.by_outputs[1]
    decoder.expect(inputs)
    expected = expected_flags([*found, layer], len(found), inputs)
    flags = decode_numbers(decoder, inputs, 1, contexts=expected.tolist())
    return layer, np.array(flags, bool)


def decode_signs(layer: LayerBits, flags: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the layer's signs as `LayerBits.signs`, and how many of the bools `kept` are its.

    `kept` are what `encode_bits` returned of this layer and of those after it.
    """
    n = layer.grouping.n
    count = int(layer.bits.sum())  # live bases
    if count * n > len(kept) and not flags.any():
        raise ValueError(f"{layer.name}: {len(kept)} signs where {count * n} belong")
    if not count:
        return np.empty(0, np.uint8), 0
    stored = ~flags[columns_of(layer)]
    signs, own = np.ones((count, n), bool), int(stored.sum())
    signs[stored] = kept[:own]  # ValueError if there are fewer
    return np.packbits(signs, bitorder="little"), own
