"""The smallest packed file (version 3): round trips, floats in few bits, damage, older files."""

from __future__ import annotations

import copy
import hashlib
import random
import re
import tracemalloc
import zlib
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import alq
import fuzz_files
import lenet5
from alq.errors import InputError
from alq.files.bits import pack_weights, split_layers
from alq.files.entropy import Decoder, Encoder, code_numbers, decode_numbers
from alq.files.floats import FLOATS, in_form, smallest_form
from alq.files.packed import read_bits, read_packed
from alq.files.signs import BIT_PLACES, decode_signs, encode_bits
from alq.files.small import START, deflate, open_small
from alq.method.structures import STRUCTURES
from alq.method.weight import prune

PUBLISHED = Path(__file__).resolve().parent.parent / "checkpoints" / "published"


@st.composite
def layers(draw) -> tuple[nn.Module, dict]:
    """A layer of any kind and size, and how it is quantized."""
    O, C, k = (draw(st.integers(1, most)) for most in (5, 6, 3))
    bias = draw(st.booleans())
    kind = draw(st.sampled_from(["linear", "conv", "transposed", "embedding"]))
    structures = ["channelwise", "kernelwise", "pixelwise", "subchannelwise"]
    options = {"max_bit": draw(st.integers(1, 8)), "structure": draw(st.sampled_from(structures))}
    if kind in ("linear", "embedding"):
        options |= {"structure": "subchannelwise", "subc": draw(st.sampled_from([1, C]))}
        layer = nn.Linear(C, O, bias=bias) if kind == "linear" else nn.Embedding(O, C)
    elif kind == "conv":
        layer = nn.Conv2d(C, O, k, bias=bias)
    else:
        layer = nn.ConvTranspose1d(2 * C, 2 * O, k, groups=2, bias=bias)
    if options["structure"] == "subchannelwise":
        options.setdefault("subc", 1)
    return layer, options


@settings(max_examples=120, deadline=None, database=None)
@given(
    chosen=st.lists(layers(), min_size=1, max_size=4), seed=st.integers(0, 99),
    dead=st.sampled_from([0.0, 0.4, 0.9, 1.0]), floats=st.sampled_from(list(FLOATS)),
    canonical=st.booleans(), dataset=st.none() | st.text(max_size=5),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*more than the")
def test_any_network_comes_back_bit_for_bit(
    tmp_path_factory, chosen, seed, dead, floats, canonical, dataset
) -> None:
    torch.manual_seed(seed)
    model = nn.ModuleList([layer for layer, _ in chosen])
    model.register_buffer("count", torch.tensor(5))
    model.register_buffer("flags", torch.rand(3) < 0.5)
    model.register_buffer("statistics", torch.randn(2, 3))
    for layer, _ in chosen:
        nn.init.normal_(layer.weight)
    options = {k: [o.get(k, 0) for _, o in chosen] for k in ("structure", "subc", "max_bit")}
    weights = alq.quantize(model, **options)
    prune(weights, [(torch.rand(w.mask.shape) < dead) & w.mask for w in weights])
    for weight in weights:
        if canonical:  # signs that no file needs to hold
            plus = (2 ** weight.mask.sum(1, keepdim=True) - 1).byte()
            columns = torch.rand(weight.grouping.by_outputs[1]) < 0.5
            codes = torch.where(columns[weight.grouping.inputs_of()], plus, weight.codes)
            weight.set_form(codes, weight.alpha * (1 - 2 * (seed % 2)), weight.mask)
    alq.round_floats(model, weights, floats)
    path = tmp_path_factory.getbasetemp() / "small.alq"
    sizes = alq.save_packed(path, model, weights, floats, coded=True, dataset=dataset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.zero_()
    loaded = alq.load_packed(path, model)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    for old, new in zip(weights, loaded, strict=True):
        assert (old.name, old.grouping, old.I) == (new.name, new.grouping, new.I)
        assert torch.equal(old.mask.sum(1), new.mask.sum(1))
    content = read_packed(path)
    assert content.sizes == sizes and content.dataset == dataset
    assert sum(sizes.values()) == path.stat().st_size and min(sizes.values()) >= 0
    first = path.read_bytes()
    alq.save_packed(path, model, loaded, floats, coded=True, dataset=dataset)
    assert path.read_bytes() == first
    for layer, weight in zip(read_bits(path)[0], weights, strict=True):
        assert torch.equal(layer.alpha, weight.live_first(weight.alpha)[live_places(weight)])


def live_places(weight: alq.MultiBitWeight) -> torch.Tensor:
    return torch.arange(weight.L) < weight.mask.sum(1, keepdim=True)


# ---------------------------------------------------------------------------- floats in few bits


@settings(max_examples=200, deadline=None, database=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20),
    form=st.sampled_from([*range(2, 9), 32]),
)
def test_rounding_moves_each_value_by_half_a_step_and_only_once(values, form) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    once = in_form(x, form)
    if form == 32:
        assert torch.equal(once, x)
        return
    largest = x.abs().max() if values else torch.tensor(0.0)
    if once.isfinite().all():  # else its step is too large, which is refused by name
        assert torch.equal(in_form(once, form), once)
        assert smallest_form(once) <= form
    if not 1e-30 < largest < 1e38:  # the step itself is rounded to 0, or too large
        return
    step = largest / (2 ** (form - 1) - 1) * (1 + 2**-7)
    assert ((once - x).abs() <= step * 0.51 + largest * 2**-8).all()


@pytest.mark.parametrize("form", [5, 8])
def test_values_too_small_for_a_step_become_0(form) -> None:
    """A step below float32's smallest normal number, 2^-126, may not give itself again.

    Such a bfloat16 is a multiple of 2^-133: 190.5 of these are 95.25 steps of 2, and 190 are 127 of
    1.496, rounded to 1.
    """
    most = 2 ** (form - 1) - 1
    for x in torch.arange(1, 6 * most).float().unsqueeze(1) * 2.0**-134:
        once = in_form(x, form)
        assert torch.equal(in_form(once, form), once) and smallest_form(once) <= form
    assert not in_form(torch.tensor([most * 2.0**-127]), form).any()
    assert in_form(torch.tensor([most * 2.0**-126]), form) == most * 2.0**-126


def test_what_was_not_rounded_is_refused_by_name(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    weights = alq.quantize(model, max_bit=2)
    with pytest.raises(InputError, match=r"0\.weight: not 5bit values; alq\.round_floats"):
        alq.save_packed(tmp_path / "x.alq", model, weights, "5bit", coded=True)
    alq.round_floats(model, weights, "5bit")
    alq.save_packed(tmp_path / "x.alq", model, weights, "5bit", coded=True)
    with pytest.raises(InputError, match=r"0\.weight: not 4bit values"):
        alq.save_packed(tmp_path / "x.alq", model, weights, "4bit", coded=True)
    with pytest.raises(InputError, match="floats '5bit': needs coded"):
        alq.save_packed(tmp_path / "x.alq", model, weights, "5bit")
    for use in (
        lambda: alq.save_packed(tmp_path / "x.alq", model, weights, "9bit", coded=True),
        lambda: alq.round_floats(model, weights, "9bit"),
    ):
        with pytest.raises(InputError, match="floats '9bit': choose from float32, float16, 8bit"):
            use()


def test_running_statistics_keep_16_bits_and_coordinates_of_0_go() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model[1].running_var.copy_(torch.tensor([1000.0, 1.0, 0.1, 1e-3]))
    (weight,) = alq.quantize(model, max_bit=2)
    weight.alpha[0, 0] = 1e-4 * weight.alpha.max()
    live = weight.live_total
    alq.round_floats(model, [weight], "3bit")
    assert torch.equal(model[1].running_var, torch.tensor([1000.0, 1.0, 0.1, 1e-3]).half().float())
    assert weight.live_total < live and weight.alpha[weight.mask].all()
    assert torch.equal(weight.w_hat(), model[0].weight)
    assert len(model[0].bias.abs().unique()) <= 4  # 3 bits: a sign, and 0 to 3 steps


@pytest.mark.parametrize("floats", ["float16", "6bit"])
def test_a_mask_of_infinities_is_a_buffer_like_others(floats, tmp_path) -> None:
    """As attention adds it."""
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    weights = alq.quantize(model, max_bit=2)
    alq.round_floats(model, weights, floats)
    alq.save_packed(tmp_path / "net.alq", model, weights, floats, coded=True)
    loaded = copy.deepcopy(model)
    loaded.mask.zero_()
    alq.load_packed(tmp_path / "net.alq", loaded)
    assert torch.equal(loaded.mask, torch.full((4, 4), -torch.inf).triu(1))
    model.mask[0, 0] = 1e9
    with pytest.raises(InputError, match=r"mask: has values .* too large for float16; pack it"):
        alq.round_floats(model, weights, floats)
    model.mask[0, 0] = 0
    model[0].bias.data[0] = torch.inf
    if floats == "6bit":
        with pytest.raises(
            InputError, match=r"0\.bias: has values not finite, or too large for 6b"
        ):
            alq.round_floats(model, weights, floats)


# ---------------------------------------------------------------------------- older files


@pytest.mark.parametrize(
    ("file", "digest"),
    [("lenet5.alq", "ecdb0d66b7a3a321"), ("lenet5_10kb.alq", "408767e053922d99")],
)
def test_files_of_versions_1_and_2_hold_what_they_held(file, digest) -> None:
    """The digests were taken before there was a version 3."""
    content, found = read_packed(PUBLISHED / file), hashlib.sha256()
    for state in content.weights:
        for key in ("codes", "alpha", "mask"):
            found.update(state[key].numpy().tobytes())
    for name, value in sorted(content.rest.items()):
        found.update(name.encode() + value.numpy().tobytes())
    assert found.hexdigest().startswith(digest)


def test_a_coded_file_of_version_2_with_float32() -> None:
    layer = nn.Linear(8, 3)
    (weight,) = alq.load_packed(Path(__file__).parent / "version2_coded.alq", layer)
    alpha = torch.tensor([[0.95, 1.95], [0.825, 1.825], [0.8, 1.7]])
    torch.testing.assert_close(weight.alpha, alpha)
    assert torch.equal(layer.bias, torch.tensor([0.1, -2.5, 3e5]))
    codes = ["00112230", "01122300", "11233001"]
    assert ["".join(map(str, row)) for row in weight.codes.tolist()] == codes


def stored_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4),
    )  # fmt: skip


def test_a_file_of_version_3_holds_what_it_held() -> None:
    """It has units without bits, flags, and floats of 6, 16 and 32 bits.

    The digest is of the network that was saved, not of what was read then.
    """
    path, model = Path(__file__).parent / "version3.alq", stored_network()
    weights = alq.load_packed(path, model)
    assert content_digest(model, weights) == "7613e1414f9618b6"
    header, _ = open_small(path.read_bytes())
    assert {row[-1] for row in [*header[2], *header[3]]} == {2, 6, 16, 32, "int64"}
    dead = [~w.mask.reshape(w.grouping.by_outputs[0], -1).any(1) for w in weights]
    assert [int(units.sum()) for units in dead] == [2, 3, 10, 0]
    assert read_packed(path).sizes["signs"] * 8 < sum(w.live_total * w.n for w in weights)


def content_digest(model: nn.Module, weights: list[alq.MultiBitWeight]) -> str:
    """The start of a digest of all signs, live coordinates and bitwidths, and of the rest."""
    found = hashlib.sha256()
    for weight in weights:
        alpha = weight.live_first(weight.alpha)[live_places(weight)]
        for value in (weight.codes, weight.mask.sum(1), alpha):
            found.update(value.contiguous().numpy().tobytes())
    quantized = {weight.name for weight in weights}
    for name, value in sorted(model.state_dict().items()):
        if name not in quantized:
            found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------------- size


def test_the_published_network_takes_few_bytes(tmp_path) -> None:
    model = lenet5.LeNet5()
    weights = alq.load_packed(PUBLISHED / "lenet5_10kb.alq", model)  # of version 2, and coded
    sizes = alq.save_packed(tmp_path / "x.alq", model, weights, coded=True)
    assert sizes["container"] + sizes["names"] < 100
    assert sizes["signs"] < sum(w.live_total * w.n for w in weights) / 8 + 1
    alq.round_floats(model, weights, "5bit")
    smaller = alq.save_packed(tmp_path / "x.alq", model, weights, "5bit", coded=True)
    coordinates = sum(w.live_total for w in weights)
    assert smaller["coordinates"] < coordinates * 4 / 8  # no sign, as all are above 0
    assert smaller["rest"] < 580 * 5 / 8


def test_signs_of_units_without_bits_take_no_bytes(tmp_path) -> None:
    """Forty of the sixty units have none; the flags of the second layer say so for nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 50))
    weights = alq.quantize(model, max_bit=1)
    dead = torch.arange(60) < 40
    prune(weights[:1], [dead.unsqueeze(1) & weights[0].mask])
    before = alq.save_packed(tmp_path / "x.alq", model, weights, coded=True)
    alq.fold_constant_units(model, weights, torch.randn(4, 30))
    after = alq.save_packed(tmp_path / "x.alq", model, weights, coded=True)
    assert before["signs"] == (20 * 30 + 50 * 60) / 8 and after["signs"] == (20 * 30 + 50 * 20) / 8
    assert after["bitwidths"] <= before["bitwidths"] + 2
    assert after["coordinates"] == before["coordinates"]


def test_inputs_with_few_signs_are_not_flagged_by_chance(tmp_path) -> None:
    """One in 16 has four + signs, which save less than its flag would cost."""
    torch.manual_seed(0)
    layer = nn.Linear(800, 4)
    sizes = alq.save_packed(tmp_path / "x.alq", layer, alq.quantize(layer, max_bit=1), coded=True)
    assert sizes["signs"] == 400 and sizes["bitwidths"] < 8


def test_zeros_at_the_end_come_back_however_many(tmp_path) -> None:
    """A byte of code stands for up to 22 710 of them, and the last bytes are not stored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Module())
    model[1].register_buffer("zeros", torch.zeros(330_000))
    weights = alq.quantize(model, max_bit=2)
    sizes = alq.save_packed(tmp_path / "x.alq", model, weights, coded=True)
    w_hat = model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.zero_()
    alq.load_packed(tmp_path / "x.alq", model)
    assert torch.equal(model[0].weight, w_hat) and not model[1].zeros.any()
    assert sum(sizes.values()) < 300
    read_packed(tmp_path / "x.alq")


def test_the_shortest_code_has_the_bytes_that_its_numbers_need() -> None:
    encoder, count = Encoder(), 300_000
    code_numbers(encoder, repeat(0, count), 1)
    code = encoder.finish_shortest()
    assert code == b"\0\0" and len(encoder.finish()) > 10
    assert decode_numbers(Decoder(code), count, 1) == bytes(count)


# ---------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--floats 6bit", "--floats '6bit': needs coded"),
        ("--fold", "--fold: goes with --coded"),
        ("--fold --coded --act_bit 2", "goes with activations in float32, not with --act_bit"),
        ("--fold --coded --amp", "goes with activations in float32, not with --amp"),
        ("--floats 9bit", "argument --floats: invalid choice: '9bit'"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_any_work(capsys, flags, message) -> None:
    with pytest.raises(SystemExit) as stop:
        lenet5.main(["--ALQ", *flags.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "seed.alq"
    model = fuzz_files.network()
    weights = alq.quantize(model, max_bit=3)
    prune(weights, [(torch.rand(w.mask.shape) < 0.5) & w.mask for w in weights])
    alq.round_floats(model, weights, "6bit")
    alq.save_packed(path, model, weights, "6bit", coded=True)
    return path.read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_packed(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path, small) -> None:
    path = tmp_path / "x.alq"
    for at in range(len(small)):
        path.write_bytes(small[:at] + bytes([small[at] ^ 1 << at % 8]) + small[at + 1 :])
        refusal(path)
        path.write_bytes(small[:at])
        assert "truncated" in refusal(path) or at < 3
    path.write_bytes(small + b"\0")
    assert "truncated or damaged" in refusal(path)
    path.write_bytes(b"ALQ\4" + small[4:])
    assert "format version 4; this code reads 1 to 3" in refusal(path)


def sealed(body: bytes) -> bytes:
    return b"ALQ\3" + hashlib.sha256(body).digest()[: START - 4] + body


def test_forged_content_raises_nothing_but_input_errors(tmp_path, small) -> None:
    """Files whose checksum fits: names, stream and signs changed in any way."""
    chance, path = random.Random(0), tmp_path / "x.alq"
    found = {"taken": 0, "refused": 0}
    for _ in range(400):
        path.write_bytes(fuzz_files.reencoded(small, chance))
        found[fuzz_files.read(path)] += 1
    assert found["refused"] > 100 and found["taken"] > 10, found


def test_names_that_inflate_without_end_are_refused(tmp_path, small) -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflater.compress(b" " * 2**26) + deflater.flush()
    (tmp_path / "x.alq").write_bytes(sealed(bomb))
    assert "makes no sense" in refusal(tmp_path / "x.alq")


@pytest.mark.parametrize("form", [2, 16])
def test_sizes_that_the_file_cannot_have_take_no_memory(tmp_path, small, form) -> None:
    """A list of 2^40 values would end the process."""
    header, body = open_small(small)
    header[3][0][1:] = [[2**40], form]
    (tmp_path / "x.alq").write_bytes(sealed(deflate(header) + body))
    assert "makes no sense" in refusal(tmp_path / "x.alq")
    header, body = open_small(small)
    header[2][1][1] = [1, 2**40]
    (tmp_path / "x.alq").write_bytes(sealed(deflate(header) + body))
    assert "makes no sense" in refusal(tmp_path / "x.alq")


@pytest.mark.parametrize("shape", [[1, 10**15 + 37], [10**15 + 37, 1]])
@pytest.mark.parametrize("subc", [0, 2])
def test_no_row_is_searched_for_its_divisors(tmp_path, small, shape, subc) -> None:
    """10^15 + 37 is prime: to try all numbers below it takes weeks."""
    header, body = open_small(small)
    header[2][1][1:4] = [shape, STRUCTURES.index("subchannelwise"), subc]
    (tmp_path / "x.alq").write_bytes(sealed(deflate(header) + body))
    assert "makes no sense" in refusal(tmp_path / "x.alq")


def test_signs_that_need_no_bytes_take_no_memory(tmp_path) -> None:
    """A flag stands for 36 million signs; the file is refused by its names, whoever reads it."""
    encoder = Encoder()
    for number, bits in [(1, BIT_PLACES), (1, 1), (0, 2)]:  # one bit, all signs +, alpha of 0
        code_numbers(encoder, [number], bits)
    stream = encoder.finish()
    row = ["0.weight", [1, 1, 6000, 6000], STRUCTURES.index("channelwise"), 0, 0, 1, 2]
    header = deflate([len(stream), None, [row], []])
    (tmp_path / "x.alq").write_bytes(sealed(header + stream + b"\0\0"))
    model = nn.Sequential(nn.Conv2d(1, 1, 5, bias=False))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"holds another network: 0\.weight"):
        alq.load_packed(tmp_path / "x.alq", model)
    assert re.search(r"36000000 weights in \d\d bytes", refusal(tmp_path / "x.alq"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_name_that_comes_twice_is_refused(tmp_path, small) -> None:
    header, body = open_small(small)
    header[2].append(header[2][0])
    (tmp_path / "x.alq").write_bytes(sealed(deflate(header) + body))
    assert "a name twice" in refusal(tmp_path / "x.alq")


def test_packing_takes_a_few_bytes_a_sign() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024, bias=False)
    layers, tensors = pack_weights(alq.quantize(layer, max_bit=2, structure="subchannelwise"))
    found, encoder = split_layers(layers, tensors), Encoder()
    signs = 8 * len(found[0].signs)
    tracemalloc.start()
    kept = encode_bits(encoder, found, 0)
    flags = np.arange(1024) < 0
    packed, own = decode_signs(found[0], flags, kept)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == own == signs == 2**21 and np.array_equal(packed, found[0].signs)
    assert peak < 8 * signs


def test_another_network_is_named(tmp_path, small) -> None:
    (tmp_path / "x.alq").write_bytes(small)
    model = fuzz_files.network()
    model[4] = nn.Linear(16, 7)
    with pytest.raises(InputError, match=r"holds another network: 4\.weight is float32 \(6, 16\)"):
        alq.load_packed(tmp_path / "x.alq", model)
