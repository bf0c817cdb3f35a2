"""Networks that compute from bits: the same numbers as the network that they were made of."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import alq
import lenet5
from alq.data import mnist
from alq.errors import InputError
from alq.inference import compute, layers, rows
from alq.inference.plan import choose
from alq.method.weight import MultiBitWeight, prune
from vgg import VGG

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "checkpoints" / "published" / "lenet5.alq"
numba_works = pytest.mark.skipif(not compute.kernels_work(), reason="numba is not installed")
WAYS = [pytest.param("tables", marks=numba_works), "decoded"]
FEW = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=[pytest.param("numba", marks=numba_works), "torch"])
def decoder(request, monkeypatch) -> str:
    """With numba's kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(compute, "kernels_work", lambda: False)
    return request.param


def packed_layers(model: nn.Module) -> list[layers.PackedLayer]:
    return [module for module in model.modules() if isinstance(module, layers.PackedLayer)]


def compute_by(model: nn.Module, way: str | None) -> nn.Module:
    for layer in packed_layers(model):
        layer.way = way
    return model


def difference(y: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    assert y.shape == reference.shape and y.dtype == reference.dtype
    if not reference.numel():
        return 0.0
    return float((y - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def quantized(layer: nn.Module, max_bit: int, seed: int = 0, **options: object) -> MultiBitWeight:
    """Quantize the layer; prune a third of its coordinates, and all of its first group."""
    (weight,) = alq.quantize(layer, max_bit=max_bit, **options)
    dead = torch.rand(weight.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    dead[0] = True
    prune([weight], [dead & weight.mask])
    return weight


def random_norm(norm: nn.Module) -> None:
    """Give a batch norm statistics, and scales of both signs."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.normal_()
    norm.bias.normal_()


# ---------------------------------------------------------------------------- layers


@pytest.mark.filterwarnings("ignore:.*groups of")
@pytest.mark.parametrize("way", WAYS)
@FEW
@given(data=st.data())
def test_a_convolution_gives_what_it_gave(way: str, data: st.DataObject) -> None:
    draw = data.draw
    axes, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    C, O = groups * draw(st.integers(1, 40)), groups * draw(st.integers(1, 20))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * axes))
    stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * axes)) for _ in range(2))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular"]))
    padding = draw(st.tuples(*[st.integers(0, 2)] * axes))
    if all(s == 1 for s in stride) and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    options = {"padding_mode": mode, "bias": draw(st.booleans()), "groups": groups}
    layer = kind(C, O, kernel, stride, padding, dilation, **options)
    names = ("channelwise", "kernelwise", "pixelwise", "subchannelwise")
    structure = draw(st.sampled_from(names))
    weight = quantized(layer, draw(st.integers(1, 8)), structure=structure)
    fits = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [f + draw(st.integers(8, 20)) for f in fits]
    x = torch.randn(draw(st.integers(1, 5)), C, *size)
    if draw(st.booleans()):  # no contiguous input
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    packed = compute_by(alq.pack_for_inference(layer, [weight]), way)
    assert difference(packed(x), layer(x)) < 1e-5
    assert difference(packed(x[0]), layer(x[0])) < 1e-5


@pytest.mark.filterwarnings("ignore:.*groups of")
@pytest.mark.parametrize("way", [*WAYS, pytest.param("dots", marks=numba_works)])
@FEW
@given(
    n=st.integers(1, 150), pieces=st.integers(1, 4), O=st.integers(2, 90), bits=st.integers(1, 8),
    shape=st.lists(st.integers(1, 7), max_size=3), bias=st.booleans(),
)  # fmt: skip
def test_a_linear_layer_gives_what_it_gave(way, n, pieces, O, bits, shape, bias) -> None:
    layer = nn.Linear(n * pieces, O, bias)
    weight = quantized(layer, bits, structure="subchannelwise", subc=pieces)
    packed = compute_by(alq.pack_for_inference(layer, [weight]), way)
    x = torch.randn(*shape, n * pieces)
    assert difference(packed(x), layer(x)) < 1e-5


def test_the_weights_come_back_bit_for_bit(decoder) -> None:
    layer = nn.Conv2d(40, 12, 3)
    for structure in ("channelwise", "kernelwise", "pixelwise", "subchannelwise"):
        model = copy.deepcopy(layer)
        weight = quantized(model, 5, structure=structure)
        packed = alq.pack_for_inference(model, [weight])
        assert torch.equal(packed.weight, weight.w_hat())
        x = torch.randn(3, 40, 9, 9)
        assert difference(compute_by(packed, "decoded")(x), model(x)) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_with_nothing_left_gives_its_bias(way) -> None:
    for layer, x in (
        (nn.Linear(70, 5), torch.randn(20, 70)),
        (nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6)),
    ):
        (weight,) = alq.quantize(layer)
        prune([weight], [weight.mask])
        packed = compute_by(alq.pack_for_inference(layer, [weight]), way)
        assert torch.equal(packed(x), layer(x))


def test_empty_batches() -> None:
    for layer, x in (
        (nn.Linear(70, 5), torch.randn(0, 70)),
        (nn.Linear(70, 5), torch.randn(2, 0, 70)),
        (nn.Conv2d(3, 5, 3), torch.randn(0, 3, 6, 6)),
    ):
        packed = alq.pack_for_inference(layer, alq.quantize(layer))
        assert packed(x).shape == layer(x).shape


@numba_works
def test_int16_tables_are_near_and_take_each_picture_by_itself() -> None:
    for layer, x in (
        (nn.Conv2d(64, 32, 3, 2, 1), torch.randn(3, 64, 9, 9).relu()),
        (nn.Conv1d(20, 30, 5), torch.randn(40, 20, 9)),
        (nn.Linear(300, 50), torch.randn(40, 300)),
    ):
        weight = quantized(layer, 2)
        packed = compute_by(alq.pack_for_inference(layer, [weight], tables="int16"), "tables")
        x[1] *= 1e4  # of which the other pictures know nothing
        y, reference = packed(x), layer(x)
        for picture in range(len(x)):
            assert difference(y[picture], reference[picture]) < 1e-2
        assert difference(packed(0 * x), layer(0 * x)) < 1e-5


# ---------------------------------------------------------------------------- refusals, the state


def test_what_is_refused_is_named() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))
    packed = alq.pack_for_inference(model, alq.quantize(model))
    x = torch.randn(2, 40)
    with pytest.raises(InputError, match=r"0.weight: its input is float64, and the layer float32"):
        packed(x.double())
    with pytest.raises(InputError, match=r"0.weight: takes \(..., 40\)"):
        packed(x[:, 1:])
    with pytest.raises(InputError, match=r"0.weight: is packed for inference and cannot be train"):
        packed.train()
    with torch.enable_grad(), pytest.raises(InputError, match=r"gives no gradients"):
        packed(x.requires_grad_())
    with pytest.raises(InputError, match=r"tables: 'int8' is none; choose from float32, int16"):
        alq.pack_for_inference(model, [], tables="int8")
    model[0].weight.zero_()
    with pytest.raises(InputError, match=r"0.weight: the parameter does not hold w_hat"):
        alq.pack_for_inference(model, alq.quantize(nn.Linear(40, 8)) and [quantized_first(model)])


def quantized_first(model: nn.Module) -> MultiBitWeight:
    weights = alq.quantize(model)
    model[0].weight.fill_(1.5)
    return weights[0]


def test_in_float64_it_is_right() -> None:
    layer = nn.Conv2d(3, 8, 3).double()
    weight = quantized(layer, 3)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert difference(alq.pack_for_inference(layer, [weight])(x), layer(x)) < 1e-13


def test_copies_and_saved_states_compute_the_same() -> None:
    model = VGG((8, 16, 24), 32).eval()
    packed = alq.pack_for_inference(model, alq.quantize(model, max_bit=2))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = copy.deepcopy(packed)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), packed(x))
    held = sum(v.nbytes for layer in packed_layers(packed) for v in layer.buffers())
    assert held < sum(p.nbytes for p in model.parameters()) / 4


# ---------------------------------------------------------------------------- networks


class Branches(nn.Module):
    """One norm that can be folded, and all kinds that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.used_twice, self.after_both = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.seen_elsewhere, self.beside = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.unknown = nn.BatchNorm2d(8, track_running_stats=False)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.affine = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.after_both(self.used_twice(self.used_twice(x)))
        y = self.seen_elsewhere(x)
        x = self.unknown(self.last(self.beside(y) + y)).relu()
        return self.affine(self.head(x.mean((2, 3))))


def test_norms_are_folded_where_that_is_exact() -> None:
    model = Branches().eval()
    for norm in (model.norm, model.after_both, model.beside):
        random_norm(norm)
    model.affine.running_mean.normal_()
    packed = alq.pack_for_inference(model, alq.quantize(model, max_bit=3))
    folded = {name for name, m in packed.named_modules() if isinstance(m, nn.Identity)}
    assert folded == {"norm", "affine"}
    x = torch.randn(4, 3, 12, 12)
    assert difference(packed(x), model(x)) < 1e-5
    with pytest.raises(InputError, match=r"head.weight: holds a batch norm and takes batches"):
        packed.head(torch.randn(2, 3, 8))


class TwoNames(nn.Module):
    """Its norm has two names, of which a trace shows one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.block = nn.Sequential(nn.Linear(6, 8), self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ReadElsewhere(nn.Module):
    """Its layer's weight, or bias, is used a second time, without the norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.norm, self.kind = nn.Linear(6, 6), nn.BatchNorm1d(6), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x)).relu()
        return F.linear(y, self.layer.weight.t()) if self.kind == "weight" else y + self.layer.bias


@pytest.mark.parametrize("reads", ["by two names", "weight", "bias"])
def test_a_norm_is_applied_once_and_to_nothing_else(reads) -> None:
    model = (TwoNames() if reads == "by two names" else ReadElsewhere(reads)).eval()
    random_norm(model.norm)
    packed = alq.pack_for_inference(model, alq.quantize(model, max_bit=3))
    x = torch.randn(5, 6)
    assert difference(packed(x), model(x)) < 1e-5


@numba_works
def test_the_callers_default_type_does_not_matter() -> None:
    layer, x = nn.Conv2d(8, 8, 3, bias=False), torch.randn(1, 8, 9, 9)
    packed = compute_by(alq.pack_for_inference(layer, alq.quantize(layer, max_bit=2)), "tables")
    torch.set_default_dtype(torch.float64)
    try:
        y = packed(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(y, layer(x)) < 1e-5


def test_int16_tables_do_not_hide_what_is_not_a_number() -> None:
    layer, x = nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9)
    packed = alq.pack_for_inference(layer, alq.quantize(layer, max_bit=2), "int16")
    x[1, 3, 4, 4] = torch.nan
    finite = compute_by(packed, "tables" if compute.kernels_work() else "decoded")(x).isfinite()
    assert finite[0].all() and not finite[1].all()


def test_a_network_that_cannot_be_traced_keeps_its_norms() -> None:
    class Chooses(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else self[0](x)

    class TwoArguments(nn.Sequential):
        def forward(self, x: Tensor, plain: Tensor | None = None) -> Tensor:
            return super().forward(x) if plain is None else self[0](x)

    for kind in (Chooses, TwoArguments):
        model = kind(nn.Linear(40, 8), nn.BatchNorm1d(8)).eval()
        random_norm(model[1])
        packed = alq.pack_for_inference(model, alq.quantize(model))
        for x in (torch.ones(3, 40), -torch.ones(3, 40)):
            assert difference(packed(x), model(x)) < 1e-5


class Tied(nn.Module):
    """An embedding whose weight is the last layer's, attention, and a layer with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(50, 32), nn.MultiheadAttention(32, 4)
        self.hooked, self.plain = nn.Linear(32, 32), nn.Linear(32, 32)
        self.same, self.last = self.plain, nn.Linear(32, 50, bias=False)
        self.last.weight = self.embedding.weight
        self.hooked.register_forward_hook(double_it)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.attention(x, x, x)[0]
        return self.last(self.same(F.relu(self.plain(self.hooked(x)))))


def double_it(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return 2 * output


def test_layers_that_cannot_be_packed_keep_their_weights(tmp_path) -> None:
    model = Tied().eval()
    weights = alq.quantize(model, max_bit=3)
    alq.save_packed(tmp_path / "net.alq", model, weights)
    x = torch.randint(0, 50, (7, 2))
    made = alq.pack_for_inference(model, weights)
    read = alq.load_for_inference(tmp_path / "net.alq", Tied())
    for packed in (made, read):
        assert difference(packed(x), model(x)) < 1e-5
        assert [layer.name for layer in packed_layers(packed)] == ["plain.weight"]
        assert packed.same is packed.plain and packed.last.weight is packed.embedding.weight


def test_activations_in_binary_bases_stay(tmp_path) -> None:
    """The layer before them stays in float32, so that no rounding decides on a level."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 70), nn.ReLU(), nn.Linear(70, 6), nn.ReLU())

    model, x = network(), torch.randn(64, 8)
    weights = alq.quantize(model, max_bit=2, skip=["0.weight"])
    alq.quantize_activations(model, 2, skip=["0.weight"], first="0.weight")
    model(x)  # the levels fit themselves
    y = model.eval()(x)
    alq.save_packed(tmp_path / "net.alq", model, weights)
    with torch.device("meta"):
        without_memory = network()
        with_activations = network()
        alq.quantize_activations(with_activations, 2, skip=["0.weight"], first="0.weight")
    for packed in (
        alq.pack_for_inference(model, weights),
        alq.load_for_inference(tmp_path / "net.alq", with_activations),
        alq.load_for_inference(tmp_path / "net.alq", network()),
        alq.load_for_inference(tmp_path / "net.alq", without_memory),
    ):
        (layer,) = packed_layers(packed)
        assert difference(packed(x), y) < 1e-5
        assert difference(copy.deepcopy(packed)(x), y) < 1e-5
        layer.binary_input = None
        assert difference(packed(x), y) > 1e-2  # so they are what makes it right


def test_a_file_is_read_without_a_model_in_memory(tmp_path, decoder) -> None:
    model = VGG((16, 24, 32), 48).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            random_norm(module)
    weights = alq.quantize(model, max_bit=4)
    with torch.device("meta"):
        empty = VGG((16, 24, 32), 48)
    x = torch.randn(3, 3, 32, 32)
    for floats, coded in (("float32", False), ("float16", True)):
        if floats == "float16":
            alq.round_floats(model, weights)
        alq.save_packed(tmp_path / "net.alq", model, weights, floats, coded)
        packed = alq.load_for_inference(tmp_path / "net.alq", empty)
        assert difference(packed(x), model(x)) < 1e-5
        assert next(empty.parameters()).is_meta and empty.training
    with pytest.raises(InputError, match=r"net.alq: holds another network: 14.weight is"):
        alq.load_for_inference(tmp_path / "net.alq", VGG((16, 24, 33), 48))


PEAK = """
import sys, torch, alq
from vgg import VGG
with torch.device("meta"):
    model = VGG((32, 64, 256), 2048)
def peak():  # of this process, where getrusage begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "VmHWM" in line)
before = peak()
packed = alq.load_for_inference(sys.argv[1], model)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in bytes elsewhere")
def test_the_float32_weights_are_never_in_memory(tmp_path) -> None:
    model = VGG((32, 64, 256), 2048)
    weights = alq.quantize(model, max_bit=1)
    alq.save_packed(tmp_path / "net.alq", model, weights)
    floats = sum(4 * weight.grouping.numel for weight in weights)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "net.alq")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert floats > 50e6 and int(done.stdout) < floats / 3


# ---------------------------------------------------------------------------- the published file


def test_the_published_file_gives_the_same_answers(decoder) -> None:
    model = lenet5.LeNet5().eval()
    alq.load_packed(PUBLISHED, model)
    packed = alq.load_for_inference(PUBLISHED, lenet5.RECIPE.shapes())
    images, _ = mnist.read_mnist(ROOT / "data")[1]
    x = (images[:1000].float().view(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    for batch in (x, x[:1], x[:3]):
        assert difference(packed(batch), model(batch)) < 1e-5
    assert (packed(x).argmax(1) == model(x).argmax(1)).float().mean() > 0.998


def test_eval_packed_prints_what_eval_does(capsys, sliver) -> None:
    printed = []
    for flags in ([], ["--packed"]):
        lenet5.main(["--EVAL", str(PUBLISHED), "--data", str(ROOT / "data"), *flags])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "0.294 bit a weight" in printed[0]
    with pytest.raises(SystemExit):
        lenet5.main(["--PRETRAIN", "--packed"])
    assert "--packed: goes with --EVAL FILE" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the plan


def test_the_plan_is_shown(capsys) -> None:
    from alq.__main__ import main

    main(["info", str(PUBLISHED), "--plan"])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["fc1.weight"][1] == "500x800"
    assert {*lines["fc1.weight"][3:]} <= {"tables", "dots", "decoded"}
    for other in ("--json", "--ops"):
        with pytest.raises(SystemExit):
            main(["info", str(PUBLISHED), "--plan", other])
        assert "--plan: is a table of its own" in capsys.readouterr().err


def test_the_plan_takes_tables_where_bits_are_few_and_products_where_they_are_many() -> None:
    grouping = alq.quantize(nn.Conv2d(64, 64, 3))[0].grouping
    for kind in ("float32", "int16"):
        assert choose(grouping, grouping.G // 2, 4096, kind) == "tables"
        assert choose(grouping, grouping.G * 8, 4096, kind) == "decoded"
    grouping = alq.quantize(nn.Linear(512, 512))[0].grouping
    assert choose(grouping, grouping.G // 2, 1, "float32") == "dots"
    assert choose(grouping, grouping.G // 2, 64, "float32") == "tables"


# ---------------------------------------------------------------------------- other processors


@numba_works
@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="needs AVX2")
def test_instructions_of_other_processors_give_the_same(tmp_path) -> None:
    """AVX2 without AVX-512; the compiled kernels lie in a folder that numba is told."""
    program = """
import torch, alq
from torch import nn
from alq.method.quantized_inputs import place
for layer, x in ((nn.Conv2d(40, 24, 3, 2, 1), torch.randn(2, 40, 11, 11)),
                 (nn.Linear(90, 30), torch.randn(20, 90)), (nn.Linear(90, 30), torch.randn(1, 90))):
    weights = alq.quantize(layer, max_bit=2)
    for tables, bound in (("float32", 1e-5), ("int16", 1e-2)):
        packed = alq.pack_for_inference(layer, weights, tables)
        for packed.way in ("dots" if len(x) == 1 else "tables", "decoded"):
            with torch.no_grad():
                error = (packed(x) - layer(x)).abs().max() / layer(x).abs().max()
            assert error < bound, (layer, tables, packed.way)
    place({"": layer}, {"": 2})
    with torch.no_grad():
        y = layer(x)
        packed = alq.pack_for_inference(layer.eval(), weights)
        packed.way = "popcount dots" if len(x) == 1 else "popcounts"
        assert (packed(x) - layer(x)).abs().max() < 1e-5 * y.abs().max(), layer
"""
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,-avx512f"}
    environment = {**os.environ, **settings, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert list(tmp_path.rglob("*.nbi"))


@numba_works
def test_where_nothing_can_be_written_kernels_compile_all_the_same(monkeypatch) -> None:
    from numba.core import caching

    from alq.inference.vectors import compiled

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled(lambda a: a + 1)(1) == 2


def test_rows_are_whole_words() -> None:
    assert [rows.row_bytes(n) for n in (1, 32, 33, 64, 65, 128)] == [4, 4, 8, 8, 16, 16]
