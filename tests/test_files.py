"""Checkpoints: what is refused, whatever bytes they are made of; nothing in them is executed."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import alq
import fuzz_files
from alq.command.resume import plain_state
from alq.errors import InputError
from alq.files.checkpoint import encode_checkpoint, load_checkpoint, load_model, save_checkpoint

CONTENT = {"net": "small", "model": {"w": torch.arange(6.0)}, "weights": []}


def test_a_checkpoint_is_a_zip_archive_that_torch_reads(tmp_path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, CONTENT)
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.arange(6.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and len(archive.comment) == 64
    assert load_checkpoint(path, "small")["net"] == "small"
    first = path.read_bytes()
    save_checkpoint(path, {**CONTENT, "model": {"w": torch.arange(6.0)}})
    assert path.read_bytes() == first


def test_every_flipped_bit_and_every_cut_is_refused(tmp_path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    for at in range(0, len(whole), 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"x\.pth "):
            load_checkpoint(path, "small")
    for size in [0, 1, *random.Random(0).sample(range(len(whole)), 100)]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"x\.pth "):
            load_checkpoint(path, "small")


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["pickle", "torch", "sealed", "old torch"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, form) -> None:
    bait, path = tmp_path / "bait", tmp_path / "x.pth"
    content = {**CONTENT, "format": "alq-checkpoint", "version": 2, "extra": Hostile(bait)}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=form != "old torch")
    forms = {"pickle": pickle.dumps(content), "sealed": encode_checkpoint(content)}
    path.write_bytes(forms.get(form, buffer.getvalue()))
    with pytest.raises(InputError) as refused:
        load_checkpoint(path, "small")
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not bait.exists()
    pickle.loads(pickle.dumps(Hostile(bait)))  # the bait would have worked
    assert bait.exists()


def test_another_network_or_version_is_refused_with_what_differs(tmp_path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, CONTENT)
    with pytest.raises(InputError, match="holds network 'small', not 'vgg'"):
        load_checkpoint(path, "vgg")
    path.write_bytes(encode_checkpoint({**CONTENT, "format": "alq-checkpoint", "version": 3}))
    with pytest.raises(InputError, match="has format version 3; this code reads 2"):
        load_checkpoint(path, "small")
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"bias is absent there and \(2,\) here"):
        load_model(model, {"weight": torch.zeros(2, 3)}, "x.pth")
    with pytest.raises(InputError, match=r"weight is \(3, 2\) there and \(2, 3\) here"):
        load_model(model, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "x.pth")


def test_weights_from_before_torch_counted_batches_are_loaded() -> None:
    model, state = nn.BatchNorm2d(3), nn.BatchNorm2d(3).state_dict()  # with torch's metadata
    del state["num_batches_tracked"]
    state["running_mean"] = torch.rand(3)
    load_model(model, state, "x.pth")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert int(model.num_batches_tracked) == 0
    with pytest.raises(InputError, match=r"running_mean is absent there and \(3,\) here"):
        load_model(model, {k: v for k, v in state.items() if k != "running_mean"}, "x.pth")


class Counted(nn.Linear):
    """A layer that saves more than its parameters."""

    def __init__(self, extra: object) -> None:
        super().__init__(16, 4)
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_extra_state_is_kept_where_it_is_a_tensor(tmp_path) -> None:
    model, other = Counted(torch.ones(2)), Counted(torch.zeros(2))
    alq.save_packed(tmp_path / "x.alq", model, alq.quantize(model))
    alq.load_packed(tmp_path / "x.alq", other)
    assert torch.equal(other.extra, torch.ones(2)) and torch.equal(other.weight, model.weight)
    other = Counted(torch.zeros(2))
    save_checkpoint(tmp_path / "x.pth", {"net": "n", "model": plain_state(model)})
    load_model(other, load_checkpoint(tmp_path / "x.pth", "n")["model"], "x.pth")
    assert torch.equal(other.extra, torch.ones(2))


@pytest.mark.parametrize("extra", [{"count": 1}, 5, None])
def test_extra_state_of_other_kinds_is_refused(extra, tmp_path) -> None:
    model = Counted(extra)
    weights = alq.quantize(model)
    for use in (
        lambda: alq.save_packed(tmp_path / "x.alq", model, weights),
        lambda: alq.load_packed(tmp_path / "x.alq", model),
        lambda: plain_state(model),
        lambda: load_model(model, {"weight": model.weight, "bias": model.bias}, "x.pth"),
    ):
        with pytest.raises(InputError, match="_extra_state: is no tensor, and the files hold"):
            use()


def test_a_packed_file_and_the_device_meta(tmp_path) -> None:
    """A model without memory is refused, and not left half loaded; one with memory is loaded."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def refuse(model: nn.Module) -> None:
        with pytest.raises(InputError, match=r"has no memory; use model\.to_empty"):
            alq.load_packed(tmp_path / "x.alq", model)

    source, model = network(), network()
    alq.save_packed(tmp_path / "x.alq", source, alq.quantize(source, skip=["2.weight"]))
    with torch.device("meta"):
        refuse(network())
        alq.load_packed(tmp_path / "x.alq", model)
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))
    for part in range(3):  # of which some hold no quantized weight
        model = network()
        model[part].to("meta")
        before = [value.clone() for value in model.state_dict().values()]
        refuse(model)
        for old, new in zip(before, model.state_dict().values(), strict=True):
            assert new.is_meta or torch.equal(old, new)


def test_readers_withstand_a_short_fuzz(tmp_path) -> None:
    """tests/fuzz_files.py reads as many files as it is told to."""
    found = fuzz_files.fuzz(300, 1, tmp_path)
    assert found["bytes: refused"] > 20 and found["content: refused"] > 5, found
