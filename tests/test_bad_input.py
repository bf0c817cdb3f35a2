# ruff: noqa: E501 (a table)
"""Bad input through the real scripts: one line that names flag, value and remedy; nothing is done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision import datasets

import lenet5
import resnet
import vgg
from alq.command.resume import plain_state
from alq.data import mnist
from alq.files.checkpoint import save_checkpoint
from small_sets import write_imagenet

ROOT = Path(__file__).resolve().parent.parent
DATA = ["--data", str(ROOT / "data")]
SCRIPTS = {"lenet5": lenet5.main, "vgg": vgg.main, "resnet": resnet.main}

# (script, flags, parts of the message). {} stands for a folder that holds
#   file              a file of text
#   ori.pth           LeNet5's full-precision checkpoint
#   vgg.pth           VGG's name on LeNet5's weights
#   thin.pth          LeNet5's name on other weights
#   point.pth         a resume point of LeNet5's pretraining
#   half/ empty/ flat/ torn/   data that is no good
NUMBERS = {
    "--lr": ("0", "-1", "nan", "inf", "1e400", "x", ""),
    "--R": ("0", "-1", "1.5", "1000000"),
    "--pr": ("0", "1.1", "nan"),
    "--top_k": ("0", "2", "-0.1"),
    "--wd": ("-1", "nan", "inf"),
    "--val_size": ("0", "-5", "1e3"),
    "--batch_size": ("0", "-1", "many"),
    "--epoch_pretrain": ("0", "-1"),
    "--lr_pretrain": ("0", "inf"),
    "--ld_pretrain": ("0", "1.5"),
    "--warmup_pretrain": ("-1",),
    "--milestones_pretrain": ("-3", "x"),
    "--epoch_prune": ("0",),
    "--epoch_basis": ("-1",),
    "--epoch_coord": ("-1",),
    "--epoch_ste": ("-1", "nan"),
    "--epoch_post_coord": ("-1",),
    "--ld_basis": ("0", "2"),
    "--ld_coord": ("0", "nan"),
    "--ld_ste": ("1.01",),
    "--ld_post_coord": ("-0.5",),
    "--lr_post_coord": ("0",),
    "--target_bit": ("0", "-1", "nan"),
    "--target_kb": ("0", "inf"),
    "--file_kb": ("0", "inf"),
    "--max_bit": ("0", "9", "2.5"),
    "--subc": ("-1", "x"),
    "--seed": ("-1", "99999999999999999999", "x"),
    "--threads": ("0", "1000000"),
    "--save_every": ("-1", "nan"),
    "--structure": ("rowwise",),
    "--device": ("cuda:77", "meta", "gpu", ""),
    "--model": ("", "..", "x" * 300),
}
OUT_OF_RANGE = [
    ("lenet5", ["--PRETRAIN", f"{flag}={value}"], [f"{flag}: ", value[:20]])
    for flag, values in NUMBERS.items()
    for value in values
]
ODD = [
    ("lenet5", [], ["nothing to do", "--PRETRAIN"]),
    ("lenet5", ["--PRETRAIN", "--epoch_basics", "3"], ["unrecognized arguments: --epoch_basics"]),
    ("lenet5", ["--PRETRAIN", "--see", "3"], ["unrecognized arguments: --see"]),
    ("lenet5", ["--PRETRAIN", "--lr"], ["--lr: expected one argument"]),
    ("lenet5", ["--ALQ", "--EVAL", "x.alq"], ["--EVAL x.alq", "without --ALQ"]),
    ("lenet5", ["--EVAL", "x.alq", "--resume"], ["--resume: goes with the stages"]),
    ("lenet5", ["--EVAL", "{}/absent.alq"], ["absent.alq cannot be read"]),
    ("lenet5", ["--EVAL", "{}/file"], ["file is not an ALQ packed file"]),
    ("lenet5", ["--PRETRAIN", "--milestones_pretrain", "30", "20"], ["--milestones_pretrain 30 20"]),
    ("lenet5", ["--ALQ", "--target_bit", "1", "--target_kb", "9"], ["--target_bit 1, target_kb 9: give"]),
    ("lenet5", ["--PRETRAIN", "--target_bit", "7"], ["--target_bit 7: the network has 6 bit"]),
    ("lenet5", ["--PRETRAIN", "--target_kb", "5000"], ["--target_kb 5000: the network has 371.6 KB"]),
    ("lenet5", ["--ALQ", "--file_kb", "5"], ["--file_kb: goes with --coded --fold"]),
    ("lenet5", ["--ALQ", "--file_kb", "0.1", "--coded", "--fold"], ["--file_kb 0.1: ", "least"]),
    ("lenet5", ["--ALQ", "--file_kb", "900", "--coded", "--fold"], ["--file_kb 900: the network has"]),
    ("lenet5", ["--PRETRAIN", "--target_bit", "1e-9"], ["--target_bit 1e-09: ", "least"]),
    # lists and layers, before PRETRAIN begins
    ("lenet5", ["--PRETRAIN", "--max_bit", "6", "6"], ["--max_bit: 2 values for 4 ", "one for all"]),
    ("lenet5", ["--PRETRAIN", "--subc", "0", "0", "3", "1"], ["fc1.weight: subc 3", "use one of 1, 2"]),
    ("lenet5", ["--PRETRAIN", "--subc", "0"], ["fc1.weight: subc 0 does not divide"]),
    ("lenet5", ["--PRETRAIN", "--subc", "1", "2", "3"], ["--subc: 3 values for 4 "]),
    ("lenet5", ["--PRETRAIN", "--structure", "pixelwise"], ["fc1.weight: structure 'pixelwise' needs"]),
    ("lenet5", ["--PRETRAIN", "--structure", "pixelwise", "kernelwise"], ["--structure: 2 values"]),
    ("vgg", ["--PRETRAIN", "--structure", "kernelwise"], ["structure 'kernelwise' needs a convolution"]),
    ("vgg", ["--PRETRAIN", "--max_bit", "1", "2"], ["--max_bit: 2 values for 9 "]),
    ("resnet", ["--PRETRAIN", "--subc", "7"], ["fc.weight: subc 7 does not divide", "use one of 1, 2"]),
    ("resnet", ["--PRETRAIN", "--structure", "channelwise"], ["fc.weight: structure 'channelwise'"]),
    ("resnet", ["--PRETRAIN", "--net", "resnet50"], ["--net: invalid choice: 'resnet50'"]),
    ("resnet", ["--ALQ", "--DOWNLOAD"], ["--DOWNLOAD goes with --PRETRAIN"]),
    ("resnet", ["--PRETRAIN", "--workers", "-1"], ["--workers: -1 is out of range"]),
    # files
    ("lenet5", ["--ALQ", "--model_ori", "{}/absent.pth"], ["--model_ori", "no such file", "--PRETRAIN"]),
    ("lenet5", ["--ALQ", "--model_ori", "{}"], ["--model_ori", "is a folder"]),
    ("lenet5", ["--POSTTRAIN"], ["--model ", "no such file; --ALQ makes it"]),
    ("lenet5", ["--PRETRAIN", "--POSTTRAIN"], ["--model ", "no such file; --ALQ makes it"]),
    ("lenet5", ["--ALQ", "--model_ori", "{}/file"], ["file is not a checkpoint"]),
    ("lenet5", ["--ALQ", "--model_ori", "{}/vgg.pth"], ["holds network 'vgg', not 'lenet5'"]),
    ("lenet5", ["--ALQ", "--model_ori", "{}/point.pth"], ["--model_ori", "is a resume point"]),
    ("lenet5", ["--ALQ", "--model_ori", "{}/thin.pth"], ["holds another network: conv1.weight"]),
    ("lenet5", ["--POSTTRAIN", "--model", "{}/ori.pth", "--model_ori", "x"], ["holds what --PRETRAIN saved"]),
    ("lenet5", ["--PRETRAIN", "--model", "{}"], ["--model ", "is a folder"]),
    ("lenet5", ["--PRETRAIN", "--model_ori", "{}"], ["--model_ori ", "is a folder"]),
    ("lenet5", ["--PRETRAIN", "--model", "{}/file/x.pth"], ["--model ", "is no folder"]),
    ("lenet5", ["--PRETRAIN", "--model_ori", "{}/file/a/x.pth"], ["--model_ori ", "is no folder"]),
    ("lenet5", ["--PRETRAIN", "--model", "{}/x.alq"], ["--model ", "packed file's ending"]),
    ("lenet5", ["--PRETRAIN", "--model", "{}/x.jsonl"], ["--model ", "would be one file"]),
    ("lenet5", ["--PRETRAIN", "--model", "{}/a/../ori.pth"], ["--model_ori", "would be one file"]),
    ("lenet5", ["--PRETRAIN", "--model_ori", "{}/model_posttrained.pth"], ["would be one file"]),
    # data
    ("lenet5", ["--PRETRAIN", "--val_size", "60000"], ["--val_size 60000: ", "use 1 to 59999"]),
    ("lenet5", ["--PRETRAIN", "--ALQ", "--top_k", "1e-5"], ["--top_k 1e-05: too few", "or more"]),
    ("lenet5", ["--PRETRAIN", "--data", "{}/half"], ["--data", "is damaged or half downloaded", "delete it"]),
    ("lenet5", ["--PRETRAIN", "--data", "{}/torn"], ["torn", "is damaged", "delete it"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/absent"], ["--data ", "no folder", "belong into"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/file"], ["--data ", "no folder"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/empty"], ["--data ", "needs a sub-folder per class"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/flat"], ["--data ", "needs a sub-folder per class"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/hollow"], ["--data ", "Found no valid file"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/good"], ["--val_size 50000: ", "use 1 to 19"]),
    ("resnet", ["--PRETRAIN", "--data", "{}/text", "--val_size", "4"], ["is no whole picture"]),
]  # fmt: skip

CASES = OUT_OF_RANGE + ODD


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of files and data that are no good."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").write_text("text")
    content = {"stage": "pretrain", "finished": True, "weights": [], "top1_fp": 9.0}
    content["val_indices"] = torch.arange(10000)
    state = plain_state(lenet5.LeNet5())
    save_checkpoint(folder / "ori.pth", {"net": "lenet5", "model": state, **content})
    point = {"net": "lenet5", "model": state, "target": "model_ori", **content}
    save_checkpoint(folder / "point.pth", point)
    save_checkpoint(folder / "vgg.pth", {"net": "vgg", "model": state, **content})
    thin = {"conv1.weight": torch.zeros(2, 1, 5, 5)}
    save_checkpoint(folder / "thin.pth", {"net": "lenet5", "model": thin, **content})
    raw = ROOT / "data" / "MNIST" / "raw"
    for kind in ("half", "torn"):
        (folder / kind / "MNIST" / "raw").mkdir(parents=True)
        for source in raw.glob("*.gz"):
            target = folder / kind / "MNIST" / "raw" / source.name
            shutil.copy(source, target)
            if kind == "half" and "labels" in source.name:
                target.write_bytes(source.read_bytes()[:1000])
            elif kind == "torn":
                target.with_suffix("").write_bytes(b"torn")
    for kind in ("empty", "flat", "hollow"):
        for part in ("train", "val"):
            (folder / kind / part).mkdir(parents=True)
    for part in ("train", "val"):
        (folder / "flat" / part / "x.JPEG").write_text("x")
        (folder / "hollow" / part / "n10000000").mkdir()
    write_imagenet(folder / "good", 20, classes=2)
    write_imagenet(folder / "text", 20, classes=2)
    for picture in (folder / "text" / "train").rglob("*.JPEG"):
        picture.write_text("text")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def mark(case: tuple) -> str:
    return " ".join([case[0], *case[1]])[:80]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("script", "flags", "parts"), CASES, ids=map(mark, CASES))
def test_bad_input_is_refused_before_any_work(
    script, flags, parts, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = [flag.replace("{}", str(place)) for flag in flags]
    files = ["--model_ori", str(place / "ori.pth"), "--model", str(place / "model.pth")]
    data = [] if script == "resnet" else DATA
    workers = ["--workers", "0"] if script == "resnet" else []
    before = names(place)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script]([*data, *workers, *files, *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.count("\n") == 1 and "Traceback" not in said
    for part in parts:
        assert part in said
    assert names(place) == before and not names(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_as_a_process(script, tmp_path) -> None:
    command = [sys.executable, str(ROOT / f"{script}.py"), "--PRETRAIN", "--pr", "nan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"{script}.py: error: argument --pr: nan is out of range; it must"
    )
    assert not names(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_folder_that_may_not_be_written_to(tmp_path, capsys) -> None:
    folder = tmp_path / "read_only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(SystemExit) as stop:
            lenet5.main(["--PRETRAIN", *DATA, "--model", str(folder / "x.pth")])
        assert stop.value.code == 2
        assert f"{folder} may not be written to; name another" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", folder], check=True)


def test_labels_and_pictures_that_do_not_fit_the_network(tmp_path, monkeypatch, capsys) -> None:
    """Data sets with checksums cannot hold such; others might."""
    monkeypatch.chdir(tmp_path)
    pictures, labels = torch.zeros(40, 1, 28, 28, dtype=torch.uint8), torch.arange(40) % 10
    for message, sets in {
        "--data .*: has labels 0 to 12, but the network tells 0 to 9 apart": (
            pictures,
            torch.arange(40) % 13,
        ),
        "--data .*: has labels -1 to 8": (pictures, labels - 1),
        r"--data .*: pictures of shape \(1, 32, 32\) do not fit": (
            torch.zeros(40, 1, 32, 32, dtype=torch.uint8),
            labels,
        ),
    }.items():
        monkeypatch.setattr(mnist, "read_mnist", lambda *_, sets=sets: (sets, sets))
        with pytest.raises(SystemExit) as stop:
            lenet5.main(["--PRETRAIN", "--val_size", "8"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(message, said), said
        assert not names(tmp_path)


@pytest.mark.parametrize(
    ("script", "module", "remedy"),
    [("lenet5", datasets.mnist, "Use --data {data}, which"), ("vgg", datasets.cifar, "into data")],
)
def test_data_that_cannot_be_downloaded(
    script, module, remedy, tmp_path, monkeypatch, capsys
) -> None:
    """Started from another folder, it names the data that the project carries, and leaves none."""

    def no_network(*arguments: object, **named: object) -> None:
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script](["--PRETRAIN"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "--data data: no " in said and remedy.format(data=ROOT / "data") in said
    assert not names(tmp_path)
