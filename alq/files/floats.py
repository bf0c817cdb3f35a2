"""The floats of a packed file in few bits: coordinates, biases, normalisation.

A tensor's *form* is how many bits each of its values takes before any entropy coding:

    32   float32
    16   float16
    b    2 to 8: a whole multiple, below 2^(b-1) in size, of a step that the tensor has for itself

The step is a bfloat16 number, so that every multiple is exact in float32, and the largest value
gives the same step again: what was rounded once stays as it is.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.weight import MultiBitWeight, prune
from .entropy import Decoder, Encoder, code_numbers, decode_numbers

FLOATS = {"float32": 32, "float16": 16, **{f"{bits}bit": bits for bits in range(8, 2, -1)}}
MOST_STEPS = 8  # bits; the forms above it are floats
LEAST_OF_BUFFERS = 16  # bits that each value of a buffer keeps
FORMS = (*range(2, MOST_STEPS + 1), 16, 32)


@torch.no_grad()
def round_floats(
    model: nn.Module, weights: Sequence[MultiBitWeight], floats: str = "float16"
) -> None:
    """Round what a packed file of these `floats` keeps of `model`: alpha and the rest.

    Buffers, as batch norm's running statistics, are rounded to float16 at most. A coordinate that
    becomes 0 goes, with its basis.

    Raises: InputError names what these floats cannot hold; the model may then be rounded in part.
    """
    form = form_named(floats)
    if form == 32:
        return
    quantized = {weight.name for weight in weights}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in quantized and isinstance(value, Tensor) and value.dtype == torch.float32:
            kept = form if isinstance(value, nn.Parameter) else max(form, LEAST_OF_BUFFERS)
            value.copy_(rounded(name, value.detach(), kept))
    for weight in weights:
        weight.alpha.copy_(rounded(weight.name, weight.alpha, form))
    if weights:
        prune(weights, [weight.mask & (weight.alpha == 0) for weight in weights])


def form_named(floats: str) -> int:
    """Return the form that a user calls `floats`; InputError if it is none."""
    if floats not in FLOATS:
        raise InputError(f"floats '{floats}': choose from {', '.join(FLOATS)}", "floats")
    return FLOATS[floats]


def rounded(name: str, x: Tensor, form: int) -> Tensor:
    """Return the float32 values x of tensor `name` as `form` holds them; InputError if none."""
    found = in_form(x, form)
    # Floats hold infinities and NaN, as masks have them, and levels that saw no batch.
    lost = ~found.isfinite() & (x.isfinite() | (form <= MOST_STEPS))
    if lost.any():
        floats = {form: name for name, form in FLOATS.items()}[form]
        raise InputError(
            f"{name}: has values not finite, or too large for {floats}; pack it as float32"
        )
    return found


def in_form(x: Tensor, form: int) -> Tensor:
    """Return the values that `form` has nearest to the float32 x."""
    if form > MOST_STEPS:
        return x.half().float() if form == 16 else x
    step, count = whole_steps(x, form)
    return step * count + 0.0  # no negative zeros


def whole_steps(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (step, counts) of the float32 x: the step that the largest is `most` of, and x in it.

    Rounding the step to bfloat16 moves the largest by less than half a step, as most < 128.
    """
    most = 2 ** (bits - 1) - 1
    largest = x.abs().max() if x.numel() else x.new_zeros(())
    step = (largest / most).bfloat16().float()
    # Below the smallest normal number a step has too few digits to give itself again.
    step = torch.where(step < torch.finfo(step.dtype).tiny, 0, step)
    count = torch.where(step == 0, 0, x / step).round().clamp(-most, most)
    return step, count


def smallest_form(x: Tensor) -> int:
    """Return the form of fewest bits that holds the float32 x bit for bit."""
    same = (form for form in FORMS if equal_bits(in_form(x, form), x))
    return next(same)


def equal_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether float32 x and y are the same, zeros' signs and all that is no number too."""
    return torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


def encode_values(encoder: Encoder, x: Tensor, form: int, contexts: Iterable[int]) -> bytes:
    """Encode the values x (N,) that `form` holds; return the bytes that go uncoded beside that.

    Of floats these are the lower bytes, as random as the signs; of multiples it is the step.
    """
    if form > MOST_STEPS:
        values = (x.half() if form == 16 else x).numpy()
        planes = values.view(np.uint8).reshape(-1, values.itemsize).T  # low bytes first
        code_numbers(encoder, planes[-1].tolist(), 8, contexts=contexts)
        return planes[:-1].tobytes()
    step, count = whole_steps(x, form)
    negative = count.signbit() & (count != 0)
    symbols = count.abs().int() + negative.int() * 2 ** (form - 1)
    code_numbers(encoder, symbols.tolist(), form, contexts=contexts)
    return step.numpy().tobytes()[2:] if len(x) else b""  # a float32's upper half: bfloat16


class Uncoded:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; ValueError if there are fewer."""
        taken = self.data[self.place : self.place + count]
        if count < 0 or len(taken) < count:
            raise ValueError(f"{len(taken)} bytes where {count} belong")
        self.place += count
        return taken

    def tensor(self, count: int, kind: str) -> Tensor:
        """Return the next `count` values of type `kind`."""
        none = torch.empty(0, dtype=getattr(torch, kind))
        data = self.take(count * none.element_size())
        return torch.frombuffer(bytearray(data), dtype=none.dtype) if data else none


def decode_values(
    decoder: Decoder, uncoded: Uncoded, count: int, form: int, contexts: Iterable[int]
) -> Tensor:
    """Return the next float32 values (count,) that `encode_values` was given."""
    if form not in FORMS:
        raise ValueError(f"form {form}")
    if form > MOST_STEPS:
        lower = uncoded.take(count * (form // 8 - 1))
        planes = np.empty((form // 8, count), np.uint8)
        planes[:-1] = np.frombuffer(lower, np.uint8).reshape(-1, count) if count else 0
        planes[-1] = np.frombuffer(decode_numbers(decoder, count, 8, contexts=contexts), np.uint8)
        floats = np.ascontiguousarray(planes.T).view(f"float{form}").reshape(-1)
        return torch.from_numpy(floats).float()
    upper = uncoded.take(2) if count else b"\0\0"
    step = torch.from_numpy(np.frombuffer(b"\0\0" + upper, np.float32).copy())
    numbers = decode_numbers(decoder, count, form, contexts=contexts)
    symbols = torch.from_numpy(np.frombuffer(numbers, np.uint8).astype(np.int32))
    half = 2 ** (form - 1)
    size = (symbols % half).float()
    return torch.where(symbols < half, size, -size) * step + 0.0
