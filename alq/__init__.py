"""Adaptive Loss-aware Quantization for multi-bit networks (Qu et al., CVPR 2020)."""

from .compact import round_floats
from .compiled import CompiledALQ
from .fit import fit
from .multibit import MultiBitWeight
from .network import average_bitwidth, quantize, restore, storage_bytes
from .optimizer import ALQ
from .packed import load_packed, save_packed
from .schedule import Schedule

__all__ = [
    "ALQ",
    "CompiledALQ",
    "MultiBitWeight",
    "Schedule",
    "average_bitwidth",
    "fit",
    "load_packed",
    "quantize",
    "restore",
    "round_floats",
    "save_packed",
    "storage_bytes",
]
