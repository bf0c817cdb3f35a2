"""The packed file: a quantized network in the bytes that the paper counts.

A safetensors file (nothing in it is executed) of a few flat tensors, layer after layer in each:

    signs        uint8    one bit a weight and live basis: group by group, basis by basis
    coordinates  float32  alpha of the live bases, group by group
    bitwidths    uint8    every group's I_g, in as few bits as the layer's largest needs
    rest.DTYPE            the rest of the state dict, one tensor a type: biases, normalisation, and
                          gamma and lowest level of each layer's binary activations, if it has some
    names        uint8    JSON, deflated: the layers' names, structures, shapes, G, I and largest
                          I_g; the names and shapes of the rest; the data set, if it is told
    metadata              "alq-packed": format version and checksum

If the names have an entry "compact" (version 2), floats are float16 or coded (`alq.files.coding`).
In signs and bitwidths each layer starts a new byte. The checksum is the SHA-256 of the whole file
with the checksum's own digits as zeros.

Files of version 3 hold the same in fewer bytes, in a container of their own (`alq.files.small`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.checks import check_memory, check_named, check_shape, check_weights, list_of
from ..method.network import matrix_names, restore, uncompiled
from ..method.quantized_inputs import check_places, layers_of_activations, restore_activations
from ..method.weight import MultiBitWeight
from .bits import (
    LayerBits,
    dtype_name,
    pack_rest,
    pack_weights,
    split_layers,
    unpack_rest,
    unpack_weights,
)
from .checkpoint import tensors_of
from .coding import compress, expand
from .container import (
    COMPACT_VERSION,
    DECODING_ERRORS,
    VERSION,
    decode_container,
    deflate_json,
    encode_container,
    inflate_json,
)
from .disk import read_whole, write_atomically
from .floats import MOST_STEPS, form_named
from .likeness import check_names, check_same_network, described
from .small import BRAND, check_small, decode_small, encode_small, names_in, open_small


@dataclass(frozen=True)
class PackedFile:
    """The content of a packed file, checked.

    Attributes:
        weights: what `MultiBitWeight.state_dict` gave, with the live coordinates first.
        rest: the other entries of the network's state dict.
        sizes: bytes of signs, coordinates, bitwidths, rest, names and container: in all the file's.
        dataset: name of the data set that the network was trained on, None where it is not told.
        described: type and shape of every tensor, by name.
    """

    weights: list[dict]
    rest: dict[str, Tensor]
    sizes: dict[str, int]
    dataset: str | None
    described: dict[str, str]


def save_packed(
    path: str | Path, model: nn.Module, weights: Sequence[MultiBitWeight],
    floats: str = "float32", coded: bool = False, dataset: str | None = None,
) -> dict[str, int]:  # fmt: skip
    """Write the quantized `model` to `path` (suggested ending `.alq`), in full or not at all.

    Arguments:
        weights: all of the model's multi-bit weights, as `alq.quantize` returned them.
        floats: what `alq.round_floats` has rounded to; "8bit" to "3bit" go with `coded`.
        coded: write the smallest file (`alq.files.small`), entropy-coded.
        dataset: name of the data set, for whoever reads the file; None tells none.

    Returns: the bytes of each part, as `PackedFile.sizes`.
    Raises: InputError names a layer that is not float32 or does not hold its w_hat, or floats
    that were not rounded.
    """
    check_floats(floats, coded)
    weights = list_of(weights)
    if weights:
        check_weights(weights)
    if not isinstance(dataset, str | None):
        raise InputError(
            f"dataset {dataset!r}: is of type {type(dataset).__name__}, no name", "dataset"
        )
    check_places(model)
    state = untied_state(model)
    for weight in weights:
        check_named(weight, state)
        if weight.parameter.dtype != torch.float32:
            kind = dtype_name(weight.parameter)
            raise InputError(f"{weight.name}: is {kind}, and packed files are float32")
        del state[weight.name]
    layers, tensors = pack_weights(weights)
    shapes, rest = pack_rest(state)
    names: dict = {"layers": layers, "rest": shapes}
    tensors |= rest
    if dataset is not None:
        names["dataset"] = dataset
    if coded:
        content, sizes = encode_small(names, tensors, floats)
    else:
        if floats == "float16":
            names["compact"] = {"floats": floats, "coded": False}
            tensors = compress(tensors)
        tensors["names"] = deflate_json(names)
        content = encode_container(tensors, COMPACT_VERSION if "compact" in names else VERSION)
        sizes = part_sizes(tensors, len(content))
    write_atomically(path, lambda file: file.write(content))
    return sizes


def check_floats(floats: str, coded: bool) -> None:
    """Raise InputError unless a packed file can hold such floats."""
    if form_named(floats) <= MOST_STEPS and not coded:
        raise InputError(f"floats '{floats}': needs coded, which stores them in few bits", "floats")


def load_packed(path: str | Path, model: nn.Module) -> list[MultiBitWeight]:
    """Put the network in `path` into `model`, bit for bit, and return its multi-bit weights.

    `model` is the same network, trained or not, on any device; activations in binary bases that the
    file has, and the network has not, are put there. It is left as it was when the file
    is refused: InputError names what is wrong with a missing, damaged or foreign file.
    """
    return put_packed(read_packed(path, untied_state(model)), model, path)


def put_packed(content: PackedFile, model: nn.Module, path: str | Path) -> list[MultiBitWeight]:
    """Do what `load_packed` does with the `content` of the file `path`, which has been read."""
    state = untied_state(model)
    with explain_damage(path):
        check_same_network(content.described, state)
        layers_of_activations(model, content.rest)  # raises before anything is changed
        weights = restore(model, content.weights)
        restore_activations(model, content.rest)
    uncompiled(model).load_state_dict(content.rest, strict=False)  # all that is not in `weights`
    return weights


def read_packed(path: str | Path, state: dict[str, Tensor] | None = None) -> PackedFile:
    """Return the content of `path`; raise InputError as `load_packed` does.

    A file that is not of the network `state`, if that is given, is refused by its names alone.
    """
    names, tensors, sizes = read_tensors(path, state)
    with torch.device("cpu"), explain_damage(path):
        weights = unpack_weights(names["layers"], tensors)
        dataset = names.get("dataset")
        if not isinstance(dataset, str | None):
            raise TypeError("its data set is no name")
        rest = unpack_rest(names["rest"], tensors)
        return PackedFile(weights, rest, sizes, dataset, described(names))


def read_bits(
    path: str | Path, state: dict[str, Tensor] | None = None
) -> tuple[list[LayerBits], dict[str, Tensor]]:
    """Return the layers' bits in `path` as they are, and the rest; raise as `read_packed` does."""
    names, tensors, _ = read_tensors(path, state)
    with torch.device("cpu"), explain_damage(path):
        return split_layers(names["layers"], tensors), unpack_rest(names["rest"], tensors)


def read_tensors(
    path: str | Path, state: dict[str, Tensor] | None
) -> tuple[dict, dict[str, Tensor], dict[str, int]]:
    """Return names, flat tensors and the bytes of each part of `path`, of the network `state`."""
    content = read_whole(path)
    if content.startswith(BRAND):
        return read_small(content, path, state)
    tensors = decode_container(content, path)
    with torch.device("cpu"), explain_damage(path):  # whatever the caller's default device
        sizes = part_sizes(tensors, len(content))
        names = inflate_json(tensors["names"])
        check_names(names, state, len(content))
        if "compact" in names:
            tensors = expand(tensors, names)
        return names, tensors, sizes


def read_small(
    content: bytes, path: str | Path, state: dict[str, Tensor] | None
) -> tuple[dict, dict[str, Tensor], dict[str, int]]:
    """Return what `read_tensors` does, of the `content` of a file of version 3."""
    check_small(content, path)
    with torch.device("cpu"), explain_damage(path):
        header, body = open_small(content)
        names = names_in(header)
        check_names(names, state, len(content))
        return names, *decode_small(header, names, body, len(content))


def part_sizes(tensors: dict[str, Tensor], size: int) -> dict[str, int]:
    """Return the bytes of each part of a file of `size` bytes."""
    parts = dict.fromkeys(("signs", "coordinates", "bitwidths", "rest", "names"), 0)
    for name, tensor in tensors.items():
        parts[name.partition(".")[0]] += tensor.numel() * tensor.element_size()
    return {**parts, "container": size - sum(parts.values())}


@contextmanager
def explain_damage(path: str | Path) -> Iterator[None]:
    """Turn what decoding within `with` raises into an InputError that names the file `path`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DECODING_ERRORS as error:
        raise InputError(f"{path} is damaged: its content makes no sense ({error!r})") from error


def untied_state(model: nn.Module, shapes_only: bool = False) -> dict[str, Tensor]:
    """Return the model's own tensors by name; of tied ones only the name that `quantize` takes.

    Raises: InputError for a tensor without memory, unless `shapes_only` are asked for.
    """
    model = uncompiled(model)
    matrices = matrix_names(model)
    state: dict[int, tuple[str, Tensor]] = {}
    for name, value in tensors_of(model, keep_vars=True).items():
        check_shape(name, value)
        if not shapes_only:
            check_memory(name, value)
        taken = state.get(id(value), ("",))[0]
        if not taken or (name in matrices and taken not in matrices):
            state[id(value)] = name, value
    return dict(state.values())
