"""What makes networks from bits fast leaves their numbers alone: strips, threads, held weights."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import alq
import lenet5
from alq.inference import compute, jobs, prepared, rows
from alq.inference.plan import HELD_SHARE, held_layers
from alq.inference.prepared import keep
from alq.inference.tiles import strips
from alq.method.quantized_inputs import place
from test_inference import PUBLISHED, compute_by, difference, numba_works, packed_layers, quantized

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------- strips and threads


@numba_works
@pytest.mark.parametrize("tables", ["float32", "int16"])
def test_pictures_of_one_thread_know_nothing_of_each_other(tables) -> None:
    """A picture of 128 x 64 x 64 floats is more than the cache, so that it is cut into strips."""
    layer = nn.Conv2d(128, 8, 3, padding=1)
    weight = quantized(layer, 2, structure="pixelwise")
    packed = compute_by(alq.pack_for_inference(layer, [weight], tables), "tables")
    x = torch.randn(5, 128, 64, 64) * torch.tensor([1.0, 1e3, 1e-3, 7, 0]).view(-1, 1, 1, 1)
    y = packed(x)
    for picture in range(len(x)):
        assert torch.equal(y[picture], packed(x[picture]))
        limit = 1e-5 if tables == "float32" else 3e-3
        assert difference(y[picture], layer(x)[picture]) < limit


def quantized_input(layer: nn.Module, x: Tensor, **options: object) -> nn.Module:
    """Return the layer packed, with its input in two binary bases, fitted to x."""
    weight = quantized(layer, 2, **options)
    place({"": layer}, {"": 2})
    layer(x)
    return alq.pack_for_inference(layer.eval(), [weight])


SHAPES = {  # a layer, its structure, how large its inputs are
    "several tiles": (lambda: nn.Conv2d(40, 24, 3, padding=1), "pixelwise", (13, 11)),
    "pictures beside each other": (lambda: nn.Conv2d(40, 24, 3, padding=1), "pixelwise", (3, 2)),
    "phases": (lambda: nn.Conv2d(80, 12, 3, 2, 1, groups=2), "pixelwise", (15, 9)),
    "dilation": (lambda: nn.Conv2d(40, 24, (2, 3), dilation=(3, 2)), "pixelwise", (14, 9)),
    "one row": (lambda: nn.Conv1d(40, 24, 3, padding=1), "pixelwise", (90,)),
    "linear": (lambda: nn.Linear(100, 50), "subchannelwise", ()),
}


@numba_works
@pytest.mark.parametrize("team", ["libgomp's", "our own"])
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_strips_change_no_bit(shape, team, monkeypatch) -> None:
    """Also with fewer pictures than threads, and where a strip has one tile."""
    if team == "our own":
        monkeypatch.setattr(jobs, "team", lambda process: None)
    elif jobs.team(os.getpid()) is None:
        pytest.skip("this PyTorch has no libgomp")
    torch.manual_seed(0)
    make, structure, size = SHAPES[shape]
    layer = make()
    C = layer.weight.shape[1] * getattr(layer, "groups", 1)
    pictures = [torch.randn(batch, C, *size) for batch in (1, 2, 3, 5, 40)]
    options = {"structure": structure} | ({"subc": 2} if structure == "subchannelwise" else {})
    plain, fed = copy.deepcopy(layer), quantized_input(layer, pictures[-1], **options)
    weight = quantized(plain, 2, **options)
    kinds = [(fed, "popcounts"), (alq.pack_for_inference(plain, [weight]), "tables")]
    kinds += [(alq.pack_for_inference(plain, [weight], "int16"), "tables")]
    kinds += [(kinds[1][0], "dots"), (fed, "popcount dots")] if shape == "linear" else []

    def results(threads: int, cache: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        monkeypatch.setattr(prepared, "CACHE", cache)
        prepared.prepared.cache_clear()
        return [compute_by(packed, way)(x) for packed, way in kinds for x in pictures]

    alone = results(1, prepared.CACHE)
    for k, (packed, way) in enumerate(kinds):
        reference = compute_by(packed, "decoded")(pictures[3])
        limit = 3e-3 if packed.tables == "int16" else 1e-5
        assert difference(alone[len(pictures) * k + 3], reference) < limit, way
    for threads, cache in ((1, 1), (2, 2**20), (3, 2**12), (5, 1)):
        for one, other in zip(alone, results(threads, cache), strict=True):
            assert torch.equal(one, other)
    prepared.prepared.cache_clear()


def test_strips_are_all_tiles_and_share_them_out() -> None:
    starts = np.arange(37) * 16
    for most, images, threads in (
        (100, 1, 1),
        (1, 1, 1),
        (10**6, 1, 2),
        (10**6, 3, 2),
        (300, 5, 4),
    ):
        ends = strips(starts, 20, most, images, threads)
        assert ends[0] == 0 and ends[-1] == 37 and (np.diff(ends) > 0).all()
        units = images * (len(ends) - 1)
        assert -(-units // threads) * threads <= 1.07 * units
        if threads == 1 and most > 36:
            assert max(starts[ends[1:] - 1] - starts[ends[:-1]]) + 20 <= most + 16
    assert len(strips(starts[:1], 20, 10**6, 1, 8)) == 2  # where there is nothing to share


@numba_works
def test_weights_are_decoded_the_same_by_several_threads() -> None:
    for structure, layer in (
        ("pixelwise", nn.Conv2d(64, 70, 3)),
        ("kernelwise", nn.Conv2d(9, 7, 5)),
    ):
        weight = quantized(layer, 3, structure=structure)
        packed = alq.pack_for_inference(layer, [weight])
        torch.set_num_threads(1)
        alone = packed.weight
        torch.testing.assert_close(alone, weight.w_hat())
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode(threads == 2):
                assert torch.equal(packed.weight, alone)
            part = compute.decoded(packed.rows, packed.grouping, 2, 7)
            assert torch.equal(part, alone[2:7])
            assert part.is_contiguous(memory_format=torch.channels_last)


def test_blocks_to_decode_are_all_outputs(monkeypatch) -> None:
    layer = nn.Conv2d(64, 300, 3)
    packed = alq.pack_for_inference(layer, [quantized(layer, 2)])
    x = torch.randn(2, 64, 5, 5)
    for block, sizes in ((2**30, [300]), (2**16, [128, 128, 44]), (1, [64, 64, 64, 64, 44])):
        monkeypatch.setattr(rows, "BLOCK", block)
        monkeypatch.setattr(compute, "kernels_work", lambda: True)
        found = list(compute.blocks_to_decode(packed.rows, packed.grouping))
        assert [stop - start for start, stop in found] == sizes
        assert found[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(found))
        monkeypatch.undo()
        monkeypatch.setattr(rows, "BLOCK", block)
        assert difference(compute_by(packed, "decoded")(x), layer(x)) < 1e-5
        monkeypatch.undo()


@numba_works
@pytest.mark.parametrize("team", ["libgomp's", "our own"])
def test_several_threads_of_python_may_call_at_once(team, monkeypatch) -> None:
    if team == "our own":
        monkeypatch.setattr(jobs, "team", lambda process: None)
    elif jobs.team(os.getpid()) is None:
        pytest.skip("this PyTorch has no libgomp")
    torch.set_num_threads(2)
    layer = nn.Conv2d(40, 24, 3, padding=1)
    packed = compute_by(alq.pack_for_inference(layer, [quantized(layer, 2)]), "tables")
    inputs = [torch.randn(2, 40, 12, 12) for _ in range(12)]

    def call(x):
        with torch.no_grad():
            return packed(x)

    with ThreadPoolExecutor(3) as python:
        for x, y in zip(inputs, python.map(call, inputs), strict=True):
            assert difference(y, layer(x)) < 1e-5


FORKED = """
import multiprocessing, os
import torch

def child():
    from alq.inference import jobs
    os._exit(0 if jobs.team(os.getpid()) is None else 1)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(100)
assert process.exitcode == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_that_imports_it_first_takes_no_team() -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], cwd=ROOT, check=True, timeout=120
    )


class Interrupted:
    """A pool whose workers have not begun when the caller is interrupted."""

    def __init__(self) -> None:
        self.left: list[tuple] = []

    def submit(self, function, *arguments) -> None:
        self.left.append(arguments)
        raise KeyboardInterrupt


@numba_works
def test_what_an_interrupted_call_left_to_others_keeps_its_memory(monkeypatch) -> None:
    pool = Interrupted()
    monkeypatch.setattr(jobs, "team", lambda process: None)
    monkeypatch.setattr(jobs, "pool", lambda process, workers: pool)
    torch.set_num_threads(2)
    layer = nn.Conv2d(40, 24, 3)
    packed = compute_by(alq.pack_for_inference(layer, [quantized(layer, 2)]), "tables")
    with pytest.raises(KeyboardInterrupt):
        packed(torch.randn(2, 40, 12, 12))
    [[_, job]] = pool.left
    _, memory, y, x, rows, bias, _ = job.owners
    tensors = [memory, y, x, bias, *vars(rows).values()]
    kept = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
    for field in ("signs", "alpha", "outputs", "first", "bias", "x", "y", "counters", "memory"):
        assert any(begin <= getattr(job, field) < end for begin, end in kept), field
    assert not hasattr(compute.LAST, "memory")  # which the next call would take


@numba_works
def test_a_call_works_where_the_one_before_did(monkeypatch) -> None:
    addresses, run = [], compute.run
    monkeypatch.setattr(
        compute, "run", lambda kernel, job: (addresses.append(job.memory), run(kernel, job))
    )
    torch.set_num_threads(2)
    large, small = (nn.Conv2d(40, 24, 3), nn.Conv2d(24, 8, 3))
    convs = [
        compute_by(alq.pack_for_inference(m, [quantized(m, 2)]), "tables") for m in (large, small)
    ]
    x = torch.randn(2, 40, 12, 12)
    convs[0](x)
    addresses.clear()
    y = convs[1](convs[0](x))
    assert len(set(addresses)) == 1 and difference(y, small(large(x))) < 1e-5


@numba_works
def test_a_call_has_the_threads_that_its_memory_is_for(monkeypatch) -> None:
    workers, pool, prepare = set(), jobs.pool, compute.prepared

    def plan(*arguments):
        found = prepare(*arguments)
        torch.set_num_threads(4)  # as another thread might
        return found

    monkeypatch.setattr(compute, "prepared", plan)
    monkeypatch.setattr(jobs, "team", lambda process: None)
    monkeypatch.setattr(jobs, "pool", lambda process, n: workers.add(n) or pool(process, n))
    torch.set_num_threads(2)
    layer, x = nn.Conv2d(40, 24, 3), torch.randn(2, 40, 12, 12)
    packed = compute_by(alq.pack_for_inference(layer, [quantized(layer, 2)]), "tables")
    assert difference(packed(x), layer(x)) < 1e-5
    assert workers == {1}


def test_arrays_are_int64_where_numpy_makes_others() -> None:
    kept: list[np.ndarray] = []
    assert keep(kept, np.arange(6, dtype=np.int32)[::2]) == kept[0].ctypes.data
    assert kept[0].dtype == np.int64 and kept[0].flags.c_contiguous
    assert kept[0].tolist() == [0, 2, 4]


@numba_works
def test_compiled_functions_are_kept_under_the_sources_of_all(tmp_path) -> None:
    from alq.inference import dots, kernels, vectors

    folder = Path(vectors.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert vectors.digest(tmp_path) == vectors.SOURCES
    (tmp_path / "outputs.py").write_text((folder / "outputs.py").read_text() + "\n")
    assert vectors.digest(tmp_path) != vectors.SOURCES
    assert kernels.compute.__qualname__.endswith(vectors.SOURCES)
    layer = nn.Linear(40, 3)
    compute_by(alq.pack_for_inference(layer, [quantized(layer, 2)]), "decoded")(torch.randn(2, 40))
    kept = dots.decode.stats.cache_path
    assert kept is None or list(Path(kept).glob(f"*decode_{vectors.SOURCES}*.nbi"))


# ---------------------------------------------------------------------------- int16


@numba_works
@pytest.mark.parametrize("structure", ["pixelwise", "channelwise"])
def test_int16_takes_inputs_whose_sum_is_too_large(structure) -> None:
    """64 of them add up to more than float32 has."""
    layer, largest = nn.Conv2d(128, 4, 3, bias=False), torch.finfo(torch.float32).max
    layer.weight.mul_(1e-3)
    weights = alq.quantize(layer, max_bit=2, structure=structure)
    packed = compute_by(alq.pack_for_inference(layer, weights, "int16"), "tables")
    x = largest * (2 * torch.rand(2, 128, 8, 8) - 1)
    assert difference(packed(x), layer(x)) < 3e-3


@numba_works
@pytest.mark.parametrize("structure", ["pixelwise", "channelwise"])
def test_int16_sums_do_not_overflow_where_all_inputs_are_as_large(structure) -> None:
    """All signs are +, so that 64 times the largest input adds up in a word."""
    layer = nn.Conv2d(128, 4, 3, padding=1, bias=False)
    layer.weight.fill_(0.5)
    weights = alq.quantize(layer, max_bit=1, structure=structure)
    packed = compute_by(alq.pack_for_inference(layer, weights, "int16"), "tables")
    for x in (torch.ones(1, 128, 8, 8), -3 * torch.ones(1, 128, 8, 8)):
        assert difference(packed(x), layer(x)) < 1e-3


@numba_works
def test_int16_is_finer_where_inputs_do_not_all_add_up() -> None:
    """Of the largest value alone, 511 steps would err by a third of a percent here."""
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 64), torch.randn(64, 512).relu()
    weights = [quantized(layer, 2)]
    packed = compute_by(alq.pack_for_inference(layer, weights, "int16"), "tables")
    y = layer(x)
    assert (packed(x) - y).norm() / y.norm() < 1e-3


# ---------------------------------------------------------------------------- held weights


def test_the_smallest_layers_are_held_up_to_a_share_of_the_network() -> None:
    assert held_layers({"a": 10, "b": 990}) == ["a"]
    assert held_layers({"a": 100, "b": 900}) == []
    assert held_layers({"large": 2**15, "largest": 2**30}) == []
    model = lenet5.LeNet5().eval()
    weights = alq.load_packed(PUBLISHED, model)
    packed = alq.pack_for_inference(model, weights)
    held = {layer.name: layer.dense for layer in packed_layers(packed) if layer.dense is not None}
    assert set(held) == {"conv1.weight", "fc2.weight"}
    for weight in weights:
        if weight.name in held:
            assert torch.equal(held[weight.name], weight.w_hat())
    floats = sum(value.nbytes for value in held.values())
    assert floats <= HELD_SHARE * sum(4 * weight.grouping.numel for weight in weights)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 300), nn.Linear(300, 3))
    return alq.pack_for_inference(model, alq.quantize(model, max_bit=2))


def test_a_loaded_state_brings_its_held_weights(monkeypatch) -> None:
    one, other, x = network(0), network(1), torch.randn(6, 40)
    assert one[3].dense is not None and not any("dense" in key for key in one.state_dict())
    other = copy.deepcopy(other)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other[3].dense, one[3].dense)
    monkeypatch.setattr(compute, "kernels_work", lambda: False)
    assert difference(other(x), one(x)) < 1e-6


@pytest.mark.parametrize("way", [None, "held"])
def test_held_weights_follow_what_they_are_of(way, monkeypatch) -> None:
    monkeypatch.setattr(compute, "kernels_work", lambda: False)
    layer, x = network(0)[3], torch.randn(2, 300)
    layer.way, y = way, layer(x)
    alpha, bias = layer.alpha.clone(), layer.bias
    layer.alpha.mul_(2)
    assert difference(layer(x) - bias, 2 * (y - bias)) < 1e-5
    other = torch.func.functional_call(layer, {"alpha": 3 * alpha}, (x,))
    assert difference(other - bias, 3 * (y - bias)) < 1e-5
    layer.alpha.copy_(alpha)
    layer.signs.bitwise_not_()
    assert difference(layer(x) - bias, bias - y) < 1e-5
    layer.signs.bitwise_not_()
    assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(layer)(x), y)
