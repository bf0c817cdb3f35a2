"""Packed networks as they are used: odd inputs, other types, threads, copies, files of others."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import alq
import lenet5
from alq.errors import InputError
from alq.files import packed as packed_files
from alq.files.checkpoint import save_checkpoint
from alq.inference import compute
from alq.inference.plan import OF_LINEAR
from test_inference import (
    FEW,
    PEAK,
    PUBLISHED,
    ROOT,
    compute_by,
    difference,
    numba_works,
    packed_layers,
)
from test_inference_popcounts import fed

ALL_WAYS = ["tables", "decoded", "popcounts"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(40, 24, 3), nn.Flatten(), nn.Linear(24 * 36, 50), nn.ReLU(), nn.Linear(50, 5),
    ).eval()  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def packed(model) -> nn.Module:
    return alq.pack_for_inference(model, alq.quantize(model, max_bit=2))


def pictures(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8)


# ---------------------------------------------------------------------------- inputs


def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """Return values like x, of any layout that PyTorch has for them."""
    kind = draw(st.sampled_from(["contiguous", "last", "turned", "every second", "expanded"]))
    if kind == "last":
        return x.to(memory_format=torch.channels_last)
    if kind == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "every second":
        return torch.stack([x, 0 * x], -1).flatten(3)[..., ::2]
    return x[:1].expand_as(x) if kind == "expanded" and len(x) else x


@numba_works
@pytest.mark.filterwarnings("ignore:.*groups of")
@pytest.mark.parametrize("way", ALL_WAYS)
@FEW
@given(data=st.data())
def test_any_layout_and_batch_of_any_convolution(way: str, data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2]))
    C, O = groups * draw(st.integers(33, 70)), groups * draw(st.integers(1, 9))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    # More, where no input meets the kernel, crashes PyTorch's own channels_last convolution.
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    layer = nn.Conv2d(C, O, kernel, stride, padding, dilation, groups)
    fits = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [fit + draw(st.integers(0, 9)) for fit in fits]
    x = torch.randn(4, C, *size)
    packed = compute_by(fed(layer, x, 2, structure="pixelwise"), way)
    x = laid_out(draw, x[: draw(st.integers(0, 4))])
    assert difference(packed(x), layer(x)) < 1e-5


@numba_works
@pytest.mark.parametrize("way", [*ALL_WAYS, "dots", "popcount dots"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (2, 1, 3), (1, 2, 1, 3)])
def test_a_linear_layer_takes_any_leading_shape(way, shape) -> None:
    layer, fitted = nn.Linear(90, 30), torch.randn(40, 90)
    packed = compute_by(fed(layer, fitted, 2), way)
    x = torch.randn(*shape, 90)
    assert difference(packed(x), layer(x)) < 1e-5
    if len(shape) > 1:
        x = torch.randn(*reversed(shape), 90).permute(*reversed(range(len(shape))), -1)
        assert difference(packed(x), layer(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_compute_as_they_can(model, packed, dtype) -> None:
    x, y = pictures(), None
    y = model(x)
    converted = copy.deepcopy(packed).to(dtype)
    bound = max(1e-5, 20 * torch.finfo(dtype).eps)
    assert converted(x.to(dtype)).dtype == dtype
    assert difference(converted(x.to(dtype)).float(), y) < bound
    assert difference(converted.float()(x), y) < bound
    assert converted(x[:0]).shape == (0, 5)
    if dtype != torch.float64:
        with pytest.raises(InputError, match=r"0.weight: its input is \w*float\w*, and the layer"):
            packed(x.to(dtype))


def test_autocast_is_refused_where_it_converts(packed) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"8.weight: its input is bfloat16, and the layer float32"),
    ):
        packed[8](torch.zeros(2, 50, dtype=torch.bfloat16))


@pytest.mark.parametrize("what", [1, 2, 4, 5])
def test_what_is_no_batch_of_pictures_is_refused(packed, what) -> None:
    with pytest.raises(InputError, match=r"0.weight: (takes|holds a batch norm and takes)"):
        packed(torch.zeros((3,) * what if what != 4 else (2, 4, 8, 8)))


def test_an_input_on_another_device_is_refused(packed) -> None:
    x = pictures()
    with pytest.raises(InputError, match=r"0.weight: its input is on meta, and the layer on cpu"):
        packed(x.to("meta"))
    with pytest.raises(InputError, match=r"0.weight: its input is on cpu, and the layer on meta"):
        packed.to("meta")(x)


# ---------------------------------------------------------------------------- ways


@pytest.mark.parametrize("way", ["dot", "Tables", "", *OF_LINEAR])
def test_a_way_that_a_convolution_has_not_is_refused(packed, way) -> None:
    packed[0].way = way
    with pytest.raises(InputError, match=rf"0.weight: has no way '{way}'; its ways are"):
        packed(pictures())


@pytest.mark.parametrize("reason", [OSError("disk full"), ImportError("numba needs another numpy")])
def test_kernels_that_cannot_be_compiled_are_told_of(monkeypatch, reason) -> None:
    def fail() -> None:
        raise reason

    monkeypatch.setattr(compute, "kernel", fail)
    monkeypatch.setattr(compute, "find_spec", lambda name: name)
    with pytest.warns(UserWarning, match=f"numba is installed, but does not work here.*{reason}"):
        assert not compute.kernels_work.__wrapped__()


# ---------------------------------------------------------------------------- the state


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("way", ["tables", "decoded"])
def test_tensors_of_other_types_or_layouts_are_refused(packed, way) -> None:
    """The kernels read them by their addresses."""
    layer, x = packed[8], torch.randn(2, 50)
    layer.way, state = way, layer.state_dict()
    spread = {key: torch.stack([value, value], -1)[..., 0] for key, value in state.items()}
    layer.load_state_dict(spread, assign=True)
    for compute_it in (lambda: layer(x), lambda: layer.weight):
        with pytest.raises(InputError, match=r"8.weight: `signs` is torch.uint8 .* False; it must"):
            compute_it()
    layer.load_state_dict(state, assign=True)
    y = layer(x)
    layer.type(torch.float32)
    for compute_it in (lambda: layer(x), lambda: layer.weight):
        with pytest.raises(InputError, match=r"`signs` is torch.float32 .* must be torch.uint8"):
            compute_it()
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), y)


def test_after_a_refused_train_nothing_is_computed_until_eval(packed) -> None:
    x = pictures()
    y = packed(x)
    with pytest.raises(InputError, match="cannot be trained"):
        packed.train()
    with pytest.raises(InputError, match=r"0.weight: train\(\) was called, and refused; call eval"):
        packed(x)
    assert torch.equal(packed.eval()(x), y)
    assert not any(module.training for module in packed.modules())


def test_a_whole_network_is_pickled_and_copied(packed) -> None:
    x, buffer = pictures(), io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    for other in (read, copy.deepcopy(packed), copy.copy(packed)):
        assert torch.equal(other(x), packed(x))
    packed[0].alpha.zero_()
    assert not torch.equal(read(x), packed(x))


def test_a_state_of_floats_is_refused(model, packed) -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.signs"):
        packed.load_state_dict(model.state_dict())


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_may_call_one_network(packed, threads) -> None:
    x, found = pictures(), {}
    torch.set_num_threads(threads)
    y = packed(x)

    def work(k: int) -> None:
        with torch.no_grad():
            found[k] = [packed(x[k : k + 2]) for _ in range(5)]

    callers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for k, results in found.items():
        assert max(difference(result, y[k : k + 2]) for result in results) < 1e-5
    assert len(found) == 4


FORK = """
import os, signal, sys
import torch, alq
from torch import nn
torch.set_num_threads(2)
torch.set_grad_enabled(False)
conv, line = nn.Conv2d(3, 40, 3), nn.Linear(90, 30)
kernels = [
    (alq.pack_for_inference(conv, alq.quantize(conv)), torch.randn(1, 3, 9, 9), "tables"),
    (alq.pack_for_inference(line, alq.quantize(line)), torch.randn(1, 90), "dots"),
]
def computed():
    y = []
    for layer, x, layer.way in kernels:
        y.append(layer(x))
    return y
before = computed()
child = os.fork()
if not child:
    signal.alarm(60)  # a child that waits for threads it has not is killed
    same = all(map(torch.equal, computed(), before))
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@numba_works
@pytest.mark.skipif(sys.platform == "win32", reason="nothing forks there")
def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], cwd=ROOT, check=False)
    assert done.returncode == 0


# ---------------------------------------------------------------------------- files


def test_eval_packed_reads_its_file_once(monkeypatch, sliver) -> None:
    read = []

    def note(path: Path) -> bytes:
        read.append(path)
        return Path(path).read_bytes()

    monkeypatch.setattr(packed_files, "read_whole", note)
    flags = ["--EVAL", str(PUBLISHED), "--data", str(ROOT / "data")]
    for more in ([], ["--packed"]):
        read.clear()
        lenet5.main([*flags, *more])
        assert read == [PUBLISHED]


def test_bits_of_a_file_are_those_of_the_network_in_memory() -> None:
    model = lenet5.LeNet5()
    made = alq.pack_for_inference(model, alq.load_packed(PUBLISHED, model))
    read = alq.load_for_inference(PUBLISHED, lenet5.RECIPE.shapes())
    for ours, theirs in zip(packed_layers(made), packed_layers(read), strict=True):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])


def test_a_file_of_another_kind_names_what_it_is_and_what_to_give(tmp_path) -> None:
    empty = lenet5.RECIPE.shapes()
    save_checkpoint(tmp_path / "net.pth", {"net": "lenet5", "model": {}})
    (tmp_path / "net.jsonl").write_text("{}\n")
    other = nn.Sequential(nn.Linear(40, 4))
    alq.save_packed(tmp_path / "other.alq", other, alq.quantize(other))
    for file, message in (
        ("net.pth", "is not an ALQ packed file, but a checkpoint or a resume point; --POSTTRAIN"),
        ("net.jsonl", "is not an ALQ packed file; --POSTTRAIN writes one, ending .alq"),
        ("other.alq", r"holds another network: .*; give the file that was saved of this one"),
        ("absent.alq", "cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=f"{file}:? {message}"):
            alq.load_for_inference(tmp_path / file, empty)
        with pytest.raises(InputError, match=f"{file}:? {message}"):
            alq.load_packed(tmp_path / file, lenet5.LeNet5())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in bytes elsewhere")
def test_the_measure_of_memory_sees_float32_weights_where_they_are_made(tmp_path) -> None:
    """The other way to load, measured as `test_the_float32_weights_are_never_in_memory` does."""
    from vgg import VGG

    model = VGG((32, 64, 256), 2048)
    weights = alq.quantize(model, max_bit=1)
    alq.save_packed(tmp_path / "net.alq", model, weights)
    loads = PEAK.replace("load_for_inference(sys.argv[1], model)", "load_packed(sys.argv[1], full)")
    assert loads != PEAK
    loads = loads.replace("before = peak()", "before = peak(); full = VGG((32, 64, 256), 2048)")
    command = [sys.executable, "-c", loads, str(tmp_path / "net.alq")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > sum(4 * weight.grouping.numel for weight in weights)


def test_convolutions_of_one_channel_of_pictures_of_one_row() -> None:
    """PyTorch's own are wrong for some strides of the weights, which mean the same."""
    layer = nn.Conv2d(1, 33, 3, stride=(1, 3), padding=(0, 1))
    weights = alq.quantize(layer, max_bit=2)
    packed = alq.pack_for_inference(layer, weights)
    x = torch.randn(40, 1, 4, 1)
    windows = F.unfold(F.pad(x, (1, 1)), 3, stride=(1, 3))
    expected = layer.weight.flatten(1) @ windows + layer.bias[:, None]
    for way in ("decoded", "tables"):
        packed.way = way
        found = packed(x).flatten(2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_types_leave_the_kernels_alone() -> None:
    code = """
import sys, torch, alq
from torch import nn
layer = nn.Conv2d(3, 4, 3)
packed = alq.pack_for_inference(layer, alq.quantize(layer, max_bit=2)).double()
with torch.no_grad():
    packed(torch.randn(1, 3, 5, 5).double())
assert "alq.inference.vectors" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("act_bit", [0, 2])
def test_layers_of_a_transformer_encoder_compute_from_bits(act_bit: int) -> None:
    """In eval mode torch would take their weights itself, past the activations."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    if act_bit:
        alq.quantize_activations(model, act_bit)
    weights, x = alq.quantize(model, max_bit=2), torch.randn(8, 10, 64)
    packed, calls = None, []
    with torch.no_grad():
        model(x)
        expected = model.eval()(x)
        packed = alq.pack_for_inference(model, weights)
        for layer in packed_layers(packed):
            layer.register_forward_hook(lambda *_: calls.append(1))
        found = packed(x)
    assert calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["", "0"])
def test_a_forward_that_stands_on_a_module_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    module, weights = model.get_submodule(name), alq.quantize(model)
    old = module.forward
    module.forward = lambda x: 3 * old(x)
    with pytest.raises(InputError, match=rf"{name or 'the network'}: its forward was replaced"):
        alq.pack_for_inference(model, weights)


def test_a_network_of_which_a_weight_is_computed_is_copied(tmp_path) -> None:
    """`torch.nn.utils.prune` leaves the product of weight and mask on the module."""

    def pruned() -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        prune.random_unstructured(network[0], "weight", 0.5)
        return network

    model, x = pruned(), torch.randn(4, 64)
    weights = alq.quantize(model)
    expected = model(x)  # with a graph
    alq.save_packed(tmp_path / "net.alq", model, weights)
    for packed in (
        alq.pack_for_inference(model, weights),
        alq.load_for_inference(tmp_path / "net.alq", pruned()),
    ):
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_the_network_that_is_compiled_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    weights = alq.quantize(model)
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(InputError):  # 0.weight has another name now
        alq.pack_for_inference(model, weights)
    model = nn.Sequential(nn.Linear(64, 8), torch.compile(nn.ReLU(), backend="eager"))
    with pytest.raises(InputError, match="1: is compiled on its own"):
        alq.pack_for_inference(model, alq.quantize(model))


@pytest.mark.parametrize("act_bit", [0, 2])
def test_a_packed_layer_takes_its_input_by_keyword(act_bit: int) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(input=self.first(input=x).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, x = Named(), torch.randn(4, 3, 8, 8)
    if act_bit:
        alq.quantize_activations(model, act_bit)
    weights = alq.quantize(model)
    with torch.no_grad():
        model(x)
        expected = model.eval()(x)
        found = alq.pack_for_inference(model, weights)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
