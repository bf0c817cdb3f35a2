"""Layers that hold bits, coordinates and biases, and look like the layers they replace.

Their state is plain tensors, as `alq.inference.rows` explains them, and the bias.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..method.activations import BinaryActivation
from ..method.quantized_inputs import PLACE
from ..method.structures import Grouping
from .compute import (
    blocks_to_decode,
    by_dots,
    by_popcounts,
    by_tables,
    decoded,
    kernels_work,
)
from .plan import COUNTED, choose
from .planes import countable, planes_of
from .rows import Rows
from .tiles import Geometry

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
        way: one of `alq.inference.compute`; None for what `alq.inference.plan` chooses.
        binary_input: the activation that its input passes first, or None.
        normalised: whether a batch norm was folded into it.
        weight: the weights in float32, decoded anew whenever asked for.
    """

    signs: Tensor
    alpha: Tensor
    outputs: Tensor
    first: Tensor
    bias: Tensor | None
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
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        setattr(self, PLACE, getattr(layer, PLACE, None))
        self.training = False

    @property
    def rows(self) -> Rows:
        return Rows(self.signs, self.alpha, self.outputs, self.first)

    @property
    def weight(self) -> Tensor:
        return decoded(self.rows, self.grouping, 0, self.grouping.shape[0])

    def train(self, mode: bool = True) -> "PackedLayer":
        """Refuse to train; `eval()` is what it always is in."""
        if mode:
            raise InputError(
                f"{self.name}: is packed for inference and cannot be trained; train the network "
                "that it was made of. eval() puts the rest of the network back"
            )
        return super().train(False)

    def check(self, x: Tensor, dimensions: int | None) -> None:
        """Raise InputError if x is not of the layer's type, or is to have a gradient."""
        if x.dtype != self.alpha.dtype:
            types = (str(t.dtype).removeprefix("torch.") for t in (x, self.alpha))
            raise InputError("{}: its input is {}, and the layer {}".format(self.name, *types))
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                f"{self.name}: is packed for inference and gives no gradients; call it under "
                "torch.no_grad()"
            )
        if self.normalised and x.dim() != dimensions:
            raise InputError(
                f"{self.name}: holds a batch norm and takes batches, {dimensions} dimensions; "
                f"the input has {x.dim()}"
            )

    def chosen(self, x: Tensor, positions: int, countable: int) -> str:
        """Return the way to compute x of so many output positions."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or not kernels_work():
            return "decoded"
        if self.way and (countable or self.way not in COUNTED):
            return self.way
        linear = len(self.grouping.shape) == 2
        return choose(self.grouping, len(self.alpha), positions, self.tables, linear, countable)

    def fed(self, x: Tensor) -> Tensor:
        """Return what the layer is to multiply by."""
        return x if self.binary_input is None else self.binary_input(x)

    def by_kernels(self, x: Tensor, geometry: Geometry) -> Tensor | None:
        """Return the outputs of x, as `by_tables` does, or None where decoding computes them."""
        planes = countable(x, self.binary_input, self.grouping)
        layer = self.rows, self.grouping, self.bias
        way = self.chosen(x, geometry.positions, planes) if x.numel() else "decoded"
        if way in COUNTED:
            y = by_popcounts(*layer, x, geometry, planes_of(self.binary_input), way)
            if y is not None:
                return y
            way = self.chosen(x, geometry.positions, 0)
        if way == "decoded":
            return None
        if way == "dots":
            return by_dots(*layer, self.fed(x), geometry)
        return by_tables(*layer, self.fed(x), geometry, self.tables)

    def part_of_bias(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]

    def extra_repr(self) -> str:
        bits = len(self.alpha) / self.grouping.G
        return f"{tuple(self.grouping.shape)}, {self.grouping.structure}, {bits:.3f} bit"


class PackedLinear(PackedLayer):
    """`nn.Linear` from bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) of x (..., C)."""
        self.check(x, 2)
        O, C = self.grouping.shape
        if x.shape[-1:] != (C,):
            raise InputError(f"{self.name}: takes (..., {C}), and the input is {tuple(x.shape)}")
        flat = x.reshape(-1, C)
        if not flat.numel():
            return x.new_zeros(*x.shape[:-1], O)
        y = self.by_kernels(flat, Geometry(1, C, (1, len(flat))))
        if y is None:
            y = self.by_decoding(self.fed(flat))
        return y.view(*x.shape[:-1], O)

    def by_decoding(self, x: Tensor) -> Tensor:
        blocks = blocks_to_decode(self.rows, self.grouping)
        parts = [
            F.linear(x, decoded(self.rows, self.grouping, *block), self.part_of_bias(*block))
            for block in blocks
        ]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class PackedConv(PackedLayer):
    """What convolutions from bits share; `axes` of them are spatial."""

    axes: int
    product: Any
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(self, layer: Any, *arguments: Any) -> None:
        super().__init__(layer, *arguments)
        # Last axis first, before and after, whatever the mode and also of "same".
        self.around = tuple(layer._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (B, O, *output) of x (B, C, *size), or both without B."""
        self.check(x, self.axes + 2)
        if x.dim() == self.axes + 1:
            return self(x.unsqueeze(0)).squeeze(0)
        if x.dim() != self.axes + 2 or x.shape[1] != self.in_channels:
            raise InputError(
                f"{self.name}: takes (batch, {self.in_channels}, ...) of {self.axes} axes, and "
                f"the input is {tuple(x.shape)}"
            )
        around = self.around
        if self.padding_mode != "zeros":
            x, around = F.pad(x, around, self.padding_mode), (0,) * len(around)
        geometry = self.geometry(x, around)
        if min(geometry.output) < 1:
            raise InputError(f"{self.name}: its kernel does not fit into {tuple(x.shape)}")
        y = (
            self.by_kernels(x if self.axes == 2 else x.unsqueeze(2), geometry)
            if x.numel()
            else None
        )
        if y is None:
            return self.by_decoding(self.fed(x), around)
        return y if self.axes == 2 else y.squeeze(2)

    def geometry(self, x: Tensor, around: tuple[int, ...]) -> Geometry:
        def pair(values: Any, missing: int) -> tuple[int, int]:
            return (missing, *values)[-2:]  # type: ignore[return-value]

        return Geometry(
            x.shape[0], x.shape[1], pair(x.shape[2:], 1), pair(self.kernel_size, 1),
            pair(self.stride, 1), pair(self.dilation, 1),
            pair(around[-2::-2], 0), pair(around[-1::-2], 0), self.groups,
        )  # fmt: skip

    def by_decoding(self, x: Tensor, around: tuple[int, ...]) -> Tensor:
        """Return the convolution of x with zeros `around` it."""
        padding: tuple[int, ...] = around[-2::-2]
        if padding != around[-1::-2]:
            x, padding = F.pad(x, around), (0,) * self.axes
        rows, O = self.rows, self.out_channels
        blocks = [(0, O)] if self.groups > 1 else blocks_to_decode(rows, self.grouping)
        if self.axes == 2:  # the layout that PyTorch's convolutions are faster in
            x = x.contiguous(memory_format=torch.channels_last)
        parts = [
            self.product(
                x, decoded(rows, self.grouping, *block), self.part_of_bias(*block), self.stride,
                padding, self.dilation, self.groups,
            )
            for block in blocks
        ]  # fmt: skip
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class PackedConv1d(PackedConv):
    """`nn.Conv1d` from bits."""

    axes, product = 1, staticmethod(F.conv1d)


class PackedConv2d(PackedConv):
    """`nn.Conv2d` from bits."""

    axes, product = 2, staticmethod(F.conv2d)


PACKED = {nn.Linear: PackedLinear, nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d}
