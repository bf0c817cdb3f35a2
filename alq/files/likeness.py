"""Whether a packed file, by the names in it, can hold the network that it is asked for."""

import math

from torch import Tensor

from ..errors import InputError
from ..method.quantized_inputs import is_activations
from .bits import dtype_name
from .checkpoint import first_difference
from .entropy import MOST_PER_BYTE


def check_names(names: dict, state: dict[str, Tensor] | None, size: int) -> None:
    """Raise InputError or ValueError, before memory is taken, unless a file can have such `names`.

    They are then of the network `state`, or if there is none, of no more weights than any file of
    use has in `size` bytes: layers that were pruned away take none at all.
    """
    found = described(names)
    if state is not None:
        return check_same_network(found, state)
    count = sum(abs(math.prod(shape)) for shape in names["layers"].get("shape", ()))
    if count > MOST_PER_BYTE * size:
        raise ValueError(f"{count} weights in {size} bytes; load it into its network")


def described(names: dict) -> dict[str, str]:
    """Return type and shape of every tensor in the file with these `names`, by name."""
    layers = names["layers"]
    quantized = zip(layers.get("name", []), layers.get("shape", []), strict=True)
    found = [(name, f"float32 {tuple(shape)}") for name, shape in quantized]
    for kind, shapes in names["rest"].items():
        found += [(name, f"{kind} {tuple(shape)}") for name, shape in shapes.items()]
    if len(dict(found)) < len(found):
        raise ValueError("a name twice")
    return dict(found)


def check_same_network(saved: dict[str, str], state: dict[str, Tensor]) -> None:
    """Raise InputError that names the first tensor in which the file and the network differ."""
    own = {name: f"{dtype_name(tensor)} {tuple(tensor.shape)}" for name, tensor in state.items()}
    if not any(map(is_activations, own)):  # those of the file will find a place
        saved = {name: value for name, value in saved.items() if not is_activations(name)}
    if difference := first_difference(saved, own):
        name, there, here = difference
        raise InputError(
            f"holds another network: {name} is {there} in the file and {here} in this network; "
            "give the file that was saved of this one"
        )
