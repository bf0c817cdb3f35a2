"""A quantized network as the flat tensors and the names that `alq.files.packed` lists, and back."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..method.structures import Grouping, make_grouping
from ..method.weight import MultiBitWeight, describe


@dataclass(frozen=True)
class LayerBits:
    """One layer as the file holds it, nothing made of it yet.

    Attributes:
        name, grouping: of the layer.
        bits: (G,) int64, the groups' bitwidths.
        signs: uint8, one bit a weight and live basis: group by group, basis by basis.
        alpha: the live coordinates in the same order.
    """

    name: str
    grouping: Grouping
    bits: np.ndarray
    signs: np.ndarray
    alpha: Tensor


def pack_weights(weights: Sequence[MultiBitWeight]) -> tuple[dict[str, list], dict[str, Tensor]]:
    """Return (layers, tensors): plain values, one list a key; signs, coordinates, bitwidths."""
    layers: dict[str, list] = {}
    bits, signs, coordinates = [], [], []
    for weight in weights:
        saved = weight.state_dict()
        bits.append(saved["mask"].sum(1).numpy())  # (G,)
        plain = {key: value for key, value in saved.items() if not isinstance(value, Tensor)}
        plain |= {"G": weight.G, "I": weight.I, "L": int(bits[-1].max())}
        for key, value in plain.items():
            layers.setdefault(key, []).append(value)
        flags = live_signs(saved["codes"].numpy(), bits[-1])
        signs.append(np.packbits(flags, bitorder="little"))
        coordinates.append(saved["alpha"][saved["mask"]])
    return layers, {
        "signs": join_bytes(signs),
        "coordinates": torch.cat([no_floats(), *coordinates]),
        "bitwidths": pack_bitwidths(bits, layers),
    }


def no_floats() -> Tensor:
    """Return an empty tensor as files have them, whatever the caller's default type and device."""
    return torch.empty(0, dtype=torch.float32, device="cpu")


def live_signs(codes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Return the signs (live bases, n), 0 or 1, in codes (G, n) of groups with `bits` (G,)."""
    flags = np.unpackbits(codes[:, None], axis=1, bitorder="little")  # (G, 8, n)
    return flags[np.arange(8) < bits[:, None]]


def split_layers(layers: dict[str, list], tensors: dict[str, Tensor]) -> list[LayerBits]:
    """Return every layer's bits; ValueError, TypeError and the like if no `pack_weights` made them.

    A layer takes the memory that it takes in the file.
    """
    found, bits = [], unpack_bitwidths(tensors["bitwidths"], layers)
    states = [dict(zip(layers, row, strict=True)) for row in zip(*layers.values(), strict=True)]
    live = [int(b.sum()) for b in bits]
    sizes = [math.prod(state["shape"]) // state["G"] for state in states]  # n of each layer
    lengths = [-(-k * n // 8) for k, n in zip(live, sizes, strict=True)]  # bytes
    signs = split_exactly(tensors["signs"], lengths)
    coordinates = split_exactly(tensors["coordinates"], live)
    for state, b, sign, alpha in zip(states, bits, signs, coordinates, strict=True):
        plain = state["structure"], state["subc"], state.get("transposed", 0)
        grouping = grouping_in_file(state["name"], state["shape"], *plain)
        if len(b) != grouping.G:
            raise ValueError(f"{state['name']}: {len(b)} groups, and {grouping.G} by its structure")
        if not (b.max() == state["L"] <= state["I"] and 1 <= state["I"] <= 8):
            raise ValueError(f"{state['name']}: bitwidths up to {b.max()}, not {state['L']}")
        if not alpha.isfinite().all():
            raise ValueError("coordinates that are not finite")
        found.append(LayerBits(state["name"], grouping, b, sign.numpy(), alpha))
    return found


def grouping_in_file(
    name: str, shape: Sequence[int], structure: str, subc: int, transposed: int
) -> Grouping:
    """Return a layer's grouping; ValueError, TypeError and the like if that is none.

    `make_grouping` alone would look for divisors of a row, however long a file says it is.
    """
    texts, counts = (name, structure), (*shape, subc, transposed)
    if {*map(type, texts)} != {str} or {*map(type, counts)} != {int}:
        raise TypeError(f"{name}: its name, structure, shape, subc or transposed is none")
    if min(shape) < 1 or min(counts) < 0:
        raise ValueError(f"{name}: shape {shape}, subc {subc}, transposed {transposed}")
    if structure == "subchannelwise":
        outputs = Grouping("", tuple(shape), transposed=transposed).by_outputs[0]
        if subc < 1 or math.prod(shape) // outputs % subc:
            raise ValueError(f"{name}: subc {subc} for shape {shape}")
    return make_grouping(name, tuple(shape), structure, subc or None, transposed)


def unpack_weights(layers: dict[str, list], tensors: dict[str, Tensor]) -> list[dict]:
    """Return what `MultiBitWeight.state_dict` gave, with the live coordinates first.

    Layers and tensors that no `pack_weights` made raise ValueError, TypeError and the like.
    """
    Is = layers.get("I", ())
    return [state_of(layer, I) for layer, I in zip(split_layers(layers, tensors), Is, strict=True)]


def state_of(layer: LayerBits, I: int) -> dict:
    """Return what `MultiBitWeight.state_dict` gave of a layer of I bits, live ones first."""
    G, n, bits = layer.grouping.G, layer.grouping.n, layer.bits
    mask = torch.arange(I) < torch.from_numpy(bits).unsqueeze(1)  # (G, I)
    alpha = torch.zeros(G, I, dtype=torch.float32)
    alpha[mask] = layer.alpha
    signs = np.unpackbits(layer.signs, count=len(layer.alpha) * n, bitorder="little")
    flags = np.zeros((G, 8, n), np.uint8)
    flags[np.arange(8) < bits[:, None]] = signs.reshape(-1, n)
    codes = np.packbits(flags, axis=1, bitorder="little")[:, 0]  # (G, n)
    tensors = {"codes": torch.from_numpy(codes), "alpha": alpha, "mask": mask}
    return {**describe(layer.name, layer.grouping), **tensors}


def check_form(state: dict) -> None:
    """ValueError, TypeError and the like if `state` cannot be what a `state_dict` gave."""
    texts = [state["name"], state["structure"]]
    counts = [*state["shape"], state["subc"], state.get("transposed", 0)]
    if {*map(type, texts)} != {str} or {*map(type, counts)} != {int} or min(counts) < 0:
        raise TypeError("its name, structure, shape, subc or transposed is none")
    codes, alpha, mask = (state[key] for key in ("codes", "alpha", "mask"))
    if (codes.dtype, mask.dtype) != (torch.uint8, torch.bool) or not alpha.is_floating_point():
        raise TypeError(f"types {codes.dtype}, {alpha.dtype}, {mask.dtype}")
    (G, n), I = codes.shape, mask.shape[-1]
    whole = G * n == math.prod(state["shape"]) > 0 and 1 <= I <= 8
    if not (whole and alpha.shape == mask.shape == (G, I)):
        raise ValueError(f"shapes {codes.shape}, {alpha.shape}, {mask.shape}, {state['shape']}")
    if not alpha.isfinite().all() or alpha[~mask].any():
        raise ValueError("coordinates that are not finite, or dead and not 0")
    if (codes.to(torch.int16) >> mask.sum(1, keepdim=True)).any():
        raise ValueError("signs of bases that it does not have")


def pack_rest(state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Return ({type: {name: shape}}, {"rest.type": all values}) of what is not quantized."""
    shapes: dict[str, dict] = {}
    values: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        kind = dtype_name(tensor)
        shapes.setdefault(kind, {})[name] = list(tensor.shape)
        values.setdefault(f"rest.{kind}", []).append(tensor.detach().cpu().reshape(-1))
    return shapes, {key: torch.cat(parts) for key, parts in values.items()}


def unpack_rest(shapes: dict[str, dict], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that `pack_rest` was given; ValueError if shapes and tensors differ."""
    rest: dict[str, Tensor] = {}
    for kind, named in shapes.items():
        values = tensors[f"rest.{kind}"]
        if dtype_name(values) != kind:
            raise ValueError(f"rest.{kind} is {dtype_name(values)}")
        parts = split_exactly(values, [math.prod(shape) for shape in named.values()])
        rest |= {name: part.reshape(named[name]) for name, part in zip(named, parts, strict=True)}
    return rest


def dtype_name(tensor: Tensor) -> str:
    """Return the type of the tensor's values as the files write it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def split_exactly(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return `tensor` in pieces; ValueError if it has not exactly as many elements."""
    if tensor.dim() != 1 or sum(sizes) != len(tensor) or min(sizes, default=0) < 0:
        raise ValueError(f"{len(tensor)} values where {sum(sizes)} belong")
    return list(tensor.split(sizes))


def split_bits(packed: Tensor, counts: list[int]) -> Iterator[np.ndarray]:
    """Return the bits in pieces of `counts`, each from a new byte; ValueError if they differ."""
    parts = zip(split_exactly(packed, [-(-count // 8) for count in counts]), counts, strict=True)
    return (np.unpackbits(part.numpy(), count=n, bitorder="little") for part, n in parts)


def join_bytes(parts: Sequence[np.ndarray]) -> Tensor:
    """Return arrays of bytes, of which there may be none, as one uint8 tensor."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *parts]))


def pack_bitwidths(bits: Sequence[np.ndarray], layers: dict[str, list]) -> Tensor:
    """Return each layer's (G,) bitwidths as bytes, low bits first, as many as its L needs."""
    places = (np.arange(L.bit_length()) for L in layers.get("L", ()))
    flags = ((b[:, None] >> place) & 1 for b, place in zip(bits, places, strict=True))
    return join_bytes([np.packbits(part, bitorder="little") for part in flags])


def unpack_bitwidths(packed: Tensor, layers: dict[str, list]) -> list[np.ndarray]:
    """Return the bitwidths, (G,) int64 for each layer, that `pack_bitwidths` was given."""
    for G, shape in zip(layers.get("G", ()), layers.get("shape", ()), strict=True):
        if not 0 < G <= math.prod(shape):  # where all L are 0 they take no bytes, only memory
            raise ValueError(f"{G} groups of shape {shape}")
    sizes = zip(layers.get("G", ()), layers.get("L", ()), strict=True)
    shapes = [(G, L.bit_length()) for G, L in sizes]
    flags = zip(split_bits(packed, [G * width for G, width in shapes]), shapes, strict=True)
    return [(x.reshape(shape) << np.arange(shape[1])).sum(1) for x, shape in flags]
