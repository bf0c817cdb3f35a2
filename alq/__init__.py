"""Adaptive Loss-aware Quantization for multi-bit networks (Qu et al., CVPR 2020)."""

from .extras.compiled import CompiledALQ
from .extras.constant_units import fold_constant_units
from .files.floats import round_floats
from .files.packed import load_packed, save_packed
from .fit import fit
from .inference.pack import load_for_inference, pack_for_inference
from .method.network import average_bitwidth, quantize, restore, storage_bytes
from .method.optimizer import ALQ
from .method.quantized_inputs import quantize_activations
from .method.weight import MultiBitWeight
from .training.schedule import Schedule

__all__ = [
    "ALQ",
    "CompiledALQ",
    "MultiBitWeight",
    "Schedule",
    "average_bitwidth",
    "fit",
    "fold_constant_units",
    "load_for_inference",
    "load_packed",
    "pack_for_inference",
    "quantize",
    "quantize_activations",
    "restore",
    "round_floats",
    "save_packed",
    "storage_bytes",
]
