"""What layers share that hold bits, coordinates and biases, and look like those they replace.

Their state is plain tensors, as `alq.inference.rows` explains them, and the bias.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.activations import BinaryActivation
from ..method.quantized_inputs import PLACE
from ..method.structures import Grouping
from .compute import blocks_to_decode, by_kernel, decoded, kernels_take, on_levels
from .plan import COUNTED, LANES, OF_LINEAR, WAYS, choose
from .planes import few, planes_of, planes_to_count
from .prepared import weight_of_groups
from .rows import Rows, groups_of_rows
from .tiles import REMEMBERED, Geometry, unused

# What of a layer's numbers the packed one keeps, under the same names.
KEPT = (
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride",
    "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class PackedLayer(nn.Module):
    """What the packed layers share.

    Attributes:
        name: of the weight in the network.
        grouping: which of its weights share coordinates.
        tables: "float32", exact to rounding, or "int16", faster.
        way: one of `alq.inference.plan.WAYS`; None for what that module chooses.
        binary_input: the activation that its input passes first, or None.
        normalised: whether a batch norm was folded into it.
        weight: the weights in float32, decoded anew whenever asked for.
        dense: the same, kept; None unless `hold` was called.
        held_of: what `dense` was decoded from, as `changes` returns it.
        axes: how many are spatial.
    """

    axes = 0
    groups = 1
    around: tuple[int, ...] = ()

    signs: Tensor
    alpha: Tensor
    outputs: Tensor
    first: Tensor
    bias: Tensor | None
    dense: Tensor | None
    binary_input: BinaryActivation | None

    def __init__(self, layer: Any, name: str, grouping: Grouping, rows: Rows, tables: str) -> None:
        super().__init__()
        self.name, self.grouping, self.tables = name, grouping, tables
        self.way: str | None = None
        self.normalised = False
        for key in KEPT:
            if hasattr(layer, key):
                setattr(self, key, getattr(layer, key))
        for key, value in vars(rows).items():
            self.register_buffer(key, value)
        self.register_buffer("dense", None, persistent=False)
        self.held_of: tuple[Any, ...] = ()
        self.geometries: dict[tuple, Geometry] = {}
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        setattr(self, PLACE, getattr(layer, PLACE, None))
        self.training = False

    @property
    def rows(self) -> Rows:
        own: dict[str, Any] = self._buffers
        return Rows(own["signs"], own["alpha"], own["outputs"], own["first"])

    @property
    def weight(self) -> Tensor:
        self.check_state()
        rows = Rows(self.signs, self.alpha, self.outputs, self.first)  # which a trace sees
        return decoded(rows, self.grouping, 0, self.grouping.shape[0])

    def train(self, mode: bool = True) -> "PackedLayer":
        """Refuse to train, and to compute from then on: modules before it do train by now."""
        super().train(mode)
        if mode:
            raise InputError(
                f"{self.name}: is packed for inference and cannot be trained; train the network "
                "that it was made of. This one computes again after eval()"
            )
        return self

    def check(self, x: Tensor, dimensions: int) -> None:
        """Raise InputError if x does not fit the layer, or a gradient or training is wanted."""
        alpha: Any = self._buffers["alpha"]  # at once: `nn.Module` looks for attributes long
        if x.dtype != alpha.dtype:
            kind, own = (str(t.dtype).removeprefix("torch.") for t in (x, alpha))
            raise InputError(f"{self.name}: its input is {kind}, and the layer {own}; convert one")
        if x.device != alpha.device:
            raise InputError(
                f"{self.name}: its input is on {x.device}, and the layer on {alpha.device}; "
                "move one"
            )
        self.check_state()
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{self.name}: is packed for inference and gives no gradients; call it under "
                "torch.no_grad()"
            )
        if self.training:
            raise InputError(f"{self.name}: train() was called, and refused; call eval() first")
        if self.normalised and x.dim() != dimensions:
            raise InputError(
                f"{self.name}: holds a batch norm and takes batches, {dimensions} dimensions; "
                f"the input has {x.dim()}"
            )

    def check_state(self) -> None:
        """Raise InputError if the layer's tensors are not as they are read: by their addresses."""
        own: dict[str, Any] = self._buffers
        kind, device = own["alpha"].dtype, own["alpha"].device
        kinds = (("signs", torch.uint8), ("outputs", torch.int32), ("first", torch.int64))
        for key, wanted in (*kinds, ("alpha", kind), ("bias", kind)):
            tensor = own[key]
            if tensor is None:
                continue
            if tensor.dtype != wanted or tensor.device != device or not tensor.is_contiguous():
                raise InputError(
                    f"{self.name}: `{key}` is {tensor.dtype} on {tensor.device}, contiguous: "
                    f"{tensor.is_contiguous()}; it must be {wanted} on {device}, and contiguous"
                )

    def check_way(self) -> None:
        """Raise InputError if `way` is none that the layer can compute in."""
        ways = [way for way in WAYS if self.axes == 0 or way not in OF_LINEAR]
        if self.way not in ways:
            raise InputError(f"{self.name}: has no way {self.way!r}; its ways are {ways}, and None")

    def chosen(self, x: Tensor, geometry: Geometry, planes: int) -> str:
        """Return the way to compute x, which popcounts can do in so many `planes`, if any."""
        if self.way is not None:
            self.check_way()
        if not kernels_take(x):
            return "decoded"
        if self.way and (planes or self.way not in COUNTED):
            return self.way
        own: dict[str, Any] = self._buffers
        R, held = len(own["alpha"]), own["dense"] is not None
        asked = self.grouping, R, geometry.positions, self.tables, planes, held
        if self.axes == 0:
            return choose(*asked)
        tiles = unused(geometry, LANES[self.tables])
        counted = unused(geometry, LANES["popcounts"]) if planes else tiles
        return choose(*asked, tiles, counted)

    def hold(self) -> None:
        """Keep the weights in float32, too, for where that is as fast as it gets."""
        changes = self.changes()
        # By PyTorch, as numba takes its time and memory to load.
        groups = groups_of_rows(self.rows, self.grouping.n, 0, self.grouping.shape[0])
        self.dense = weight_of_groups(self.grouping, groups)
        self.held_of = changes
        if not self._load_state_dict_post_hooks:
            self.register_load_state_dict_post_hook(hold_again)

    def changes(self) -> tuple[Any, ...]:
        """Return the coordinates and signs, and how often each was changed, if PyTorch counts."""
        own: dict[str, Any] = self._buffers
        both = own["alpha"], own["signs"]
        return *both, *(None if tensor.is_inference() else tensor._version for tensor in both)

    def held(self) -> Tensor | None:
        """Return `dense`, decoded anew where what it was decoded from has changed."""
        if self._buffers["dense"] is not None:
            before, now = self.held_of, self.changes()
            same = before[0] is now[0] and before[1] is now[1] and before[2:] == now[2:]
            if not same:
                self.hold()
        return self._buffers["dense"]

    def geometry(self, shape: torch.Size, around: tuple[int, ...]) -> Geometry:
        """Return the geometry of inputs of a shape with zeros `around` them."""
        found = self.geometries.get(shape)  # with one `around` always
        if found is None:
            if len(self.geometries) >= REMEMBERED:
                self.geometries.clear()
            found = self.geometries[shape] = self.new_geometry(shape, around)
        return found

    def new_geometry(self, shape: torch.Size, around: tuple[int, ...]) -> Geometry:
        """Return the geometry of inputs of a shape, as each kind of layer has it."""
        raise NotImplementedError

    def fed(self, x: Tensor) -> Tensor:
        """Return what the layer is to multiply by."""
        activation = self.binary_input
        if activation is None:
            return x
        if few(activation) and kernels_take(x):
            return on_levels(x, planes_of(activation))
        return activation(x)

    def by_kernels(self, x: Tensor, geometry: Geometry) -> Tensor | None:
        """Return the outputs of x, as `by_kernel` does, or None where PyTorch's product does it."""
        activation, planes = self.binary_input, 0
        if activation is not None:
            if not activation.fitted:
                activation.fit_first(x)
            planes = planes_to_count(activation, self.grouping)
        way = self.chosen(x, geometry, planes) if x.numel() else "decoded"
        if way in ("decoded", "held"):
            return None
        layer = self.rows, self.grouping, self._buffers["bias"]
        if way in COUNTED and activation is not None:
            return by_kernel(*layer, x, geometry, way, planes_of(activation))
        return by_kernel(*layer, self.fed(x), geometry, self.tables if way == "tables" else way)

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the weights of some outputs at a time in float32, and their biases."""
        bias, rows = self.bias, self.rows
        dense = None if self.way == "decoded" else self.held()
        if dense is not None:
            yield dense, bias
            return
        blocks = blocks_to_decode(rows, self.grouping)
        for block in [(0, self.grouping.shape[0])] if self.groups > 1 else blocks:
            own = None if bias is None else bias[slice(*block)]
            yield decoded(rows, self.grouping, *block), own

    def extra_repr(self) -> str:
        bits = len(self.alpha) / self.grouping.G
        return f"{tuple(self.grouping.shape)}, {self.grouping.structure}, {bits:.3f} bit"


def hold_again(layer: PackedLayer, incompatible_keys: Any) -> None:
    """Keep the weights of a state that was loaded."""
    layer.hold()
