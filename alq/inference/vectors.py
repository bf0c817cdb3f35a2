"""LLVM's vectors for the kernels, of which numba makes none by itself, and numba's compiler.

Each function takes an `ir.IRBuilder` b and writes instructions. LLVM makes AVX-512, AVX2 or NEON of
them. Addresses are integers.

numba's cache of a function knows when the file of that function changed, not the files that it
takes other functions from. So the names that it keeps functions under have `SOURCES` in them.
"""

import hashlib
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jobs import FIELDS

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, SHORTS = ir.VectorType(F32, 16), ir.VectorType(I16, 32)
LONGS = ir.VectorType(I64, 8)
FLAGS = ir.VectorType(ir.IntType(1), 16)
AHEAD = 2048  # bytes
FUSED = ("contract",)  # a product and a sum may be one instruction
i64, f32 = types.int64, types.float32


def digest(folder: Path) -> str:
    """Return what changes with any Python file of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


SOURCES = digest(Path(__file__).parent)


def constant(number: int) -> ir.Constant:
    return ir.Constant(I64, number)


def load(b: Any, address: Any, kind: ir.Type, align: int = 1) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def store(b: Any, value: Any, address: Any, align: int = 1) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def element(b: Any, address: Any, index: Any, kind: ir.Type) -> Any:
    """Return number `index` of the integers or floats of a kind that lie at the address."""
    size = 4 if kind is F32 else kind.width // 8
    place = constant(size * index) if isinstance(index, int) else b.mul(index, constant(size))
    return load(b, b.add(address, place), kind)


def splat(b: Any, value: Any, kind: ir.VectorType = FLOATS) -> Any:
    """Return `value` in all lanes."""
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def shuffled(b: Any, u: Any, v: Any, order: list[int]) -> Any:
    """Return those lanes of u, and of v behind it."""
    return b.shuffle_vector(u, v, ir.Constant(ir.VectorType(I32, len(order)), order))


def transposed(b: Any, rows: list) -> list:
    """Return the 16 columns of 16 vectors: four times, interleave those 8 apart."""
    low = [16 * (k % 2) + k // 2 for k in range(16)]
    high = [place + 8 for place in low]
    for _ in range(4):
        pairs = zip(rows[:8], rows[8:], strict=True)
        rows = [shuffled(b, *pair, half) for pair in pairs for half in (low, high)]
    return rows


def llvm(b: Any, name: str, kind: Any, *values: Any, **options: Any) -> Any:
    """Return what LLVM's function `name`, whose results are of a kind, makes of the values."""
    function = ir.FunctionType(kind, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), values, **options)


def first_lanes(b: Any, count: Any) -> Any:
    """Return flags that are set in the first `count` of 16 lanes."""
    numbers = ir.Constant(ir.VectorType(I64, 16), list(range(16)))
    return b.icmp_signed("<", numbers, splat(b, count, numbers.type))


def load_lanes(b: Any, address: Any, flags: Any) -> Any:
    """Return the floats at the address in those lanes, 0 in the others, which are not read."""
    place = b.inttoptr(address, FLOATS.as_pointer())
    align, zeros = ir.Constant(I32, 4), ir.Constant(FLOATS, None)
    return llvm(b, "llvm.masked.load.v16f32.p0", FLOATS, place, align, flags, zeros)


def fetch_ahead(b: Any, address: Any) -> None:
    """Bring what lies AHEAD of the address near, before it is asked for."""
    place = b.inttoptr(b.add(address, constant(AHEAD)), ir.IntType(8).as_pointer())
    read, keep, data = (ir.Constant(I32, number) for number in (0, 3, 1))
    llvm(b, "llvm.prefetch.p0", ir.VoidType(), place, read, keep, data)


def store_lanes(b: Any, value: Any, address: Any, flags: Any) -> None:
    """Store those lanes of 16 floats or shorts, and leave the memory of the others alone."""
    kind, align = ("f32", 4) if value.type.element is F32 else ("i16", 2)
    place = b.inttoptr(address, value.type.as_pointer())
    name = f"llvm.masked.store.v16{kind}.p0"
    llvm(b, name, ir.VoidType(), value, place, ir.Constant(I32, align), flags)


def as_floats(b: Any, shorts: Any) -> list:
    """Return the lower and the upper half of `shorts` as floats."""
    halves = [shuffled(b, shorts, shorts, list(range(k, k + 16))) for k in (0, 16)]
    return [b.sitofp(half, FLOATS) for half in halves]


def sum_of_lanes(b: Any, floats: Any) -> Any:
    """Return the sum of the 16 floats, added in any order."""
    name, zero = "llvm.vector.reduce.fadd.v16f32", ir.Constant(F32, 0.0)
    return llvm(b, name, F32, zero, floats, fastmath=("reassoc",))


def ones(b: Any, value: Any) -> Any:
    """Return how many ones a 64-bit word has, or each lane of `LONGS`."""
    kind = "i64" if value.type is I64 else "v8i64"
    return llvm(b, f"llvm.ctpop.{kind}", value.type, value)


def instructions(kind: Any) -> Callable:
    """Return what makes of a function that writes instructions one that kernels can call.

    It is written (b, *arguments), and called with the arguments alone, which are whole numbers and
    addresses. What it returns is of a kind of numba's, `types.void` for nothing.
    """

    def decorate(write: Callable) -> Any:
        @wraps(write)
        def described(typing: Any, *kinds: Any) -> Any:
            def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
                result = write(b, *arguments)
                return context.get_dummy_value() if result is None else result

            return kind(*[i64] * len(kinds)), generate

        return intrinsic(described)

    return decorate


def compiled(function: Callable, compiler: Callable = numba.njit) -> Callable:
    """Return `function` compiled at its first call, from then on read from disk where one can be.

    numba keeps it beside this file, or where that cannot be written in the user's cache.
    """
    function.__qualname__ += f"_{SOURCES}"
    options = {"error_model": "numpy", "boundscheck": False}
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # no place can be written
        return compiler(**options)(function)


JOB = numba.from_dtype(np.dtype([(name, np.int64) for name in FIELDS]))


def kernel(function: Callable[[int], None]) -> Any:
    """Return `function`, compiled, which takes the address of a job (`alq.inference.jobs`).

    It has an `address` itself. It runs without Python: it may neither raise nor make arrays.
    """
    return compiled(function, partial(numba.cfunc, types.void(types.CPointer(JOB))))


def pointer(kind: Any, own: ir.Type) -> Callable:
    """Return what makes a pointer of an address, for `numba.carray`; numba's kind and LLVM's."""

    @instructions(types.CPointer(kind))
    def cast(b: Any, address: Any) -> Any:
        return b.inttoptr(address, own.as_pointer())

    return cast


as_bytes = pointer(types.uint8, ir.IntType(8))
as_ints, as_longs = pointer(types.int32, I32), pointer(i64, I64)
as_floats_at = pointer(f32, F32)
