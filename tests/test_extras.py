"""Beyond the paper: float16 and coded packed files, shifts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import alq
import lenet5
from alq.data import mnist, read_mnist
from alq.data.loaders import CropFlip
from alq.errors import InputError
from alq.files.entropy import Encoder, code_numbers, decode
from alq.files.packed import read_packed
from alq.method.weight import prune

# ---------------------------------------------------------------------------- entropy coding


def encode(sequences: list[list[int]], bits: int, follow: bool = False) -> bytes:
    """Return the code that `decode` reads."""
    encoder = Encoder()
    for numbers in sequences:
        code_numbers(encoder, numbers, bits, follow)
    return encoder.finish()


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.sampled_from([1, 4, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits), st.lists(st.lists(st.integers(0, 2**bits - 1), max_size=40), max_size=4)
        )
    ),
    st.booleans(),
)
def test_numbers_come_back(case, follow) -> None:
    bits, sequences = case
    data = encode(sequences, bits, follow)
    assert decode(data, [len(s) for s in sequences], bits, follow) == sequences


def test_rare_numbers_take_few_bytes() -> None:
    random = torch.Generator().manual_seed(0)
    numbers = (torch.rand(4000, generator=random) < 0.1).int().tolist()  # 0.469 bit each
    assert 4000 * 0.469 / 8 * 0.95 < len(encode([numbers], 4)) < 4000 * 0.469 / 8 * 1.1
    assert len(encode([[0] * 5000], 8)) < 20


@settings(max_examples=50, deadline=None, database=None)
@given(st.binary(max_size=40), st.integers(0, 200))
def test_any_bytes_decode_to_something(data, count) -> None:
    (numbers,) = decode(data, [count], 4)
    assert len(numbers) == count and all(0 <= x < 16 for x in numbers)


def test_more_numbers_than_bytes_can_stand_for_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers in 3 bytes"):
        decode(b"abc", [10**9], 4)


# ---------------------------------------------------------------------------- packed files


def small_lenet5() -> tuple[nn.Module, list[alq.MultiBitWeight]]:
    """LeNet5 pruned at random to a little over 0.5 bit."""
    torch.manual_seed(0)
    model = lenet5.LeNet5()
    weights = alq.quantize(model, lenet5.DEFAULTS["structure"], lenet5.DEFAULTS["subc"], 2)
    for weight in weights:
        prune([weight], [(torch.rand(weight.mask.shape) < 0.75) & weight.mask])
    return model, weights


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("floats", ["float32", "float16"])
def test_smaller_files_hold_the_same_network(tmp_path, floats, coded) -> None:
    model, weights = small_lenet5()
    if floats == "float16":
        alq.round_floats(model, weights)
    sizes = alq.save_packed(tmp_path / "net.alq", model, weights, floats, coded)
    other = lenet5.LeNet5()
    loaded = alq.load_packed(tmp_path / "net.alq", other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert alq.storage_bytes(loaded) == alq.storage_bytes(weights)
    assert sizes == read_packed(tmp_path / "net.alq").sizes
    assert sum(sizes.values()) == (tmp_path / "net.alq").stat().st_size
    plain = alq.save_packed(tmp_path / "plain.alq", model, weights)
    if floats == "float16":
        assert sizes["coordinates"] <= plain["coordinates"] / 2
    if coded:
        assert sizes["bitwidths"] < 0.8 * plain["bitwidths"]
        assert sizes["coordinates"] < plain["coordinates"]


def test_float16_files_refuse_what_was_not_rounded(tmp_path) -> None:
    model, weights = small_lenet5()
    with pytest.raises(InputError, match="round_floats"):
        alq.save_packed(tmp_path / "net.alq", model, weights, "float16")
    model.fc1.bias.data[0] = 1e6
    with pytest.raises(InputError, match=r"fc1\.bias.*float32"):
        alq.round_floats(model, weights)


def test_all_extras_on_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    sets = read_mnist(Path(__file__).resolve().parent.parent / "data")
    few = [[part[:300] for part in pair] for pair in sets]
    monkeypatch.setattr(mnist, "read_mnist", lambda root, dataset: few)
    files = ["--model_ori", f"{tmp_path}/ori.pth", "--model", f"{tmp_path}/net.pth"]
    short = "--val_size 44 --epoch_pretrain 1 --epoch_basis 1 --epoch_coord 1 --R 1 --top_k 1"
    post = "--epoch_ste 1 --epoch_post_coord 1"
    extras = "--augment 2 --floats 6bit --coded --fold"
    flags = f"--PRETRAIN --ALQ --POSTTRAIN --threads 1 {short} {post} {extras}".split()
    lenet5.main([*flags, *files])
    capsys.readouterr()
    lenet5.main(["--EVAL", f"{tmp_path}/net_posttrained.alq", "--val_size", "44"])
    logged = json.loads((tmp_path / "net.jsonl").read_text().splitlines()[-1])
    assert f"{logged['top1']:.2f}" in capsys.readouterr().out
    assert logged["file_bytes"] == (tmp_path / "net_posttrained.alq").stat().st_size


# ---------------------------------------------------------------------------- training


def test_shifts_do_not_mirror() -> None:
    images = torch.randint(1, 256, (40, 1, 6, 6), dtype=torch.uint8)
    crop = CropFlip(2, mirror=False)
    draws = crop.draw(40, torch.Generator().manual_seed(0))
    padded = F.pad(images, [2] * 4)
    for image, (top, left, _), shifted in zip(padded, draws, crop(images, draws), strict=True):
        assert torch.equal(image[:, top : top + 6, left : left + 6], shifted)
