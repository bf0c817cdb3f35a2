"""The packed file: the same network back bit for bit, the size of the formula, no damage unseen."""

from __future__ import annotations

import copy
import json
import pickle
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import alq
import lenet5
from alq.errors import InputError
from alq.files.disk import write_atomically
from alq.files.packed import (
    decode_container,
    deflate_json,
    encode_container,
    inflate_json,
    read_packed,
)
from alq.method.structures import make_grouping
from alq.method.weight import prune
from test_steps import CASES


def network(seed: int = 0) -> nn.Sequential:
    """Normalisation, an int64 buffer, and three structures."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False),
        nn.Flatten(), nn.Linear(4 * 4 * 4, 5),
    )  # fmt: skip


INPUTS = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(9))


def trained(max_bit: int = 4, prune: float = 0.5) -> tuple[nn.Sequential, list[alq.MultiBitWeight]]:
    """`network` after some steps, with holes in the masks, and running statistics of its own."""
    model = network()
    structures = ["kernelwise", "pixelwise", "subchannelwise"]
    weights = alq.quantize(model, structures, [0, 0, 4], max_bit)
    optimizer = alq.ALQ(weights, lr=0.02, generator=torch.Generator().manual_seed(0))
    for step in (
        optimizer.basis_step,
        optimizer.coordinate_step,
        lambda: optimizer.prune_step(1.0, prune),
        optimizer.ste_step,
        optimizer.coordinate_step,
    ):
        model.zero_grad()
        model(INPUTS).square().mean().backward()
        step()
    return model.eval(), weights


def assert_same_network(model: nn.Module, other: nn.Module) -> None:
    for (name, value), loaded in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert value.dtype == loaded.dtype and torch.equal(value, loaded), name


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "net.alq"
    alq.save_packed(path, *trained())
    return path.read_bytes()


# ---------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("prune", [0.0, 0.5, 0.9, 1.0])
def test_the_network_comes_back_bit_for_bit(tmp_path, prune) -> None:
    model, weights = trained(prune=prune)
    assert prune < 1 or not any(weight.live_total for weight in weights)  # pruned to nothing
    sizes = alq.save_packed(tmp_path / "net.alq", model, weights)
    other = network(seed=1).eval()
    loaded = alq.load_packed(tmp_path / "net.alq", other)
    assert_same_network(model, other)
    assert int(other[1].num_batches_tracked) == 5
    assert torch.equal(model(INPUTS), other(INPUTS))
    for weight, again in zip(weights, loaded, strict=True):
        assert (weight.name, weight.grouping, weight.I) == (again.name, again.grouping, again.I)
        assert torch.equal(weight.w_hat(), again.w_hat())
        assert torch.equal(weight.mask.sum(1), again.mask.sum(1))
        assert again.parameter is other.get_parameter(again.name)
    assert sum(sizes.values()) == (tmp_path / "net.alq").stat().st_size
    # ... and what was loaded is saved as the same bytes.
    alq.save_packed(tmp_path / "again.alq", other, loaded)
    assert (tmp_path / "net.alq").read_bytes() == (tmp_path / "again.alq").read_bytes()


@pytest.mark.parametrize("floats", ["float32", "float16"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_coded_file_without_any_coordinate(tmp_path, layers, floats) -> None:
    model, other = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    weights = alq.quantize(model)[:layers]
    for weight in weights:
        prune([weight], [weight.mask])
    alq.round_floats(model, weights)
    sizes = alq.save_packed(tmp_path / "x.alq", model, weights, floats, coded=True)
    assert sizes["coordinates"] == sizes["bitwidths"] == 0
    assert len(alq.load_packed(tmp_path / "x.alq", other)) == layers
    assert_same_network(model, other)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_structure_with_holes_and_groups_without_bits(tmp_path, case) -> None:
    structure, subc, max_bit, shape = case
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    (weight,) = alq.quantize(layer, structure, subc, max_bit)
    dead = torch.rand(weight.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    dead[1] = True
    prune([weight], [dead & weight.mask])
    weight.alpha *= -1  # as a coordinate step may leave them
    weight.write()
    sizes = alq.save_packed(tmp_path / "one.alq", layer, [weight])
    other = nn.Module()
    other.weight = nn.Parameter(torch.zeros(shape))
    alq.load_packed(tmp_path / "one.alq", other)
    assert torch.equal(layer.weight, other.weight)
    assert 0 <= sizes["signs"] + sizes["coordinates"] - weight.storage_bytes < 1


def test_the_same_coordinates_give_the_same_bits_in_every_block() -> None:
    """w_hat is computed in blocks by the steps and as a whole after loading."""
    alpha = torch.randn(301, 7, generator=torch.Generator().manual_seed(0))
    levels = alq.method.codes.level_table(alpha)
    assert torch.equal(levels, torch.cat([alq.method.codes.level_table(a) for a in alpha.split(3)]))
    padded = torch.cat([alpha, torch.zeros(301, 1)], dim=1)  # a dead coordinate behind
    assert torch.equal(levels, alq.method.codes.level_table(padded)[:, :128])
    assert torch.equal(levels, -levels.flip(1))  # opposite codes
    flipped = alq.method.codes.level_table(alpha * torch.tensor([1, -1, 1, 1, -1, 1, 1.0]))
    assert torch.equal(levels, flipped[:, torch.arange(128) ^ 0b10010])


def test_tied_weights_and_other_types_are_stored_once_and_exactly(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
            self.register_buffer("short", torch.randn(3).half())
            self.register_buffer("flag", torch.tensor([True, False, True]))

    model, other = Tied(), Tied()
    sizes = alq.save_packed(tmp_path / "tied.alq", model, alq.quantize(model))
    alq.load_packed(tmp_path / "tied.alq", other)
    assert_same_network(model, other)
    assert other.b.weight is other.a.weight and sizes["rest"] == 8 * 4 + 3 * 2 + 3


# ---------------------------------------------------------------------------- size


def test_lenet5_takes_the_bytes_of_the_formula(tmp_path) -> None:
    torch.manual_seed(0)
    model = lenet5.LeNet5()
    defaults = lenet5.DEFAULTS
    weights = alq.quantize(model, defaults["structure"], defaults["subc"], 2)
    for k, weight in enumerate(weights):  # to about 0.4 bit
        draw = torch.rand(weight.mask.shape, generator=torch.Generator().manual_seed(k))
        prune([weight], [(draw < 0.8) & weight.mask])
    path = tmp_path / "lenet5.alq"
    sizes = alq.save_packed(path, model, weights)
    formula = alq.storage_bytes(weights)
    assert 0 <= sizes["signs"] + sizes["coordinates"] - formula < len(weights)
    assert 0 < path.stat().st_size - formula < 5000
    assert sizes["container"] < 1000
    assert sizes["bitwidths"] == sum(-(-w.G * w.L.bit_length() // 8) for w in weights)
    assert sizes == read_packed(path).sizes


# ---------------------------------------------------------------------------- damage


def refusal(path, model=None) -> str:
    """The message of the refusal, which leaves the model as it was."""
    model = network(seed=1) if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(InputError) as error:
        alq.load_packed(path, model)
    assert_same_network(before, model)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_a_file_cut_at_any_length_is_refused(tmp_path, packed) -> None:
    path = tmp_path / "net.alq"
    for length in [*range(64), *range(64, len(packed), 5), len(packed) - 1]:
        path.write_bytes(packed[:length])
        with pytest.raises(InputError) as error:
            read_packed(path)
        found = str(error.value)
        assert "truncated" in found or (length < 9 and "not an ALQ packed file" in found)
    path.write_bytes(packed + b"\0")
    assert "damaged" in refusal(path)


def test_any_changed_byte_is_refused(tmp_path, packed) -> None:
    path = tmp_path / "net.alq"
    for place in [*range(300), *range(300, len(packed), 5)]:
        flipped = bytearray(packed)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError):
            read_packed(path)


def test_foreign_files_are_named(tmp_path) -> None:
    path = tmp_path / "foreign.alq"
    foreign = {
        "not an ALQ packed file": [b"", b"x", b"\x89PNG\r\n\x1a\n" * 9, pickle.dumps({"a": 1})],
        "a safetensors file, but not": [
            safetensors.torch.save({"weight": torch.zeros(3)}),
            safetensors.torch.save({"weight": torch.zeros(3)}, {"format": "pt"}),
        ],
    }
    for message, contents in foreign.items():
        for content in contents:
            path.write_bytes(content)
            assert message in refusal(path)
    assert "cannot be read" in refusal(tmp_path / "absent.alq")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "0", nn.Conv2d(3, 6, 5)), "0.weight is float32 (6, 3, 3, 3) in the"),
        (lambda m: setattr(m, "0", nn.Conv2d(3, 6, 3, bias=False)), "0.bias is float32 (6,) in"),
        (lambda m: setattr(m, "1", nn.Identity()), "1.weight is float32 (6,) in the file and abs"),
        (lambda m: m.append(nn.Linear(5, 5)), "6.weight is absent in the file and float32 (5, 5)"),
        (lambda m: m.half(), "in the file and float16 (6, 3, 3, 3) in this"),
    ],
)  # fmt: skip
def test_another_network_is_named(tmp_path, packed, change, message) -> None:
    (tmp_path / "net.alq").write_bytes(packed)
    model = network(seed=1)
    change(model)
    assert message in refusal(tmp_path / "net.alq", model)


def forge(path, packed: bytes, change) -> None:
    """`packed` with its names (as JSON) changed and a checksum that fits."""
    tensors = decode_container(packed, path)
    tensors["names"] = deflate_json(change(inflate_json(tensors["names"])))
    path.write_bytes(encode_container(tensors))


def test_another_version_is_named(tmp_path, packed, monkeypatch) -> None:
    monkeypatch.setattr(alq.files.packed, "VERSION", 4)
    alq.save_packed(tmp_path / "new.alq", *trained())
    monkeypatch.undo()
    assert "format version 4; this code reads 1 to 3" in refusal(tmp_path / "new.alq")


def test_groups_that_take_no_bytes_are_counted_before_they_take_memory(tmp_path, packed) -> None:
    def without_bits(names: dict) -> dict:
        names["layers"]["G"][0], names["layers"]["L"][0] = 2**44, 0
        return names

    forge(tmp_path / "forged.alq", packed, without_bits)
    assert f"{2**44} groups of shape" in refusal(tmp_path / "forged.alq")


def test_a_forged_structure_of_the_right_size_is_refused(tmp_path, packed) -> None:
    def channelwise(names: dict) -> dict:
        names["layers"]["structure"][0] = "channelwise"  # G and n stay the kernelwise ones
        return names

    forge(tmp_path / "forged.alq", packed, channelwise)
    assert "0.weight: 18 groups, and 6 by its structure" in refusal(tmp_path / "forged.alq")


def test_names_that_inflate_without_end_are_refused(tmp_path, packed) -> None:
    tensors = decode_container(packed, "bomb.alq")
    bomb = zlib.compress(b" " * 2**26)
    tensors["names"] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    (tmp_path / "bomb.alq").write_bytes(encode_container(tensors))
    assert "makes no sense" in refusal(tmp_path / "bomb.alq")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 10**6)
    | st.floats(allow_subnormal=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_forged_names_raise_nothing_but_input_errors(tmp_path_factory, packed, data) -> None:
    """Files whose checksum fits: one value anywhere in the names replaced by any other."""

    def change(names: dict) -> object:
        places = [names]
        while isinstance(places[-1], (dict, list)) and places[-1]:
            keys = places[-1] if isinstance(places[-1], dict) else range(len(places[-1]))
            key = data.draw(st.sampled_from(list(keys)))
            if data.draw(st.integers(0, 2)) == 0:
                break
            places.append(places[-1][key])
            last = key
        if len(places) == 1:
            return data.draw(JSON)
        places[-2][last] = data.draw(JSON)
        return names

    path = tmp_path_factory.getbasetemp() / "forged.alq"
    forge(path, packed, change)
    original = network(seed=1)
    for read in (read_packed, lambda path: alq.load_packed(path, original)):
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_any_bytes_raise_nothing_but_input_errors(tmp_path_factory, packed, data) -> None:
    start = data.draw(st.integers(0, len(packed)))
    end = data.draw(st.integers(start, len(packed)))
    content = packed[:start] + data.draw(st.binary(max_size=64)) + packed[end:]
    if data.draw(st.booleans()):  # a safetensors header of any JSON
        header = json.dumps(data.draw(JSON)).encode()
        content = len(header).to_bytes(8, "little") + header + content
    path = tmp_path_factory.getbasetemp() / "any.alq"
    path.write_bytes(content)
    if content != packed:
        with pytest.raises(InputError):
            read_packed(path)


# ---------------------------------------------------------------------------- saving


def test_what_cannot_be_saved_exactly_is_refused(tmp_path) -> None:
    path = tmp_path / "net.alq"
    model, weights = trained()
    with pytest.raises(InputError, match=r"0.weight: is not this model's"):
        alq.save_packed(path, network(), weights)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=r"3.weight: the parameter does not hold w_hat"):
        alq.save_packed(path, model, weights)
    double = network().double()
    with pytest.raises(InputError, match=r"0.weight: is float64"):
        alq.save_packed(path, double, alq.quantize(double))
    assert not path.exists()


def test_a_failed_write_leaves_the_previous_file(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"good")

    def full_disk(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="file cannot be written: No space left on device"):
        write_atomically(path, full_disk)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(path / "below", full_disk)  # its folder is a file


def test_a_refused_checkpoint_leaves_the_network() -> None:
    _, weights = trained()
    states = [weight.state_dict() for weight in weights]
    states[2]["codes"] = states[2]["codes"][:, :-1]
    other = network(seed=1)
    before = copy.deepcopy(other)
    with pytest.raises(InputError, match=r"5.weight: the saved codes has shape"):
        alq.restore(other, states)
    assert_same_network(before, other)
    assert make_grouping("x", (5, 64), "subchannelwise", 4) == weights[2].grouping


# ---------------------------------------------------------------------------- export


def test_the_exported_program_gives_the_same_logits() -> None:
    model, _ = trained()
    program = torch.export.export(model, (INPUTS,))
    assert torch.equal(program.module()(INPUTS), model(INPUTS))


def test_onnx_gives_the_same_logits(tmp_path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model, _ = trained()
    torch.onnx.export(model, (INPUTS,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: INPUTS.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(INPUTS).detach(), atol=1e-5, rtol=0)


def test_a_tied_weight_whose_first_name_is_another(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 16))
            self.head = nn.Linear(16, 8)
            self.head.weight = self.table

    model, other = Tied(), Tied()
    alq.save_packed(tmp_path / "x.alq", model, alq.quantize(model, max_bit=3))
    alq.load_packed(tmp_path / "x.alq", other)
    assert other.head.weight is other.table
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_files_do_not_depend_on_the_callers_default_type(tmp_path, coded, default) -> None:
    model = network()
    weights = alq.quantize(model, max_bit=2)
    alq.save_packed(tmp_path / "before.alq", model, weights, coded=coded)
    torch.set_default_dtype(default)
    try:
        alq.save_packed(tmp_path / "after.alq", model, weights, coded=coded)
        other = network(1).float()
        found = alq.load_packed(tmp_path / "after.alq", other)
        packed = alq.load_for_inference(tmp_path / "after.alq", network(1).float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert (tmp_path / "after.alq").read_bytes() == (tmp_path / "before.alq").read_bytes()
    assert all(weight.alpha.dtype == torch.float32 for weight in found)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(other.eval()(x), expected)
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)


def test_files_and_pruning_do_not_depend_on_the_callers_default_device(tmp_path) -> None:
    """As where a program sets "cuda" as its default and quantizes on the CPU."""
    model = network()
    weights = alq.quantize(model, max_bit=2)
    optimizer = alq.ALQ(weights)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with torch.device("meta"):
        optimizer.prune_step(0.5, 0.5)
        alq.save_packed(tmp_path / "net.alq", model, weights)
    alq.load_packed(tmp_path / "net.alq", network(1))


def test_what_no_file_could_give_back_is_refused_when_it_is_saved(tmp_path) -> None:
    model = nn.Sequential()
    model.add_module("binary_input", nn.Linear(64, 8))
    with pytest.raises(InputError, match=r"binary_input: files keep .* rename it"):
        alq.save_packed(tmp_path / "net.alq", model, alq.quantize(model))
    model = nn.Linear(64, 8)
    with pytest.raises(InputError, match="dataset 10: is of type int, no name"):
        alq.save_packed(tmp_path / "net.alq", model, alq.quantize(model), dataset=10)
    assert not list(tmp_path.iterdir())


def test_a_lazy_network_is_not_called_a_damaged_file(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    alq.save_packed(tmp_path / "net.alq", model, alq.quantize(model))
    with pytest.raises(InputError, match=r"^0.weight: has no shape yet"):
        alq.load_packed(tmp_path / "net.alq", nn.Sequential(nn.LazyLinear(8)))
