"""What all tests share: a cache of compiled kernels, one random state, whether a compiler works."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without --device the scripts take the first GPU, and the tests mean the CPU unless they are those
# of tests/gpu: `make check-gpu` sets ALQ_CHECK_GPU. Set before CUDA starts; passed on to processes.
if "ALQ_CHECK_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Kernels for one set of CPU instructions (ATEN_CPU_CAPABILITY) are wrong for another, and torch's
# own cache does not tell them apart. Set before torch does, which may be when it is imported in
# full, and passed on to processes.
CACHE = f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / CACHE))

import lenet5_on_a_sliver  # noqa: E402
from alq.data import mnist  # noqa: E402
from alq.errors import InputError  # noqa: E402
from alq.extras.compiled import require_compiler  # noqa: E402


def rank(item: pytest.Item) -> int:
    """Return where in a run the test comes, and with it its file where several processes share.

    The tests that fork come first, as torch allows no training in a process forked after compiled
    steps have run; then what compiles, as nothing else takes as long.
    """
    if item.path.stem == "test_crashes":
        return 0
    return 1 if "compiler" in getattr(item, "fixturenames", ()) else 2


class Order:
    """Sorts after plugins that shuffle."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=rank)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Order())


@pytest.fixture(autouse=True)
def settings_of_its_own() -> Iterator[None]:
    """No test depends on those before it: scripts set threads and denormals, and draw numbers."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where torch cannot compile the quantizer's kernels."""
    try:
        require_compiler(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sliver() -> Iterator[None]:
    """lenet5.py reads 300 training and 100 test pictures; from the disk only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "read_mnist", lenet5_on_a_sliver.sliver)
        yield
