"""LLVM makes vector instructions of the kernels, on processors that are not here, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_inference import numba_works

SCRIPT = Path(__file__).with_name("vector_instructions.py")
# Kernel -> what it does with whole vectors, as each target calls it. LLVM has no other way to add
# vectors of floats or of shorts there, nor to count ones.
EXPECTED = {
    "NEON": {
        "look_up_rows": {"fadd", "add", "fmla"}, "count_rows": {"cnt", "and", "fmla"},
        "dots": {"fadd", "and"}, "decode": {"fadd"},
    },
    "AVX2": {
        "look_up_rows": {"vaddps", "vpaddw"}, "count_rows": {"vpshufb", "vpand"},
        "dots": {"vaddps"}, "decode": {"vaddps"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> dict:
    settings = {
        "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("kernels")),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=-1, check=True)
    return json.loads(done.stdout)


@numba_works
@pytest.mark.parametrize("target", EXPECTED)
def test_kernels_compute_on_whole_vectors(instructions, target) -> None:
    found = instructions[target]
    if isinstance(found, str):
        pytest.skip(found)
    for kernel, names in EXPECTED[target].items():
        assert names <= set(found[kernel]), kernel
