"""LLVM's vectors for the kernels, of which numba makes none by itself, and numba's compiler.

Each function takes an `ir.IRBuilder` b and writes instructions. LLVM makes AVX-512, AVX2 or NEON of
them. Addresses are integers. After a change here touch the files of the kernels, whose date and
length are all that numba's cache looks at.
"""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, SHORTS = ir.VectorType(F32, 16), ir.VectorType(I16, 32)
LONGS = ir.VectorType(I64, 8)
FLAGS = ir.VectorType(ir.IntType(1), 16)
VECTOR = 64  # bytes of either
FUSED = ("contract",)  # a product and a sum may be one instruction
i64, f32 = types.int64, types.float32


def constant(number: int) -> ir.Constant:
    return ir.Constant(I64, number)


def load(b: Any, address: Any, kind: ir.Type, align: int = 1) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def store(b: Any, value: Any, address: Any, align: int = 1) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def splat(b: Any, value: Any) -> Any:
    """Return the float `value` in all lanes."""
    one = b.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, 16), [0] * 16))


def as_floats(b: Any, shorts: Any) -> list:
    """Return the lower and the upper half of `shorts` as floats."""
    order = [ir.Constant(ir.VectorType(I32, 16), list(range(k, k + 16))) for k in (0, 16)]
    return [b.sitofp(b.shuffle_vector(shorts, shorts, half), FLOATS) for half in order]


def ones(b: Any, value: Any) -> Any:
    """Return how many ones a 64-bit word has, or each lane of `LONGS`."""
    name = "i64" if value.type is I64 else "v8i64"
    kind = ir.FunctionType(value.type, [value.type])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.ctpop.{name}"), [value])


def compiled(function: Callable) -> Callable:
    """Return `function` compiled at its first call, from then on read from disk where one can be.

    numba keeps it beside this file, or where that cannot be written in the user's cache.
    """
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place can be written
        return numba.njit(**options)(function)
