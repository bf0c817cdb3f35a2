"""What a layer costs once its weights and inputs are bits: `python -m alq info FILE --ops`.

Everything is counted for one sample from the layer's own groups; nothing is measured. A group of n
weights in I_g bases is met at every position of its layer. There each live basis costs

    inputs of M bits    M ceil(n / 64) words of exclusive or and population count, for the products
                        B D_m; M + 1 multiply-adds, of each by gamma_m and of their sum by alpha
    float inputs        n additions, by the signs; 1 multiply-add, by alpha

and each input M comparisons, as a search among 2^M levels takes. In float32 and int8 every weight
costs a multiply-add at every position. Bytes are those of the weights, of the inputs as the layer
reads them, and of the results, each once:

    float32    4 a weight, 4 an input
    int8       1 a weight, 1 an input
    here       n / 8 + 4 a live basis, M / 8 an input, or 4 where it is float
    all        4 a result
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.network import quantizable
from ..method.quantized_inputs import owners
from ..method.structures import coordinate_bytes
from .info import align

WORD = 64  # bits
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A row's key, and its heading.
COLUMNS = {
    "multiply_adds_dense": "float32, int8: multiply-adds", "words": "here: words",
    "additions": "additions", "multiply_adds": "multiply-adds", "comparisons": "comparisons",
    "bytes_float32": "bytes: float32", "bytes_int8": "int8", "bytes": "here",
}  # fmt: skip


class Place(NamedTuple):
    """Where one sample meets a layer: how often each weight is used, the inputs, the results."""

    uses: int
    inputs: int
    results: int


@torch.no_grad()
def places(model: nn.Module, x: Tensor) -> dict[str, Place]:
    """Return each layer's place by the name of its weight, for a batch x of one sample.

    Only linear layers and convolutions have one. `model` may lie on the device "meta"; it is left
    in eval mode.
    """
    found: dict[str, Place] = {}

    def note(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        met = inputs[0] if isinstance(layer, TRANSPOSED) else output
        uses = met.numel() // layer.weight.shape[0]
        uses += found[name].uses if name in found else 0  # called again
        found[name] = Place(uses, inputs[0].numel(), output.numel())

    parameters = quantizable(model)
    handles = [
        layer.register_forward_hook(partial(note, f"{path}.weight".removeprefix(".")))
        for path, layer in owners(model, parameters).items()
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    ]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def operations(
    layers: Sequence[Mapping], networks: Iterable[tuple[nn.Module, tuple[int, ...]]]
) -> list[dict]:
    """Return a row for each of `layers`, as `info.inspect` gives them, and the total's.

    Arguments:
        networks: some on the device "meta", with the shape of one input, among which is theirs.

    Raises: InputError if it is not.
    """
    shapes = [(layer["name"], *layer["shape"]) for layer in layers]
    for model, shape in networks:
        own = [(name, *w.shape) for name, w in quantizable(model).items()]
        if own == without_classes(shapes, own):
            found = places(model, torch.empty(1, *shape, device="meta"))
            break
    else:
        raise InputError("--ops: no network of the scripts has these layers")
    name, classes, *_ = shapes[-1]
    found[name] = found[name]._replace(results=classes)
    rows = [{"name": x["name"], **operations_of(x, found[x["name"]])} for x in layers]
    total = {key: sum(row[key] for row in rows) for key in COLUMNS}
    return [*rows, {"name": "total", **total}]


def without_classes(shapes: list[tuple], own: list[tuple]) -> list[tuple]:
    """Return `shapes` with as many answers of the last layer as `own` has."""
    return [*shapes[:-1], (*shapes[-1][:1], *own[-1][1:2], *shapes[-1][2:])] if shapes else []


def operations_of(layer: Mapping, place: Place) -> dict[str, int]:
    """Return the counts of one layer for one sample."""
    n, M, weights = layer["n"], layer["act_bit"], layer["float32_bytes"] // 4
    live = sum(bits * groups for bits, groups in enumerate(layer["groups_by_bits"]))
    fed = math.ceil(place.inputs * M / 8) if M else 4 * place.inputs  # bytes
    results = 4 * place.results
    return {
        "multiply_adds_dense": place.uses * weights,
        "words": place.uses * live * M * math.ceil(n / WORD),
        "additions": 0 if M else place.uses * live * n,
        "multiply_adds": place.uses * live * (M + 1),
        "comparisons": place.inputs * M,
        "bytes_float32": 4 * weights + 4 * place.inputs + results,
        "bytes_int8": weights + place.inputs + results,
        "bytes": math.ceil(live * coordinate_bytes(n)) + fed + results,
    }


def operations_text(rows: Sequence[Mapping]) -> str:
    """Return the table."""
    cells = [[row["name"], *(f"{row[key]:,}".replace(",", " ") for key in COLUMNS)] for row in rows]
    lines = align([("layer", *COLUMNS.values()), *map(tuple, cells)], left=1)
    return "\n".join(["operations and bytes of one sample, counted from the groups", "", *lines])
