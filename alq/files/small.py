"""The smallest packed file: a container of a few bytes around one entropy-coded stream.

    magic      4 bytes    "ALQ" and the format version, 3
    checksum   8 bytes    the first of the SHA-256 of all that follows
    names      deflated   JSON, after LIKELY: [bytes of the stream, data set, layers, rest]
    stream                for each layer the bitwidths of its groups, and a flag for each of its
                          inputs: whether all its signs are +; then the coordinates, then the floats
                          of the rest
    uncoded               in the same order what `alq.files.floats` leaves uncoded, and all values
                          of the rest that are no float32; then the signs, one bit each

A layer is [name, shape, structure, subc, groups of a transposed convolution, I, form of its
coordinates]; a tensor of the rest [name, shape, form if it is float32, else its type].

Signs of an input whose flag is set are not stored. After `alq.fold_constant_units` these are all
inputs that come from units without bits. Where the layer before in the file has as many outputs as
this one has inputs, or a whole part of that, its units without bits say which flags to expect; so
such flags cost nearly nothing. Nor do the biases, 0 by then, of units without bits.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..method.structures import STRUCTURES
from .bits import (
    LayerBits,
    dtype_name,
    grouping_in_file,
    join_bytes,
    no_floats,
    pack_bitwidths,
    pack_rest,
    split_layers,
    unpack_rest,
)
from .container import MOST_NAMES
from .entropy import Decoder, Encoder
from .floats import (
    LEAST_OF_BUFFERS,
    Uncoded,
    decode_values,
    encode_values,
    form_named,
    smallest_form,
)
from .signs import contexts_of, decode_bits, decode_signs, encode_bits

BRAND, SMALL_VERSION = b"ALQ", 3
CHECKED = 8  # bytes of the checksum
# What names are likely to hold, the likeliest last: deflating begins as if it had seen this.
LIKELY = (
    b'.num_batches_tracked",[],"int64"],[".running_mean",[512],16],[".running_var",['
    b'"classifier.features.0.layer1.0.downsample.bn1.weight",[.bias",[10],8]],["fc2.bias",[500],8],'
    b'["fc1.bias",[50],8],["conv2.bias",[20],8],["conv1.bias",[64],3,1,0,6,8],["fc1.weight",['
    b',3,3],1,0,0,6,8],["conv2.weight",[,5,5],2,0,0,6,8],["conv1.weight",['
)
START = len(BRAND) + 1 + CHECKED  # of the names


def encode_small(
    names: dict, tensors: dict[str, Tensor], floats: str
) -> tuple[bytes, dict[str, int]]:
    """Return (content, bytes of each part) of the file with these names and flat tensors.

    Raises: InputError names a tensor that `floats` cannot hold.
    """
    layers = split_layers(names["layers"], tensors)
    rest = unpack_rest(names["rest"], tensors)
    forms = forms_within(floats, layers, rest)
    encoder, uncoded, ends = Encoder(), [b"", b""], []
    signs = [encode_bits(encoder, layers, place) for place in range(len(layers))]
    ends.append(encoder.shifts)
    for layer in layers:
        uncoded[0] += encode_values(encoder, layer.alpha, forms[layer.name], repeat(0))
    ends.append(encoder.shifts)
    for name, value in rest.items():
        x = value.reshape(-1)
        if name in forms:
            uncoded[1] += encode_values(encoder, x, forms[name], contexts_of(name, len(x), layers))
        else:
            uncoded[1] += x.view(torch.uint8).numpy().tobytes()
    ends.append(encoder.shifts)
    stream = encoder.finish_shortest()
    kept = np.packbits(np.concatenate([np.empty(0, bool), *signs]), bitorder="little").tobytes()
    header = deflate(header_of(names, layers, rest, forms, len(stream)))
    body = b"".join((header, stream, *uncoded, kept))
    content = BRAND + bytes([SMALL_VERSION]) + checksum(body) + body
    parts = len(header), len(uncoded[0]), len(uncoded[1]), len(kept)
    return content, part_sizes(len(content), len(stream), ends, *parts)


def forms_within(
    floats: str, layers: Sequence[LayerBits], rest: dict[str, Tensor]
) -> dict[str, int]:
    """Return each float32 tensor's smallest form; InputError if one needs more than `floats`."""
    most, forms = form_named(floats), {}
    tensors = {layer.name: (layer.alpha, most) for layer in layers}
    for name, value in rest.items():
        if value.dtype == torch.float32:
            tensors[name] = value, max(most, LEAST_OF_BUFFERS)  # what round_floats gives a buffer
    for name, (x, allowed) in tensors.items():
        forms[name] = smallest_form(x)
        if forms[name] > allowed:
            raise InputError(f"{name}: not {floats} values; alq.round_floats makes them so")
    return forms


def header_of(
    names: dict, layers: Sequence[LayerBits], rest: dict[str, Tensor], forms: dict[str, int],
    stream: int,
) -> list:  # fmt: skip
    """Return the names of the file as its JSON has them."""
    rows = []
    for layer, I in zip(layers, names["layers"].get("I", ()), strict=True):
        grouping = layer.grouping
        structure = STRUCTURES.index(grouping.structure), grouping.subc, grouping.transposed
        rows.append([layer.name, grouping.shape, *structure, I, forms[layer.name]])
    values = [[k, list(x.shape), forms.get(k) or dtype_name(x)] for k, x in rest.items()]
    return [stream, names.get("dataset"), rows, values]


def part_sizes(
    content: int, stream: int, ends: list[int], names: int, alpha: int, rest: int, signs: int
) -> dict[str, int]:
    """Return the bytes of the file's parts, as `PackedFile.sizes`.

    `ends` are the bytes of the stream at the end of bitwidths, coordinates and rest; `alpha` and
    `rest` those that these leave uncoded.
    """
    first, second, third = (min(end, stream) for end in ends)
    sizes = {
        "signs": signs, "coordinates": second - first + alpha, "bitwidths": first,
        "rest": third - second + rest, "names": names,
    }  # fmt: skip
    return {**sizes, "container": content - sum(sizes.values())}


def deflate(header: list) -> bytes:
    """Return `header` as deflated JSON that says where it ends."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=LIKELY)
    text = json.dumps(header, separators=(",", ":")).encode()
    return deflater.compress(text) + deflater.flush()


def checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:CHECKED]


# ---------------------------------------------------------------------------- reading


def open_small(content: bytes) -> tuple[list, bytes]:
    """Return (header, the bytes behind it) of a file that `check_small` has found whole."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, LIKELY)
    return json.loads(inflater.decompress(content[START:], MOST_NAMES)), inflater.unused_data


def check_small(content: bytes, path: str | Path) -> None:
    """Raise InputError unless `content` of the file `path` is whole and of this version."""
    if len(content) > len(BRAND) and (version := content[len(BRAND)]) != SMALL_VERSION:
        raise InputError(f"{path} has format version {version}; this code reads 1 to 3")
    if checksum(content[START:]) != content[START - CHECKED : START]:
        raise InputError(f"{path} is truncated or damaged; copy it again")


def names_in(header: list) -> dict:
    """Return the names as `alq.files.packed` has them, but for what the bitwidths say."""
    _, dataset, rows, values = header
    names: dict = {"layers": {}, "rest": {}}
    for name, shape, structure, subc, transposed, I, _ in rows:
        kind = STRUCTURES[structure]
        G = grouping_in_file(name, shape, kind, subc, transposed).G
        row = {"name": name, "structure": kind, "shape": shape, "subc": subc}
        for key, value in {**row, "transposed": transposed, "G": G, "I": I}.items():
            names["layers"].setdefault(key, []).append(value)
    for name, shape, form in values:
        if not isinstance(name, str):
            raise TypeError(f"{name} is no name")
        kind = form if isinstance(form, str) else "float32"
        names["rest"].setdefault(kind, {})[name] = shape
    return names if dataset is None else {**names, "dataset": dataset}


def decode_small(
    header: list, names: dict, body: bytes, size: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return (flat tensors, bytes of each part) of a file of `size` bytes.

    `names` is `names_in` the header and gets the layers' largest bitwidths. What is no such file
    raises ValueError, TypeError and the like.
    """
    stream, _, rows, values = header
    decoder, uncoded, ends = Decoder(body[:stream]), Uncoded(body[stream:]), []
    layers: list[LayerBits] = []
    flags = []
    for name, shape, structure, subc, transposed, I, _ in rows:
        grouping = grouping_in_file(name, shape, STRUCTURES[structure], subc, transposed)
        bits, flagged = decode_bits(decoder, layers, name, grouping, I)
        layers.append(bits)
        flags.append(flagged)
    ends.append(decoder.shifts)
    alpha = [no_floats()]
    for layer, row in zip(layers, rows, strict=True):
        alpha.append(decode_values(decoder, uncoded, int(layer.bits.sum()), row[-1], repeat(0)))
    ends.append(decoder.shifts)
    begun = uncoded.place
    rest = {}
    for name, shape, form in values:
        count = math.prod(shape)
        if isinstance(form, str):
            rest[name] = uncoded.tensor(count, form).reshape(shape)
        else:
            contexts = contexts_of(name, count, layers)
            rest[name] = decode_values(decoder, uncoded, count, form, contexts).reshape(shape)
    ends.append(decoder.shifts)
    left = uncoded.data[uncoded.place :]
    tensors = {"coordinates": torch.cat(alpha), "signs": all_signs(layers, flags, left)}
    if layers:
        names["layers"]["L"] = [int(layer.bits.max()) for layer in layers]
    tensors["bitwidths"] = pack_bitwidths([layer.bits for layer in layers], names["layers"])
    parts = size - START - len(body), begun, uncoded.place - begun, len(left)
    return tensors | pack_rest(rest)[1], part_sizes(size, stream, ends, *parts)


def all_signs(layers: Sequence[LayerBits], flags: Sequence[np.ndarray], data: bytes) -> Tensor:
    """Return the signs as the flat tensor has them; ValueError if `data` is not all of them."""
    kept = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").view(bool)
    signs, place = [], 0
    for layer, flagged in zip(layers, flags, strict=True):
        packed, count = decode_signs(layer, flagged, kept[place:])
        signs.append(packed)
        place += count
    if len(data) != -(-place // 8):
        raise ValueError(f"{len(data)} bytes where {-(-place // 8)} belong")
    return join_bytes(signs)
