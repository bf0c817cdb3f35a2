"""Multi-bit weights: w_hat = sum_i alpha_i B_i, group by group (docs/method.md, Notation)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..machine.arithmetic import float32_products
from .codes import blocks, half_bits, pack_bits, sign_table, weights_by_code
from .sketch import sketch
from .structures import Grouping, coordinate_bytes

SKETCH_BLOCK = 2**22  # basis elements sketched at a time, which bounds the memory


class MultiBitWeight:
    """One layer's weight as binary bases and coordinates.

    Steps write to `codes`, `alpha` and `mask` in place, and these may be parts of larger tensors:
    clone what is to be kept.

    Attributes:
        name: the parameter's name in the model.
        parameter: the layer's parameter, which holds `w_hat()` after every step.
        grouping: which weights share coordinates.
        structure, G, n: the grouping's.
        codes: (G, n) uint8, the bases (see `alq.method.codes`).
        alpha: (G, I) float, the coordinates, 0 where dead.
        mask: (G, I) bool, which coordinates exist; `prune` removes some.
        live_total, L: host copies of mask.sum() and of the largest bitwidth, mask.sum(1).max().
        order: (G, L) int64, the places of each group's coordinates, live ones first.
    """

    live_total: int
    L: int
    order: Tensor

    def __init__(
        self, name: str, parameter: nn.Parameter, grouping: Grouping,
        codes: Tensor, alpha: Tensor, mask: Tensor,
    ) -> None:  # fmt: skip
        self.name, self.parameter, self.grouping = name, parameter, grouping
        self.structure, self.G, self.n = grouping.structure, grouping.G, grouping.n
        self.codes, self.alpha, self.mask = codes, alpha, mask
        count_live([self])

    @classmethod
    @torch.no_grad()
    def from_parameter(
        cls, name: str, parameter: nn.Parameter, grouping: Grouping, max_bit: int
    ) -> "MultiBitWeight":
        """Sketch the parameter; it is left as it was."""
        if not 1 <= max_bit <= 8:
            raise InputError(f"{name}: max_bit {max_bit} is out of range; it must be 1 to 8")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name}: is {str(parameter.dtype).removeprefix('torch.')}; quantize the model in "
                "float32 (model.float()), and let torch.autocast compute it in fewer bits"
            )
        if not parameter.isfinite().all():
            raise InputError(f"{name}: has weights that are not finite; train it again")
        w = grouping.to_groups(parameter.detach())
        groups = max(1, SKETCH_BLOCK // (max_bit * grouping.n))
        parts = []
        for part in w.split(groups):
            with float32_products(w.device):
                B, alpha, mask = sketch(part, max_bit)
            parts.append((pack_bits(B.transpose(1, 2) > 0), alpha, mask))
        return cls(name, parameter, grouping, *map(torch.cat, zip(*parts, strict=True)))

    def set_form(self, codes: Tensor, alpha: Tensor, mask: Tensor) -> None:
        """Take other bases and coordinates; the parameter gets their w_hat."""
        self.codes, self.alpha, self.mask = codes, alpha, mask
        count_live([self])
        self.write()

    @property
    def I(self) -> int:  # noqa: E743 (the paper's letter)
        """The layer's maximum bitwidth."""
        return self.mask.shape[1]

    def live_first(self, x: Tensor) -> Tensor:
        """Return the values of the live coordinates, dead ones behind: (G, I) -> (G, L)."""
        return x.gather(1, self.order)

    @property
    def B(self) -> Tensor:
        """(G, I, n) int8 of -1 and +1, dead rows 0; computed when asked for."""
        signs = sign_table(self.L, torch.int8, self.codes.device)[self.codes.long()]  # (G, n, L)
        signs = signs.transpose(1, 2) * self.live_first(self.mask).unsqueeze(2)  # (G, L, n)
        B = signs.new_zeros(self.G, self.I, self.n)
        return B.scatter_(1, self.order.unsqueeze(2).expand_as(signs), signs)

    def w_hat_groups(self) -> Tensor:
        """Return the quantized weight, group by group (G, n)."""
        alpha = self.live_first(self.alpha)
        parts = [weights_by_code(alpha[b], self.codes[b]) for b in blocks(self.codes, self.L)]
        return torch.cat(parts)

    def w_hat(self) -> Tensor:
        """Return the quantized weight in the layer's shape."""
        return self.grouping.to_weight(self.w_hat_groups())

    @torch.no_grad()
    def write(self, w_hat: Tensor | None = None) -> None:
        """Put `w_hat` (G, n), by default `w_hat_groups()`, into the layer's parameter.

        One that is a view of the parameter is there already.
        """
        if w_hat is None:
            w_hat = self.w_hat_groups()
        if w_hat is not self.parameter and w_hat._base is not self.parameter:
            self.parameter.copy_(self.grouping.to_weight(w_hat))

    @property
    def bitwidth(self) -> float:
        """Average number of bits a weight: mask.sum() / G."""
        return self.live_total / self.G

    @property
    def storage_bytes(self) -> float:
        """Bytes of the live coordinates: a basis, one bit a weight, and a float32 each."""
        return self.live_total * coordinate_bytes(self.n)

    def state_dict(self) -> dict:
        """Return tensors and plain values, on the CPU."""
        tensors = {key: getattr(self, key) for key in ("codes", "alpha", "mask")}
        return {**describe(self.name, self.grouping), **copied(tensors, "cpu")}

    @classmethod
    def from_state(
        cls, name: str, parameter: nn.Parameter, grouping: Grouping, state: dict
    ) -> "MultiBitWeight":
        """Return the weight that gave `state`; InputError says what differs."""
        check_state(name, grouping, state)
        tensors = [state[key] for key in ("codes", "alpha", "mask")]
        return cls(name, parameter, grouping, *copied(tensors, parameter.device))

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave for the same layer; the parameter gets w_hat.

        Raises: InputError says what differs.
        """
        saved = self.from_state(self.name, self.parameter, self.grouping, state)
        self.set_form(saved.codes, saved.alpha, saved.mask)


@torch.no_grad()
def prune(weights: Sequence[MultiBitWeight], dead: Sequence[Tensor]) -> None:
    """Remove the coordinates that `dead` flags, (G, I) bool for each weight; parameters get w_hat.

    The host waits for the device once, for all weights.
    """
    for weight, flags in zip(weights, dead, strict=True):
        kept = weight.mask & ~flags
        weight.codes, weight.mask = codes_without(weight.codes, weight.live_first(kept)), kept
        weight.alpha = weight.alpha * weight.mask
    count_live(weights)
    for weight in weights:
        weight.write()


def codes_without(codes: Tensor, keep: Tensor) -> Tensor:
    """Return the codes (G, n) that are left: the bits of live bases move up to fill the gaps.

    `keep` (G, L) bool are the bases that stay.
    """
    L = keep.shape[1]
    value = keep * 2.0 ** keep.cumsum(1)  # (G, L): twice that of its bit from now on
    bits = half_bits(L, value.dtype, value.device)  # (2^L, L)
    parts = []
    for block in blocks(codes, L):
        new_codes = (value[block] @ bits.T).to(torch.uint8)  # (G, 2^L), of each old code
        parts.append(new_codes.gather(1, codes[block].long()))
    return torch.cat(parts)


def count_live(weights: Sequence[MultiBitWeight]) -> None:
    """Bring up to date what follows from the masks; all counts are read from the device at once."""
    counts = []
    for weight in weights:
        live = weight.mask.sum(1)  # (G,)
        counts.append(torch.stack([live.sum(), live.max()]))
    for weight, (total, most) in zip(weights, torch.stack(counts).tolist(), strict=True):
        weight.live_total, weight.L = total, most
        weight.order = live_places(weight.mask, most)


def live_places(mask: Tensor, L: int) -> Tensor:
    """Return the places of live coordinates (G, L), dead ones behind, each kind in its own order.

    `mask` is (G, I) bool, `L` its largest number of live ones.
    """
    return mask.view(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :L]


def describe(name: str, grouping: Grouping) -> dict:
    """Return the plain values in the state of layer `name` so grouped."""
    return {"name": name, **vars(grouping), "shape": list(grouping.shape)}


def copied(state: Any, device: str | torch.device) -> Any:
    """Return `state`, a value, list or dict, with its tensors copied to `device`."""
    if isinstance(state, Tensor):
        return state.to(device, copy=True)
    if isinstance(state, dict):
        return {key: copied(value, device) for key, value in state.items()}
    return [copied(value, device) for value in state] if isinstance(state, list) else state


def check_state(name: str, grouping: Grouping, state: dict) -> None:
    """InputError if `state`, of `MultiBitWeight.state_dict`, is not of layer `name` so grouped."""
    for key, value in describe(name, grouping).items():
        if (saved := state.get(key, 0)) != value:  # older files have no "transposed"
            raise InputError(f"{name}: the saved weight has {key} {saved}, this one {value}")
    G, I = grouping.G, state["mask"].shape[-1]
    for key, shape in {"codes": (G, grouping.n), "alpha": (G, I), "mask": (G, I)}.items():
        if (found := tuple(state[key].shape)) != shape:
            raise InputError(f"{name}: the saved {key} has shape {found}, not {shape}")
