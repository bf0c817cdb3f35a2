"""The layers that compute from bits: linear ones and convolutions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .layers import PackedLayer
from .tiles import Geometry


def together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class PackedLinear(PackedLayer):
    """`nn.Linear` from bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Return y (..., O) of the input x (..., C)."""
        x = input
        self.check(x, 2)
        O, C = self.grouping.shape
        if x.shape[-1:] != (C,):
            raise InputError(f"{self.name}: takes (..., {C}), and the input is {tuple(x.shape)}")
        flat = x.reshape(-1, C)
        if not flat.numel():
            return x.new_zeros(*x.shape[:-1], O)
        y = self.by_kernels(flat, self.geometry(flat.shape, self.around))
        if y is None:
            x_hat = self.fed(flat)
            y = together([F.linear(x_hat, *part) for part in self.parts()])
        return y.view(*x.shape[:-1], O)

    def new_geometry(self, shape: torch.Size, around: tuple[int, ...]) -> Geometry:
        return Geometry(1, shape[1], (1, shape[0]))


class PackedConv(PackedLayer):
    """`nn.Conv1d` or `nn.Conv2d` from bits."""

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(self, layer: Any, *arguments: Any) -> None:
        super().__init__(layer, *arguments)
        self.axes = len(self.kernel_size)
        # Last axis first, before and after, whatever the mode and also of "same".
        self.around = tuple(layer._reversed_padding_repeated_twice)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution (B, O, *output) of x (B, C, *size), or both without B."""
        x = input
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
        geometry = self.geometry(x.shape, around)
        if min(geometry.output) < 1:
            raise InputError(f"{self.name}: its kernel does not fit into {tuple(x.shape)}")
        y = self.by_kernels(x if self.axes == 2 else x.unsqueeze(2), geometry)
        if y is None:
            return self.by_product(self.fed(x), around)
        return y if self.axes == 2 else y.squeeze(2)

    def new_geometry(self, shape: torch.Size, around: tuple[int, ...]) -> Geometry:
        def pair(values: Any, missing: int) -> tuple[int, int]:
            return (missing, *values)[-2:]  # type: ignore[return-value]

        return Geometry(
            shape[0], shape[1], pair(shape[2:], 1), pair(self.kernel_size, 1),
            pair(self.stride, 1), pair(self.dilation, 1),
            pair(around[-2::-2], 0), pair(around[-1::-2], 0), self.groups,
        )  # fmt: skip

    def by_product(self, x: Tensor, around: tuple[int, ...]) -> Tensor:
        """Return the convolution of x with zeros `around` it."""
        padding: tuple[int, ...] = around[-2::-2]
        if padding != around[-1::-2]:
            x, padding = F.pad(x, around), (0,) * self.axes
        if self.axes == 2:  # the layout that PyTorch's convolutions are faster in
            x = x.contiguous(memory_format=torch.channels_last)
        product: Any = F.conv1d if self.axes == 1 else F.conv2d
        options = self.stride, padding, self.dilation, self.groups
        return together([product(x, *part, *options) for part in self.parts()])


PACKED = {nn.Linear: PackedLinear, nn.Conv1d: PackedConv, nn.Conv2d: PackedConv}
