"""LLVM's vectors for the kernels, of which numba makes none by itself, and numba's compiler.

Each function takes an `ir.IRBuilder` b and writes instructions. LLVM makes AVX-512, AVX2 or NEON of
them. Addresses are integers.

numba's cache of a function knows when the file of that function changed, not the files that it
takes other functions from. So the names that it keeps functions under have `SOURCES` in them.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jobs import FIELDS, LINE

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, SHORTS = ir.VectorType(F32, 16), ir.VectorType(I16, 32)
LONGS = ir.VectorType(I64, 8)
FLAGS = ir.VectorType(ir.IntType(1), 16)
VECTOR = 64  # bytes of either
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


def first_lanes(b: Any, count: Any) -> Any:
    """Return flags that are set in the first `count` of 16 lanes."""
    numbers = ir.Constant(ir.VectorType(I64, 16), list(range(16)))
    return b.icmp_signed("<", numbers, splat(b, count, numbers.type))


def load_lanes(b: Any, address: Any, flags: Any) -> Any:
    """Return the floats at the address in those lanes, 0 in the others, which are not read."""
    name, pointer = "llvm.masked.load.v16f32.p0", FLOATS.as_pointer()
    kind = ir.FunctionType(FLOATS, [pointer, I32, FLAGS, FLOATS])
    load = cgutils.get_or_insert_function(b.module, kind, name)
    zeros = ir.Constant(FLOATS, None)
    return b.call(load, [b.inttoptr(address, pointer), ir.Constant(I32, 4), flags, zeros])


def fetch_ahead(b: Any, address: Any) -> None:
    """Bring what lies AHEAD of the address near, before it is asked for."""
    name, pointer = "llvm.prefetch.p0", ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    fetch = cgutils.get_or_insert_function(b.module, kind, name)
    place = b.inttoptr(b.add(address, constant(AHEAD)), pointer)
    b.call(fetch, [place, *(ir.Constant(I32, number) for number in (0, 3, 1))])  # read, keep, data


def store_lanes(b: Any, value: Any, address: Any, flags: Any) -> None:
    """Store those lanes of 16 floats or shorts, and leave the memory of the others alone."""
    floats = value.type.element is F32
    name, pointer = f"llvm.masked.store.v16{'f32' if floats else 'i16'}.p0", value.type.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [value.type, pointer, I32, FLAGS])
    store = cgutils.get_or_insert_function(b.module, kind, name)
    align = ir.Constant(I32, 4 if floats else 2)
    b.call(store, [value, b.inttoptr(address, pointer), align, flags])


def as_floats(b: Any, shorts: Any) -> list:
    """Return the lower and the upper half of `shorts` as floats."""
    order = [ir.Constant(ir.VectorType(I32, 16), list(range(k, k + 16))) for k in (0, 16)]
    return [b.sitofp(b.shuffle_vector(shorts, shorts, half), FLOATS) for half in order]


def ones(b: Any, value: Any) -> Any:
    """Return how many ones a 64-bit word has, or each lane of `LONGS`."""
    name = "i64" if value.type is I64 else "v8i64"
    kind = ir.FunctionType(value.type, [value.type])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.ctpop.{name}"), [value])


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


def kernel(function: Callable[[int], None]) -> int:
    """Return the address of `function`, compiled, which takes that of a job (`alq.inference.jobs`).

    It runs without Python: it may neither raise nor make arrays.
    """
    made = compiled(function, partial(numba.cfunc, types.void(types.CPointer(JOB))))
    KEPT.append(made)
    return made.address


KEPT: list[Any] = []  # whose addresses are in use
JOB = numba.from_dtype(np.dtype([(name, np.int64) for name in FIELDS]))


def pointer(kind: Any) -> Callable:
    """Return the intrinsic (address) that makes a pointer of it, for `numba.carray`."""

    @intrinsic
    def cast(typing: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            return b.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(i64), generate

    return cast


as_bytes, as_ints, as_longs, as_floats_at = map(pointer, (types.uint8, types.int32, i64, f32))


@compiled
def job_at(address):
    """Return the job at the address."""
    return numba.carray(address, 1)[0]


@intrinsic
def count_up(typing: Any, address: Any) -> Any:
    """Add 1 to the integer at the address, as if no other thread was there; return what it was."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        place = b.inttoptr(arguments[0], I64.as_pointer())
        return b.atomic_rmw("add", place, constant(1), "monotonic")

    return i64(i64), generate


@intrinsic
def called(typing: Any, address: Any) -> Any:
    """Return what the C function `int f(void)` at the address returns."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        return b.sext(b.call(b.inttoptr(arguments[0], kind.as_pointer()), []), I64)

    return i64(i64), generate


@compiled
def own_number(job):
    """Return the number of this thread among those of the job."""
    return called(job.number) if job.number else count_up(job.counters + LINE * job.threads)


@compiled
def next_unit(job, own):
    """Return a unit that no thread has taken; -1 if there is none.

    A thread takes those of its own share, and what is then left of others'. Layer after layer it so
    has the same pictures, which lie in its own cache.
    """
    for k in range(job.threads):
        share = (own + k) % job.threads
        unit = job.units * share // job.threads + count_up(job.counters + LINE * share)
        if unit < job.units * (share + 1) // job.threads:
            return unit
    return -1
