"""Bitwidths and signs of the smallest packed file (`alq.files.small`), without signs of no use.

An input that comes from a unit without bits is constant, and `alq.fold_constant_units` makes all
signs that multiply it +. A flag for each input of a layer says whether all its signs are +; then
none of them is stored. The flags are coded given what the layer before leads one to expect.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np
import torch

from ..method.structures import Grouping
from .bits import LayerBits
from .entropy import Decoder, Encoder, code_numbers, decode_numbers

BIT_PLACES = 4  # that hold a bitwidth, 0 to 8
ENOUGH_SIGNS = 16  # all + by chance no oftener than a flag pays
BLOCK = 2**17  # weights whose signs are looked at together, in a few MB


def blocks_of(layer: LayerBits) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield some live bases at a time, and which input each of their signs (bases, n) multiplies.

    As all outputs' weights lie in the same order, that is told by one output's groups.
    """
    pattern = layer.grouping.inputs_of_one_output().numpy()  # (groups of an output, n)
    step = len(pattern) * max(1, BLOCK // pattern.size)  # groups
    start = 0
    for group in range(0, len(layer.bits), step):
        bits = layer.bits[group : group + step]
        bases = np.repeat(np.arange(len(bits)) % len(pattern), bits)
        yield slice(start, start + len(bases)), pattern[bases]
        start += len(bases)


def signs_of(layer: LayerBits, bases: slice) -> np.ndarray:
    """Return the signs (bases, n) of these live bases as bools."""
    n = layer.grouping.n
    start, end = bases.start * n, bases.stop * n
    bits = np.unpackbits(layer.signs[start // 8 : -(-end // 8)], bitorder="little")
    return bits[start % 8 :][: end - start].reshape(-1, n).view(bool)


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
    inputs = layer.grouping.by_outputs[1]
    minus, all_signs = np.zeros((2, inputs), np.int64)
    for bases, columns in blocks_of(layer):
        minus += np.bincount(columns[~signs_of(layer, bases)], minlength=inputs)
        all_signs += np.bincount(columns.reshape(-1), minlength=inputs)
    expected = expected_flags(layers, place, inputs)
    flags = (minus == 0) & (expected | (all_signs >= ENOUGH_SIGNS))
    code_numbers(encoder, flags.tolist(), 1, contexts=expected.tolist())
    kept = (signs_of(layer, bases)[~flags[columns]] for bases, columns in blocks_of(layer))
    return np.concatenate([np.empty(0, bool), *kept])


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
    signs, own = np.ones((count, n), bool), 0
    for bases, columns in blocks_of(layer):
        stored = ~flags[columns]
        start, own = own, own + int(stored.sum())
        signs[bases][stored] = kept[start:own]  # ValueError if there are fewer
    return np.packbits(signs, bitorder="little"), own
