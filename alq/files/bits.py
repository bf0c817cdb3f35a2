"""Multi-bit weights and the rest of a state dict as flat tensors, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..method.weight import MultiBitWeight, check_form


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def pack_weights(weights: Sequence[MultiBitWeight]) -> tuple[dict[str, list], dict[str, Tensor]]:
    """(plain values of all layers, one list a key; the tensors signs, coordinates, bitwidths)."""
    layers: dict[str, list] = {}
    signs, coordinates, bitwidths = [], [], []
    for weight in weights:
        saved = weight.state_dict()
        plain = {key: value for key, value in saved.items() if not isinstance(value, Tensor)}
        for key, value in {**plain, "G": weight.G, "I": weight.I, "L": weight.L}.items():
            layers.setdefault(key, []).append(value)
        bits = saved["mask"].sum(1).numpy()  # (G,)
        signs.append(pack_signs(saved["codes"].numpy(), bits))
        coordinates.append(saved["alpha"][saved["mask"]])
        bitwidths.append(pack_numbers(bits, weight.L.bit_length()))
    return layers, {
        "signs": torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *signs])),
        "coordinates": torch.cat([torch.empty(0), *coordinates]),
        "bitwidths": torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *bitwidths])),
    }


def unpack_weights(layers: dict[str, list], tensors: dict[str, Tensor]) -> list[dict]:
    """What `MultiBitWeight.state_dict` gave, with the live coordinates first."""
    states = [
        dict(zip(layers, values, strict=True)) for values in zip(*layers.values(), strict=True)
    ]
    numbers = cut(tensors["bitwidths"], [packed_size(s["G"] * s["L"].bit_length()) for s in states])
    bits = [
        unpack_numbers(part.numpy(), s["G"], s["L"].bit_length())
        for s, part in zip(states, numbers, strict=True)
    ]  # (G,) each
    for s, b in zip(states, bits, strict=True):
        if not isinstance(s["name"], str) or not isinstance(s["structure"], str):
            raise TypeError("a layer's name or structure is no text")
        s["n"] = math.prod(s["shape"]) // s["G"]
        if s["G"] * s["n"] != math.prod(s["shape"]) or not b.max() == s["L"] <= s["I"] <= 8:
            raise ValueError(f"{s['name']}: groups and bitwidths do not fit")
    signs = cut(
        tensors["signs"],
        [packed_size(int(b.sum()) * s["n"]) for s, b in zip(states, bits, strict=True)],
    )
    alphas = cut(tensors["coordinates"], [int(b.sum()) for b in bits])
    for s, b, sign, alpha in zip(states, bits, signs, alphas, strict=True):
        s["mask"] = torch.arange(s["I"]) < torch.from_numpy(b).unsqueeze(1)  # (G, I)
        s["alpha"] = torch.zeros(s["G"], s["I"])
        s["alpha"][s["mask"]] = alpha
        s["codes"] = torch.from_numpy(unpack_signs(sign.numpy(), b, s["n"]))
    own = ("G", "I", "L", "n")
    states = [{key: value for key, value in s.items() if key not in own} for s in states]
    for state in states:
        check_form(state)
    return states


def pack_rest(state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """({type: {name: shape}}, {"rest.type": all values}) of what is not quantized."""
    shapes: dict[str, dict] = {}
    values: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        kind = dtype_name(tensor)
        shapes.setdefault(kind, {})[name] = list(tensor.shape)
        values.setdefault(f"rest.{kind}", []).append(tensor.detach().cpu().reshape(-1))
    return shapes, {key: torch.cat(parts) for key, parts in values.items()}


def unpack_rest(shapes: dict[str, dict], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {}
    for kind, named in shapes.items():
        values = tensors[f"rest.{kind}"]
        if dtype_name(values) != kind:
            raise ValueError(f"rest.{kind} is {dtype_name(values)}")
        parts = cut(values, [math.prod(shape) for shape in named.values()])
        for (name, shape), part in zip(named.items(), parts, strict=True):
            rest[name] = part.reshape(shape)
    return rest


def cut(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """`tensor` in pieces; ValueError if it has not exactly as many elements."""
    if tensor.dim() != 1 or sum(sizes) != len(tensor) or min(sizes, default=0) < 0:
        raise ValueError(f"{len(tensor)} values where {sum(sizes)} belong")
    return list(tensor.split(sizes))


# ---------------------------------------------------------------------------- bits


def packed_size(bits: int) -> int:
    return -(-bits // 8)


def pack_numbers(values: np.ndarray, width: int) -> np.ndarray:
    """(G,) integers below 2^width -> bytes, `width` bits each, low bits first."""
    return np.packbits((values[:, None] >> np.arange(width)) & 1, bitorder="little")


def unpack_numbers(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """The inverse of `pack_numbers`: (count,) int64."""
    flags = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    return (flags.astype(np.int64) << np.arange(width)).sum(1)


def pack_signs(codes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Codes (G, n) and bitwidths (G,) -> bytes: n bits for every live basis, group by group."""
    first = bits.cumsum() - bits  # (G,): the row of each group's first basis
    flags = np.empty((bits.sum(), codes.shape[1]), np.uint8)
    for l in range(bits.max()):
        has = bits > l
        flags[first[has] + l] = (codes[has] >> l) & 1
    return np.packbits(flags, bitorder="little")


def unpack_signs(packed: np.ndarray, bits: np.ndarray, n: int) -> np.ndarray:
    """The inverse of `pack_signs`: codes (G, n) uint8."""
    first, live = bits.cumsum() - bits, int(bits.sum())
    flags = np.unpackbits(packed, count=live * n, bitorder="little").reshape(live, n)
    codes = np.zeros((len(bits), n), np.uint8)
    for l in range(bits.max()):
        has = bits > l
        codes[has] |= flags[first[has] + l] << l
    return codes
