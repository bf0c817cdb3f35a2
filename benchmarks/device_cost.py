"""What the quantizer's steps ask of an accelerator, counted on any machine.

    python benchmarks/device_cost.py                         # the four networks, as tables
    python benchmarks/device_cost.py --network vgg --bits 2 --operations

The tensors lie on the CPU, but the steps take the formulation and the block size that they take on
an accelerator, and torch's dispatcher is asked what they do:

    operations     calls of torch that compute or copy. Views and allocations launch nothing and are
                   not counted. One operation is one kernel or, as a sort or a solve, a few.
    bytes          of what each operation reads and writes, tensor by tensor, over the network's
                   weights. What one operation reads twice counts once.
    host waits     operations whose result the host must read before it can go on.

Not counted: the network's own passes. "first" is a coordinate or prune step right after a basis
step, which also derives the coordinates' moments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.method import codes
from networks import NETWORKS
from tables import table
from timing import give_gradients, network, prune_to

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
AT_ONCE = 64  # pairs of tensors that one kernel of a `_foreach` operation takes


class DeviceCost(TorchDispatchMode):
    """Counts what runs inside it.

    Attributes: operations and bytes by torch's name of the operation; waits of the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits = 0
        self.drawn: list[int] = []  # where random numbers lie, which are the host's
        self.lists = ReadsOfLists(self)

    def __enter__(self) -> DeviceCost:
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "rand":
            self.drawn.append(result.data_ptr())
        elif name in WAITS:
            self.waits += 1
        elif not is_view(func) and name not in ALLOCATES:
            longest = max((len(x) for x in args if isinstance(x, list | tuple)), default=1)
            launches = -(-longest // AT_ONCE) if name.startswith("_foreach") else 1
            self.operations[name] += launches
            self.bytes[name] += traffic(func, args, kwargs, result)
        return result


class ReadsOfLists(TorchFunctionMode):
    """Counts a wait where a tensor becomes a list, of which the dispatcher hears nothing."""

    def __init__(self, cost: DeviceCost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and args[0].data_ptr() not in self.cost.drawn:
            self.cost.waits += 1
        return func(*args, **(kwargs or {}))


def is_view(func) -> bool:
    """Return whether the operation returns its input's memory, and leaves it as it is."""
    aliases = [value.alias_info for value in func._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in aliases)
    return views or func.overloadpacket.__name__ == "_unsafe_view"


def traffic(func, args: tuple, kwargs: dict, result: object) -> int:
    """Return the bytes that an operation reads and those that it writes."""
    name, read, written = func.overloadpacket.__name__, [], []
    for k, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or k >= len(args) else args[k]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors_in(value)
        if not (writes and (argument.kwarg_only or name in OVERWRITES)):
            read += tensors_in(value)
    written += tensors_in(result)
    return size_of(read) + size_of(written)


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in a value, list or tuple."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' elements, each element once."""
    parts: dict[tuple, dict[tuple, int]] = {}  # by memory, which has a size, and by what of it
    for x in tensors:
        memory = x.untyped_storage()
        elements = prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
        own = parts.setdefault((memory.nbytes(), memory.data_ptr()), {})
        own[x.data_ptr(), x.shape, x.stride(), x.dtype] = elements * x.element_size()
    return sum(min(whole, sum(own.values())) for (whole, _), own in parts.items())


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Let the steps on this CPU's tensors be those that an accelerator takes."""
    with mock.patch.object(codes, "CPU", "none"):
        yield


def cost_of(step: Callable[[], None]) -> DeviceCost:
    """Return what one call of the step costs."""
    with DeviceCost() as cost:
        step()
    return cost


@as_on_an_accelerator()
def costs_of_steps(name: str, bits: str) -> tuple[int, dict[str, DeviceCost]]:
    """Return a network's number of weights and the costs of the steps, at an average of `bits`."""
    _, sketch = network(name, "cpu")
    optimizer = alq.ALQ(sketch(), lr=1e-3)
    give_gradients([weight.parameter for weight in optimizer.weights])
    prune_to(bits, optimizer)
    optimizer.basis_step()  # what layers of one shape share is arranged once

    def prune() -> None:
        optimizer.prune_step(1e-3, 1e-3)

    costs = {"basis": cost_of(optimizer.basis_step)}
    costs["coordinate, first"] = cost_of(optimizer.coordinate_step)
    costs["coordinate"] = cost_of(optimizer.coordinate_step)
    costs["prune"] = cost_of(prune)
    optimizer.ste_step()
    costs["ste"] = cost_of(optimizer.ste_step)
    costs["prune, first"] = cost_of(prune)
    return sum(weight.parameter.numel() for weight in optimizer.weights), costs


def row_of(name: str, bits: str, weights: int, step: str, cost: DeviceCost) -> dict:
    """Return one step's figures."""
    return {
        "network": name,
        "bits": bits,
        "step": step,
        "operations": cost.operations.total(),
        "bytes a weight": cost.bytes.total() / weights,
        "host waits": cost.waits,
    }


def tables(rows: list[dict]) -> str:
    """Return a Markdown table of each figure, a network at some bits in a line."""
    found = []
    steps = list(dict.fromkeys(row["step"] for row in rows))
    for figure in ("operations", "bytes a weight", "host waits"):
        lines: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            lines.setdefault((row["network"], row["bits"]), []).append(f"{row[figure]:.0f}")
        cells = [[*key, *line] for key, line in lines.items()]
        found.append(f"{figure}\n\n{table(['network', 'bits', *steps], cells)}")
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=["max", "2"], help="'max' or an average")
    parser.add_argument("--operations", action="store_true", help="also every operation's share")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rows = []
    for name in args.network:
        for bits in args.bits:
            weights, costs = costs_of_steps(name, bits)
            rows += [row_of(name, bits, weights, step, cost) for step, cost in costs.items()]
            for step, cost in costs.items() if args.operations else ():
                print(name, bits, step)
                for operation, count in cost.operations.most_common():
                    share = cost.bytes[operation] / weights
                    print(f"{count:6} {operation:30} {share:7.1f} bytes a weight")
    print(tables(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
