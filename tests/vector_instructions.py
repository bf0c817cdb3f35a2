"""Which instructions LLVM makes of the kernels for other processors, without one of them.

    NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES= NUMBA_CACHE_DIR=NEW python THIS_FILE

numba compiles the kernels for a processor without extras. Of what it hands to LLVM, LLVM makes code
for AVX2 and for NEON here. Prints JSON: target -> kernel -> instruction on vectors -> how often; or
why there is none of a target. Kernels that come from a cache cannot be looked into.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding as llvm
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.inference import dots, popcounts, tables
from alq.method.quantized_inputs import place

KERNELS = {"look_up_rows": tables, "count_rows": popcounts, "dots": dots, "decode": dots}
# Target -> triple, processor, what an instruction on whole vectors has among its operands.
TARGETS = {
    "NEON": ("aarch64-unknown-linux-gnu", "generic", r"v\d+\.(?:4s|8h|16b)"),
    "AVX2": ("x86_64-unknown-linux-gnu", "haswell", "%ymm"),
}


def compile_all() -> None:
    """Call every kernel once."""
    conv, line = nn.Conv2d(40, 24, 3, 2, 1), nn.Linear(90, 30)
    for layer, x, ways in (
        (conv, torch.randn(2, 40, 11, 11), ("tables", "decoded", "popcounts")),
        (line, torch.randn(1, 90), ("dots",)),
    ):
        weights = alq.quantize(layer, max_bit=2)
        place({"": layer}, {"": 2})
        layer(x)  # its levels fit themselves
        packed = alq.pack_for_inference(layer.eval(), weights)
        for packed.way in ways:
            packed(x)


def handed_to_llvm(name: str) -> str:
    """Return what numba made of a kernel."""
    return next(iter(getattr(KERNELS[name], name).inspect_llvm().values()))


def for_target(ir: str, triple: str, cpu: str) -> str:
    """Return the assembly of numba's `ir`.

    Functions that only the processor here has instructions for, as to count references, stay calls.
    """
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    own = "aarch64" if triple.startswith("aarch64") else "x86"
    ir = re.sub(r"target triple = .*", f'target triple = "{triple}"', ir)
    ir = re.sub(r"target datalayout = .*", f'target datalayout = "{machine.target_data}"', ir)
    ir = re.sub(r'"(?:target-cpu|target-features|tune-cpu)"="[^"]*"', "", ir)
    ir = re.sub(rf"llvm\.(?!{own}\.)(x86|aarch64|arm|riscv|ppc)\.", r"elsewhere.\1.", ir)
    ir = ir.replace(" immarg", "")
    return machine.emit_assembly(llvm.parse_assembly(ir))


def vector_instructions(assembly: str, operands: str) -> dict[str, int]:
    """Return how often each instruction stands there with such operands."""
    found: Counter[str] = Counter()
    for line in assembly.splitlines():
        name, _, rest = line.strip().partition("\t")
        if re.search(operands, rest):
            found[name] += 1
    return dict(found)


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        compile_all()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    printed: dict[str, Any] = {}
    for title, (triple, cpu, operands) in TARGETS.items():
        try:
            llvm.Target.from_triple(triple)
        except RuntimeError as error:
            printed[title] = f"this llvmlite makes no code for {triple}: {error}"
            continue
        printed[title] = {}
        for kernel in KERNELS:
            assembly = for_target(handed_to_llvm(kernel), triple, cpu)
            printed[title][kernel] = vector_instructions(assembly, operands)
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
