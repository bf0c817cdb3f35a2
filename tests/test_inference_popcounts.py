"""Layers whose inputs are in binary bases: counting ones gives what multiplying gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import alq
from alq.inference import compute, layers
from alq.inference.plan import COUNTED, can_count, choose
from alq.inference.planes import planes_of, planes_to_count
from alq.method.activations import BinaryActivation, midpoints
from alq.method.quantized_inputs import place
from test_inference import FEW, compute_by, difference, numba_works, quantized


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Return which of the ways that count were taken, as they are."""
    taken: list[str] = []
    function = layers.by_kernel

    def note(*arguments) -> Tensor:
        taken.extend(way for way in arguments[5:6] if way in COUNTED)
        return function(*arguments)

    monkeypatch.setattr(layers, "by_kernel", note)
    return taken


def fed(layer: nn.Module, x: Tensor, M: int, max_bit: int = 2, **options: object) -> nn.Module:
    """Quantize the layer; let it take its input in M bases, fitted to x. Return it packed."""
    weight = quantized(layer, max_bit, **options)
    place({"": layer}, {"": M})
    layer(x)
    layer.eval()
    return alq.pack_for_inference(layer, [weight])


def inputs(draw, *shape: int) -> Tensor:
    """Return values as behind ReLU, whose lowest level is 0, or of both signs."""
    x = torch.randn(shape)
    return x.relu() if draw(st.booleans()) else x


@numba_works
@pytest.mark.filterwarnings("ignore:.*groups of")
@FEW
@given(data=st.data())
def test_a_convolution_counts_what_it_multiplied(data: st.DataObject) -> None:
    draw = data.draw
    axes, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2]))
    C, O = groups * draw(st.integers(33, 140)), groups * draw(st.integers(1, 20))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * axes))
    stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * axes)) for _ in range(2))
    padding = draw(st.tuples(*[st.integers(0, 2)] * axes))
    if all(s == 1 for s in stride) and draw(st.booleans()):
        padding = "same"
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    options = {"padding_mode": mode, "bias": draw(st.booleans()), "groups": groups}
    layer = kind(C, O, kernel, stride, padding, dilation, **options)
    fits = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    x = inputs(draw, draw(st.integers(1, 4)), C, *(f + draw(st.integers(4, 14)) for f in fits))
    structure = draw(st.sampled_from(["channelwise", "pixelwise"]))
    M, bits = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    packed = fed(layer, x, M, bits, structure=structure)
    if draw(st.booleans()):  # no contiguous input
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    reference = layer(x)
    for way in ("tables", "popcounts"):
        assert difference(compute_by(packed, way)(x), reference) < 1e-5
    assert difference(packed(x[0]), reference[0]) < 1e-5


@numba_works
@pytest.mark.filterwarnings("ignore:.*groups of")
@FEW
@given(
    n=st.integers(33, 200), pieces=st.integers(1, 4), O=st.integers(2, 90), bits=st.integers(1, 6),
    M=st.integers(1, 4), shape=st.lists(st.integers(1, 7), max_size=3), bias=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_a_linear_layer_counts_what_it_multiplied(n, pieces, O, bits, M, shape, bias, data) -> None:
    layer, x = nn.Linear(n * pieces, O, bias), inputs(data.draw, *shape, n * pieces)
    packed = fed(layer, x, M, bits, structure="subchannelwise", subc=pieces)
    for way in ("tables", *COUNTED):
        assert difference(compute_by(packed, way)(x), layer(x)) < 1e-5


@numba_works
@pytest.mark.parametrize("words", range(1, 10))
def test_rows_of_any_length(words) -> None:
    layer, x = nn.Linear(64 * words, 20), torch.randn(20, 64 * words)
    for M in (1, 2, 3):
        packed = fed(layer, x, M, structure="subchannelwise", subc=1)
        assert planes_to_count(packed.binary_input, packed.grouping) == M + 1
        for way in COUNTED:
            assert difference(compute_by(packed, way)(x), layer(x)) < 1e-5
        layer = nn.Linear(64 * words, 20)


@numba_works
def test_it_counts_where_it_can(counted) -> None:
    for layer, x in (
        (nn.Conv2d(64, 24, 3, padding=1), torch.randn(2, 64, 12, 12)),
        (nn.Linear(300, 200), torch.randn(1, 300)),
        (nn.Linear(300, 200), torch.randn(256, 300)),
    ):
        packed = fed(layer, x.relu(), 2)
        assert difference(packed(x), layer(x)) < 1e-5
    assert counted == ["popcounts", "popcount dots", "popcounts"]
    layer, x = nn.Conv2d(3, 24, 3), torch.randn(2, 3, 12, 12)
    packed = compute_by(fed(layer, x, 2), "popcounts")
    assert difference(packed(x), layer(x)) < 1e-5
    assert len(counted) == 3  # 27 weights a group are too few for a word


@numba_works
def test_a_padded_zero_is_no_level() -> None:
    layer, x = nn.Conv2d(40, 8, 3, padding=2), torch.rand(2, 40, 6, 6) + 3
    packed = fed(layer, x, 2)
    assert packed.binary_input.lowest > 1
    assert planes_to_count(packed.binary_input, packed.grouping) == 3
    assert difference(compute_by(packed, "popcounts")(x), layer(x)) < 1e-5


@numba_works
@pytest.mark.parametrize("lowest", [0.0, -1.25])
@pytest.mark.parametrize("gamma", [(1.0,), (0.5, 0.25), (1.0, 0.9, 0.8), (0.0, 1.0, 0.0, 0.3)])
def test_codes_are_decided_as_levels_are(gamma, lowest) -> None:
    layer = nn.Linear(64, 2, bias=False)
    layer.weight.fill_(1)  # so that its output is its input, 64 times
    weights = alq.quantize(layer, max_bit=1)
    place({"": layer}, {"": len(gamma)})
    activation = layer.eval().binary_input
    activation.gamma.copy_(torch.tensor(gamma))
    activation.lowest.fill_(lowest)
    activation.fitted = True
    middle = torch.from_numpy(planes_of(activation).middle)
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-9.0, 9.0)]
    x = torch.cat([middle, *beside, torch.randn(10_000)])
    x = x.unsqueeze(1).expand(-1, 64).contiguous()
    packed = alq.pack_for_inference(layer, weights)
    assert bool(planes_to_count(activation, packed.grouping)) == (len(gamma) + bool(lowest) <= 4)
    for way in COUNTED:
        x_hat = compute_by(packed, way)(x)[:, 0] / 64
        torch.testing.assert_close(x_hat, activation(x)[:, 0], rtol=0, atol=2e-6)


@numba_works
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_what_it_is_otherwise(value) -> None:
    layer, x = nn.Conv2d(40, 8, 3, padding=1), torch.randn(2, 40, 6, 6).relu()
    packed = compute_by(fed(layer, x, 2), "popcounts")
    x[1, 3, 2, 2] = value
    torch.testing.assert_close(packed(x), layer(x), equal_nan=True, rtol=1e-4, atol=1e-4)


@numba_works
@pytest.mark.parametrize("M", [1, 2, 3, 4])
@pytest.mark.parametrize("lowest", [0.0, -0.7])
def test_inputs_are_put_on_the_levels_that_the_activation_puts_them_on(M, lowest) -> None:
    activation = BinaryActivation(M, torch.zeros(())).eval()
    activation.put(torch.tensor([lowest, *(0.3 * 1.7**m for m in range(M))]))
    activation.fitted = True
    x = 2 * torch.randn(2, 9, 110, 7)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[1, 3, :4] = midpoints(activation.levels())[0]  # halfway, the lower one
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for each in (x, x.transpose(1, 3), x[:, :, ::2], x[0, 0], x[:0], x[..., 0].flatten()):
            found = compute.on_levels(each, planes_of(activation))
            assert found.shape == each.shape
            torch.testing.assert_close(found, activation(each), rtol=0, atol=2e-6, equal_nan=True)


def test_without_numba_and_unfitted_the_levels_are_the_same(monkeypatch) -> None:
    monkeypatch.setattr(compute, "kernels_work", lambda: False)
    layer, x = nn.Linear(100, 20), torch.randn(30, 100).relu()
    weight = quantized(layer, 2)
    place({"": layer}, {"": 2})
    packed = alq.pack_for_inference(layer, [weight])
    y = packed(x)  # its levels fit themselves to the first batch
    assert difference(y, layer(x)) < 1e-5


@numba_works
def test_levels_fit_themselves_to_a_first_batch_that_is_counted(counted) -> None:
    layer, x = nn.Linear(100, 200), torch.randn(30, 100).relu()
    weight = quantized(layer, 2)
    place({"": layer}, {"": 2})
    packed = alq.pack_for_inference(layer, [weight])
    assert difference(packed(x), layer(x)) < 1e-5 and counted


def test_the_plan_counts_where_it_may() -> None:
    wide = alq.quantize(nn.Conv2d(64, 64, 3))[0].grouping
    narrow = alq.quantize(nn.Conv2d(64, 64, 3), structure="kernelwise")[0].grouping
    assert choose(wide, wide.G, 4096, "float32", 2) == "popcounts"
    assert choose(wide, wide.G, 4096, "float32") == "tables"
    assert choose(narrow, narrow.G, 4096, "float32", 2) not in COUNTED
    assert can_count(wide, 4) and not can_count(wide, 5) and not can_count(wide, 0)
    line = alq.quantize(nn.Linear(512, 512))[0].grouping
    assert choose(line, line.G, 1, "float32", 2) == "popcount dots"
    assert choose(line, line.G, 1024, "float32", 2) == "popcounts"


def test_the_plan_of_a_file_shows_who_counts(tmp_path, capsys) -> None:
    from alq.__main__ import main

    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 100))
    weights = alq.quantize(model, max_bit=2)
    alq.quantize_activations(model, 2)
    model(torch.randn(64, 100))
    alq.save_packed(tmp_path / "net.alq", model, weights)
    main(["info", str(tmp_path / "net.alq"), "--plan"])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "popcount" not in first and "popcount" in second
