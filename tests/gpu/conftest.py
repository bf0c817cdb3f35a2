"""The devices of these tests: CUDA where `make check-gpu` lets them have it, else it is skipped.

On the CPU and on the pretend device the same bodies run in the usual suite, so that a machine
without a GPU sees that they work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from shadow_device import ShadowDevice

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at CUDA's first product


@pytest.fixture
def cuda() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here, or hidden: `make check-gpu` runs this")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn."""
    return request.getfixturevalue("cuda") if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(params=["cpu", "pretend", "cuda"])
def any_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device in turn, and one that takes an accelerator's way through the steps on the CPU."""
    if request.param == "pretend":
        with ShadowDevice("cuda") as device:
            yield device
    elif request.param == "cuda":
        yield request.getfixturevalue("cuda")
    else:
        yield torch.device("cpu")
