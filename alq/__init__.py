"""Adaptive Loss-aware Quantization for multi-bit networks (Qu et al., CVPR 2020)."""

from .multibit import MultiBitWeight, average_bitwidth, quantize, restore, storage_bytes
from .optimizer import ALQ

__all__ = ["ALQ", "MultiBitWeight", "average_bitwidth", "quantize", "restore", "storage_bytes"]
