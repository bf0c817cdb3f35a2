"""ResNet on ILSVRC12's folder format: layers, loaders, downloaded weights, the three stages."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

import resnet
from alq.command.flags import ScriptParser
from alq.data import imagenet
from alq.data.published_weights import fetch_weights
from alq.errors import InputError
from alq.method.network import quantizable, restore
from small_sets import write_imagenet

SHORT = shlex.split(
    "--batch_size 12 --val_size 8 --epoch_pretrain 1 --R 1 --epoch_basis 1 --epoch_coord 1 "
    "--pr 0.2 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1 --max_bit 2 --workers 0 --device cpu"
)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder like ILSVRC12's, of 20 training and 4 test pictures, to be cropped to 32 pixels."""
    write_imagenet(tmp_path / "data", 20, classes=2)
    monkeypatch.setattr(imagenet, "RESIZE", 36)
    monkeypatch.setattr(imagenet, "CROP", 32)
    return tmp_path / "data"


def parse(pictures, *flags: str):
    parser = ScriptParser("", resnet.defaults("resnet18"))
    parser.add_argument("--workers", type=int)
    return parser.parse_args(["--data", str(pictures), *SHORT, *flags])


@pytest.mark.parametrize("net", resnet.LAYERS)
def test_defaults_fit_the_networks_layers(net: str) -> None:
    with torch.device("meta"):
        weights = quantizable(getattr(torchvision.models, net)())
    flags = resnet.defaults(net)
    assert len(weights) == resnet.LAYERS[net] == len(flags["structure"]) == len(flags["subc"])
    assert {name for name in weights if "downsample" in name} == {
        f"layer{k}.0.downsample.0.weight" for k in (2, 3, 4)
    }
    for weight, structure in zip(weights.values(), flags["structure"], strict=True):
        assert (weight.dim() == 2) == (structure == "subchannelwise")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_only_training_pictures_change_and_only_with_seed_and_epoch(pictures) -> None:
    """Neither the number of workers nor what was loaded before has an influence."""
    epochs = []
    for workers in ("0", "2"):
        data, val_indices = imagenet.load_splits(parse(pictures, "--workers", workers), None)
        assert [len(x) for x, _ in data.train] == [12] and len(val_indices) == 8
        for epoch in (1, 2, 1):
            data.train.set_epoch(epoch)
            data.val.set_epoch(epoch)
            torch.rand(1)
            epochs.append((next(iter(data.train)), next(iter(data.val))))
    (first, val), (second, _), *_ = epochs
    assert not torch.equal(first[0], second[0])
    for number, (train, again) in enumerate(epochs):
        assert all(map(torch.equal, train, second if number in (1, 4) else first))
        assert all(map(torch.equal, again, val))
    assert first[0].shape == (12, 3, 32, 32)
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    held_out = imagenet.read_folder(pictures, "train").samples[int(val_indices[0])]
    cut = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]
    usual = transforms.Compose([*cut, transforms.Normalize(imagenet.MEAN, imagenet.STD)])
    picture = torchvision.datasets.folder.default_loader(held_out[0])
    torch.testing.assert_close(val[0][0], usual(picture), atol=1e-5, rtol=0)


def test_training_reads_the_pixels_that_pillow_reads(tmp_path) -> None:
    """Also of what ILSVRC12 has besides usual JPEGs: grey, four colours, a PNG of that name."""
    pixels = (torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    picture = Image.fromarray(pixels.numpy()).resize((90, 60), Image.Resampling.BICUBIC)
    for name, mode, options in (
        ("usual", "RGB", {"format": "JPEG"}),
        ("progressive", "RGB", {"format": "JPEG", "progressive": True, "subsampling": 0}),
        ("grey", "L", {"format": "JPEG"}),
        ("print", "CMYK", {"format": "JPEG"}),
        ("other", "RGB", {"format": "PNG"}),
        ("transparent", "RGBA", {"format": "PNG"}),
    ):
        path = str(tmp_path / f"{name}.JPEG")
        picture.convert(mode).save(path, **options)
        found, expected = imagenet.read_pixels(path), pil_to_tensor(imagenet.read_picture(path))
        assert found.dtype == torch.uint8 and found.shape == (3, 60, 90), name
        # Two builds of one library may round a colour differently.
        assert (found.int() - expected.int()).abs().max() <= 2, name
    cut = Path(tmp_path / "usual.JPEG").read_bytes()[:900]
    for name, content in (("cut", cut), ("none", b"no picture"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is no whole picture"):
            imagenet.read_pixels(str(tmp_path / name))


def test_reading_leaves_the_random_numbers_alone(pictures) -> None:
    data, _ = imagenet.load_splits(parse(pictures), None)
    before = torch.get_rng_state()
    next(iter(data.train))
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_in_training_ends_the_process_and_its_workers(pictures) -> None:
    lines = f"""
import torch
from argparse import Namespace
from pathlib import Path
from alq.data import imagenet
args = Namespace(data=Path({str(pictures)!r}), batch_size=4, workers=1, channels_last=None)
args.device = torch.device("cpu")
batches = iter(imagenet.load_test(args))
next(batches)
raise RuntimeError("out of memory")
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: out of memory\n")


def test_folders_that_do_not_fit_say_how_to_arrange_them(pictures) -> None:
    shutil.rmtree(pictures / "val" / "n10000001")
    with pytest.raises(InputError, match="'n10000001' is in one of them only"):
        imagenet.load_splits(parse(pictures), None)
    for folder in (pictures / "val").iterdir():
        for file in folder.iterdir():
            file.rename(pictures / "val" / file.name)
        folder.rmdir()
    with pytest.raises(InputError, match=r"val is flat, .* per class; .*devkit"):
        imagenet.load_splits(parse(pictures), None)
    shutil.rmtree(pictures / "val")
    with pytest.raises(InputError, match=r"no folder .*val; .* belong into"):
        imagenet.load_splits(parse(pictures), None)


def test_downloaded_weights_are_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"x": torch.ones(2)}, tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]

    def fetch(name: str) -> dict:
        shutil.copy(tmp_path / "weights", tmp_path / name)
        return fetch_weights(f"file://{tmp_path / name}")

    assert torch.equal(fetch(f"net-{digest}.pth")["x"], torch.ones(2))
    with pytest.raises(InputError, match="invalid hash value"):
        fetch("net-0123abcd.pth")
    with pytest.raises(InputError, match="must end in the first digits"):
        fetch("net.pth")
    with pytest.raises(InputError, match="could not be fetched"):
        fetch_weights(f"file://{tmp_path}/absent-0123abcd.pth")


def published_weights(net: str, folder) -> str:
    """A URL of weights in the form of torchvision's, untrained."""
    torch.manual_seed(0)
    torch.save(getattr(torchvision.models, net)().state_dict(), folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8]
    return (folder / "weights").rename(folder / f"{net}-{digest}.pth").as_uri()


def check_run(net: str, model) -> None:
    """Losses finite, bits falling, and the last file holds the network's weights."""
    log = [json.loads(line) for line in model.with_suffix(".jsonl").read_text().splitlines()]
    epochs = [line for line in log if line["event"] == "epoch" and line["stage"] != "pretrain"]
    assert all(math.isfinite(line["loss"]) for line in epochs)
    assert [line["kind"] for line in epochs] == [
        "basis",
        "coordinate",
        "prune",
        "ste",
        "coordinate",
    ]
    bits = [line["bitwidth"] for line in epochs]
    assert bits[0] == bits[1] > bits[2] == bits[3] == bits[4]
    assert epochs[-1]["lr"] == pytest.approx(0.9 * 5e-6)
    final = torch.load(model.with_name("model_posttrained.pth"), weights_only=True)
    network = getattr(torchvision.models, net)()
    network.load_state_dict(final["model"])
    weights = restore(network, final["weights"])
    assert len(weights) == resnet.LAYERS[net]
    assert all(torch.equal(w.parameter, final["model"][w.name]) for w in weights)
    assert network.eval()(torch.zeros(1, 3, 32, 32)).isfinite().all()
    assert F.mse_loss(network.fc.weight, final["model"]["fc.weight"]) == 0


def run(net: str, pictures, *flags: str):
    """resnet.py with short schedules; returns its --model."""
    model = pictures.with_name("model.pth")
    files = ["--model_ori", str(pictures.with_name("ori.pth")), "--model", str(model)]
    resnet.main(["--net", net, "--data", str(pictures), *files, *SHORT, *flags])
    return model


def test_three_stages_of_resnet18_in_three_commands(pictures) -> None:
    for stage in ("--PRETRAIN", "--ALQ", "--POSTTRAIN"):
        model = run("resnet18", pictures, stage)
    check_run("resnet18", model)


def test_three_stages_of_resnet34_from_downloaded_weights(pictures, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(pictures.parent / "hub"))
    url = published_weights("resnet34", pictures.parent)
    stages = ["--PRETRAIN", "--DOWNLOAD", "--ALQ", "--POSTTRAIN"]
    check_run("resnet34", run("resnet34", pictures, *stages, "--model_ori_urls", url))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_a_basis_step_of_resnet34_at_8_bits_takes_under_a_gigabyte() -> None:
    script = str(Path(__file__).with_name("memory.py"))
    command = [sys.executable, script, "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r", the step (\d+) MB", done.stdout)[1]) < 1000


def test_a_wrong_network_or_flag_is_refused(pictures, capsys) -> None:
    with pytest.raises(SystemExit):
        run("resnet18", pictures, "--ALQ", "--DOWNLOAD")
    assert "--DOWNLOAD goes with --PRETRAIN" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resnet.main(["--net", "resnet50", "--ALQ"])
    assert "--net: invalid choice: 'resnet50'" in capsys.readouterr().err
