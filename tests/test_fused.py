"""The Triton kernels of `--compile` on CUDA, without a GPU: interpreted, and compiled unseen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import alq
from alq.errors import InputError
from alq.extras import compiled
from alq.method.loss_model import AMSGrad
from alq.method.steps import Groups

ROOT = Path(__file__).resolve().parent.parent
TYPES = {torch.float32: "*fp32", torch.uint8: "*u8", torch.bool: "*i1", float: "fp32", int: "i32"}
Call = tuple[dict[str, object], dict[str, int]]  # arguments and constants by name


@pytest.fixture(scope="module")
def triton():
    return pytest.importorskip("triton", reason="needs triton, which comes with torch for CUDA")


def test_in_tritons_interpreter(triton) -> None:
    """In a process of its own: triton must be imported for it."""
    versions = [[int(x) for x in x.split(".")[:2]] for x in (triton.__version__, np.__version__)]
    if versions[0] < [3, 8] and versions[1] >= [2, 4]:
        pytest.skip("the interpreter of triton below 3.8 needs numpy below 2.4")
    tests = ["-q", "-x", "-p", "no:cacheprovider", ROOT / "tests" / "interpreted_fused.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class Recorder:
    """Stands for a kernel, and keeps what it is called with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def take(*arguments: object, **constants: int) -> None:
            self.calls.append(
                (dict(zip(self.kernel.arg_names, arguments, strict=False)), constants)
            )

        return take


def calls(
    monkeypatch, L: int, n: int, move_base: bool, ridge: float | None
) -> dict[str, tuple[object, list[Call]]]:
    """Return the kernels with all that the steps call them with, for groups of n weights."""
    from alq.extras import fused_steps

    names = ("basis_kernel", "products_kernel", "rebuild_kernel")
    recorders = {name: Recorder(getattr(fused_steps, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(fused_steps, name, recorder)
    w, codes = torch.zeros(3, n), torch.zeros(3, n, dtype=torch.uint8)
    groups = Groups(w, w, w, w, codes, torch.zeros(3, L), torch.ones(3, L, dtype=torch.bool))
    fused_steps.basis_step(groups, w, w, 1, AMSGrad(0.1, (0.9, 0.999), 1e-8), move_base, ridge)
    fused_steps.coordinate_gradients(groups, (0.9, 0.999))
    fused_steps.basis_products(w, codes, groups.live)
    fused_steps.rebuild(codes, groups.alpha, w)
    return {name: (recorder.kernel, recorder.calls) for name, recorder in recorders.items()}


@pytest.mark.parametrize(
    "capability, L, n, move_base, ridge",
    [
        (80, 8, 512, False, None),
        (90, 8, 147, True, 1e-6),
        (90, 3, 64, True, None),
        (90, 1, 9, 0, 1),
    ],
)
def test_kernels_compile_to_machine_code(
    triton, monkeypatch, tmp_path, capability, L, n, move_base, ridge
) -> None:
    """For an A100 (sm_80) and an H100 (sm_90), with all values in registers.

    Triton's own assembler makes the code, which needs no GPU. That proves that the kernels compile
    and how many registers they take. It does not prove that they run, are right or are fast.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (kernel, found) in calls(monkeypatch, L, n, move_base, ridge).items():
        for arguments, constants in found:
            options = {key: constants.pop(key) for key in list(constants) if key.islower()}
            types = {key: type_of(value) for key, value in arguments.items()}
            signature = types | dict.fromkeys(constants, "constexpr")
            assert list(signature) == kernel.arg_names
            places = {key: (number,) for number, key in enumerate(signature)}
            by_16 = {places[key]: [["tt.divisibility", 16]] for key in types if key[-1] == "_"}
            if n % 16 == 0:  # as Triton notices when it is launched
                by_16[places["n"]] = [["tt.divisibility", 16]]
            values = {places[key]: value for key, value in constants.items()}
            made = triton.compile(
                ASTSource(kernel, signature, values, by_16),
                target=GPUTarget("cuda", capability, 32), options=options,
            )  # fmt: skip
            registers, spilled = usage(triton, made.asm["cubin"], tmp_path / f"{name}.cubin")
            print(f"sm_{capability} L={L} n={n} {name} {constants}: {registers} registers")
            assert not spilled, f"{name} {constants}: {spilled} bytes a thread"


def type_of(value: object) -> str:
    return TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]


def usage(triton, code: bytes, path: Path) -> tuple[int, int]:
    """Return registers and spilled bytes a thread, of a program in machine code."""
    path.write_bytes(code)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("compiled, but this triton has no cuobjdump to tell the registers")
    run = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", run.stdout).groups()
    return int(registers), int(stack) + int(local)


def test_the_weight_chooses_the_kernels(triton) -> None:
    """In float32 its device's; the eager ones in another type and without live bases."""
    for device, dtype, L, module in (
        ("cpu", torch.float32, 2, "alq.extras.compiled_steps"),
        ("cuda:1", torch.float32, 2, "alq.extras.fused_steps"),
        ("cuda:1", torch.float64, 2, "alq.method.steps"),
        ("cuda:1", torch.float32, 0, "alq.method.steps"),
    ):
        parameter = SimpleNamespace(device=torch.device(device), dtype=dtype)
        weight = SimpleNamespace(L=L, parameter=parameter)
        assert alq.CompiledALQ.arithmetic(None, weight).__name__ == module


def test_without_triton(monkeypatch) -> None:
    """A weight on CUDA asks for it; the error names it. (A CPU's tensors serve as the device's.)"""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "alq.extras.fused_steps", raising=False)
    monkeypatch.delattr("alq.extras.fused_steps", raising=False)
    monkeypatch.setattr(compiled.torch, "zeros", lambda *_, **__: torch.empty(4, 64))
    with pytest.raises(InputError, match=r"install .* triton"):
        compiled.require_compiler.__wrapped__(torch.device("cuda"))


def test_importing_alq_imports_no_kernels() -> None:
    """Nor, therefore, triton, of which torch may load some by itself."""
    code = "import sys, alq; sys.exit('alq.extras.fused_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
