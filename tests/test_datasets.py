"""Fashion-MNIST and CIFAR-100 through the scripts; files know their data set and refuse another."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import datasets

import alq
import few_digits
import lenet5
import vgg
from alq.__main__ import main
from alq.command.info import inspect
from alq.command.resume import plain_state
from alq.data import cifar, mnist, read_mnist
from alq.data.cifar import read_cifar
from alq.errors import InputError
from alq.files import packed
from alq.files.checkpoint import load_checkpoint, save_checkpoint
from narrow import narrow_vgg, prepare_vgg
from small_sets import write_cifar10, write_cifar100

ROOT = Path(__file__).resolve().parents[1]
FASHION = ROOT / "tests" / "fashion_mnist"  # the first pictures of the real one
PUBLISHED = ROOT / "checkpoints" / "published"
SHORT = shlex.split(
    "--val_size 20 --batch_size 20 --epoch_pretrain 1 --milestones_pretrain --R 1 --epoch_basis 1 "
    "--epoch_coord 1 --epoch_ste 1 --epoch_post_coord 1 --top_k 0.5 --max_bit 2 --threads 1 "
    "--device cpu"
)
STAGES = ("--PRETRAIN", "--ALQ", "--POSTTRAIN")
FASHION_FLAGS = ["--dataset", "fashion_mnist", "--data", str(FASHION)]


def take_as_whole(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the Fashion-MNIST in `folder` have the right checksums."""
    raw = folder / "FashionMNIST" / "raw"
    contents = (gzip.decompress((raw / f"{name}.gz").read_bytes()) for name in mnist.FILES)
    sums = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    patch.setitem(mnist.SHA256, "fashion_mnist", sums)


@pytest.fixture
def fashion(monkeypatch) -> None:
    take_as_whole(FASHION, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Where all stages were run on Fashion-MNIST, from there, and so by default names."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        take_as_whole(FASHION, patch)
        patch.chdir(folder)
        lenet5.main([*STAGES, *SHORT, *FASHION_FLAGS])
    return folder / "checkpoints"


def refusal(capsys, script, *flags: object) -> str:
    """What a command says that is refused in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([*SHORT, *map(str, flags)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said


# ---------------------------------------------------------------------------- reading


def test_the_pictures_are_those_that_torchvision_reads(fashion, tmp_path) -> None:
    """Packed, unpacked or some of each; and nothing is written."""
    raw = FASHION / "FashionMNIST" / "raw"
    before = sorted(raw.iterdir())
    read = read_mnist(FASHION, "fashion_mnist")
    assert sorted(raw.iterdir()) == before
    target = tmp_path / "FashionMNIST" / "raw"
    target.mkdir(parents=True)
    for name in mnist.FILES:
        (target / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
    theirs = [datasets.FashionMNIST(tmp_path, train=train) for train in (True, False)]
    shutil.copy(raw / "t10k-labels-idx1-ubyte.gz", target)
    (target / "t10k-labels-idx1-ubyte").unlink()
    for sets in (read, read_mnist(tmp_path, "fashion_mnist")):
        for (images, labels), data in zip(sets, theirs, strict=True):
            assert images.dtype == torch.uint8 and labels.dtype == torch.int64
            assert torch.equal(images, data.data.unsqueeze(1)) and torch.equal(labels, data.targets)
    assert [len(data) for data in theirs] == [60, 20]


@pytest.mark.parametrize("name", mnist.SETS)
def test_mean_and_deviation_are_those_of_the_training_pixels(name) -> None:
    kind = mnist.SETS[name]
    if not (ROOT / "data" / kind.source.__name__).exists():
        pytest.skip(f"{kind.title} is not in data/")
    (images, labels), (_, test_labels) = read_mnist(ROOT / "data", name)
    pixels = images.double() / 255
    assert (round(float(pixels.mean()), 4),) == kind.mean
    assert (round(float(pixels.std()), 4),) == kind.std
    for found in (labels, test_labels):
        assert found.unique().tolist() == list(range(kind.classes))


def test_pictures_are_normalised_with_the_mean_and_deviation_of_their_set(fashion) -> None:
    args = lenet5.command_line("fashion_mnist").parse_args([*SHORT, *FASHION_FLAGS])
    images = read_mnist(FASHION, "fashion_mnist")[1][0]
    x, _ = next(iter(mnist.load_test(args)))
    kind = mnist.SETS["fashion_mnist"]
    assert torch.allclose(x, (images / 255 - kind.mean[0]) / kind.std[0], atol=1e-5)


def test_a_changed_picture_is_found(fashion, tmp_path) -> None:
    shutil.copytree(FASHION, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz is damaged.*delete it"):
        read_mnist(tmp_path, "fashion_mnist")
    shutil.copytree(FASHION / "FashionMNIST", tmp_path / "MNIST")  # nor are they MNIST's
    with pytest.raises(InputError, match=r"MNIST/raw/train-images.* is damaged \(SHA-256"):
        read_mnist(tmp_path)


@pytest.mark.parametrize(
    ("script", "module", "dataset", "parts"),
    [
        (
            lenet5,
            datasets.mnist,
            "fashion_mnist",
            ["no Fashion-MNIST in data/FashionMNIST/raw", "Put the four .gz files of http"],
        ),
        (
            vgg,
            datasets.cifar,
            "cifar100",
            ["no intact CIFAR-100 in data/", "put cifar-100-python.tar.gz from https"],
        ),
    ],
)
def test_without_data_and_network_the_error_says_what_to_put_where(
    script, module, dataset, parts, tmp_path, monkeypatch, capsys
) -> None:
    def no_network(*_arguments: object, **_named: object) -> None:
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    (tmp_path / "data").mkdir()
    said = refusal(capsys, script, "--PRETRAIN", "--dataset", dataset)
    assert "--data data: " in said and all(part in said for part in parts), said
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


# ---------------------------------------------------------------------------- Fashion-MNIST


def test_three_stages_by_default_names(finished) -> None:
    """The paper's network is neither read nor overwritten."""
    names = ["model.jsonl", "model.pth", "model_ori.pth"]
    names += ["model_posttrained.alq", "model_posttrained.pth"]
    assert sorted(path.name for path in finished.iterdir()) == [
        f"lenet5_fashion_mnist_{name}" for name in names
    ]
    log = (finished / "lenet5_fashion_mnist_model.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    assert (first["event"], first["net"], first["dataset"]) == ("start", "lenet5", "fashion_mnist")
    assert [json.loads(line)["stage"] for line in log if '"event": "result"' in line] == [
        *("pretrain", "alq", "posttrain"),
    ]
    for path in finished.glob("*.pth"):
        assert load_checkpoint(path, "lenet5")["dataset"] == "fashion_mnist"
    for path in [*finished.glob("*.pth"), *finished.glob("*.alq")]:
        assert inspect(path)["dataset"] == "fashion_mnist"


def test_help_shows_the_names_that_go_with_the_data_set(capsys) -> None:
    for flags, model in (([], "lenet5_model.pth"), (FASHION_FLAGS, "lenet5_fashion_mnist_model")):
        with pytest.raises(SystemExit):
            lenet5.main(["-h", *flags])
        shown = "".join(capsys.readouterr().out.split())
        assert f"(default:checkpoints/{model}" in shown


def test_a_name_that_is_given_is_taken(fashion, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lenet5.main(["--PRETRAIN", *SHORT, "--model_ori", "x.pth", *FASHION_FLAGS])
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        *("lenet5_fashion_mnist_model.jsonl", "x.pth"),
    ]


def test_the_papers_row_is_not_shown_beside_other_data(finished, fashion, capsys) -> None:
    small = finished / "lenet5_fashion_mnist_model_posttrained.alq"
    lenet5.main(["--EVAL", str(small), *FASHION_FLAGS])
    printed = capsys.readouterr().out
    assert "after packing" in printed and "published" not in printed
    main(["info", str(small)])
    main(["info", str(finished / "lenet5_fashion_mnist_model_ori.pth")])
    assert capsys.readouterr().out.count("trained on fashion_mnist") == 2


# ---------------------------------------------------------------------------- another data set


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--EVAL", "{}_posttrained.alq"], "--EVAL"),
        (["--ALQ", "--model_ori", "{}_ori.pth", "--model", "x.pth"], "--model_ori"),
        (["--POSTTRAIN", "--model", "{}.pth"], "--model"),
        (["--POSTTRAIN", "--model", "{}_posttrained.pth"], "--model"),
        (["--ALQ", "--resume", "--model_ori", "{}_ori.pth", "--model", "{}.pth"], "--resume"),
    ],
)
def test_files_of_another_data_set_are_refused(
    finished, tmp_path, monkeypatch, capsys, flags, named
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    model = str(copy / "lenet5_fashion_mnist_model")
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    flags = [flag.replace("{}", model) for flag in flags]
    said = refusal(capsys, lenet5, *flags, "--data", ROOT / "data")
    assert f"error: {named}" in said and model in said
    assert "is of data set fashion_mnist, not mnist; give --dataset fashion_mnist" in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_an_interrupted_run_goes_on_with_its_own_data_alone(
    finished, fashion, tmp_path, monkeypatch, capsys
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    source = finished / "lenet5_fashion_mnist_model_ori.pth"
    flags = ["--ALQ", "--model_ori", str(source), "--model", str(tmp_path / "model.pth")]
    with monkeypatch.context() as patch:
        patch.setattr("alq.training.loop.evaluate", interrupted)
        with pytest.raises(SystemExit):
            lenet5.main([*flags, *SHORT, *FASHION_FLAGS])
    point = tmp_path / "model.resume"
    said = refusal(capsys, lenet5, *flags, "--resume", "--data", ROOT / "data")
    assert f"--resume: {point}: is of data set fashion_mnist, not mnist; give --dataset" in said
    lenet5.main([*flags, *SHORT, *FASHION_FLAGS, "--resume"])
    states = [load_checkpoint(path, "lenet5") for path in (
        finished / "lenet5_fashion_mnist_model.pth", tmp_path / "model.pth")]  # fmt: skip
    assert all(torch.equal(x, states[1]["model"][name]) for name, x in states[0]["model"].items())


# ---------------------------------------------------------------------------- no data set recorded


def test_files_without_a_record_are_refused_for_other_data(tmp_path, capsys) -> None:
    small, full = PUBLISHED / "lenet5.alq", PUBLISHED / "lenet5_model_ori.pth"
    assert inspect(small)["dataset"] is None and inspect(full)["dataset"] is None
    main(["info", str(small)])
    assert "trained on" not in capsys.readouterr().out
    own = ["--model", tmp_path / "x.pth", *FASHION_FLAGS]
    said = refusal(capsys, lenet5, "--EVAL", small, *own)
    assert f"--EVAL {small}: is of data set mnist, not fashion_mnist; give --dataset mnist" in said
    said = refusal(capsys, lenet5, "--ALQ", "--model_ori", full, *own)
    assert f"--model_ori {full}: is of data set mnist, not fashion_mnist" in said


def test_files_without_a_record_are_taken_for_the_papers_data(
    finished, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(mnist, "read_mnist", few_digits.few(60, mnist.read_mnist))
    data = ["--data", str(ROOT / "data")]
    lenet5.main(["--EVAL", str(PUBLISHED / "lenet5.alq"), *data])
    assert "published (paper)" in capsys.readouterr().out
    content = load_checkpoint(finished / "lenet5_fashion_mnist_model.pth", "lenet5")
    del content["dataset"], content["flags"]["dataset"]
    save_checkpoint(tmp_path / "model.pth", content)
    short = [*SHORT, "--epoch_ste", "0", "--epoch_post_coord", "0"]
    lenet5.main(["--POSTTRAIN", *short, "--model", str(tmp_path / "model.pth"), *data])
    assert inspect(tmp_path / "model_posttrained.alq")["dataset"] == "mnist"
    # Nor is such a run refused as one that was asked for otherwise.
    names = ["--model_ori", str(tmp_path / "moved.pth"), "--model", str(tmp_path / "model.pth")]
    lenet5.main(["--ALQ", "--resume", *SHORT, *data, *names])
    assert "nothing to resume" in capsys.readouterr().err


def test_a_record_is_all_that_it_adds_to_a_packed_file(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    weights = alq.quantize(model, max_bit=2)
    names = {}
    for dataset in (None, "pictures"):
        alq.save_packed(tmp_path / "x.alq", model, weights, dataset=dataset)
        tensors = packed.decode_container((tmp_path / "x.alq").read_bytes(), "x.alq")
        names[dataset] = packed.inflate_json(tensors["names"])
        found = packed.read_packed(tmp_path / "x.alq")
        assert found.dataset == dataset and len(found.weights) == 2
    assert list(names[None]) == ["layers", "rest"]
    assert names["pictures"] == {**names[None], "dataset": "pictures"}


def test_a_record_that_is_no_name_is_refused(tmp_path) -> None:
    model = nn.Linear(64, 2)
    path = tmp_path / "x.alq"
    alq.save_packed(path, model, alq.quantize(model))
    tensors = packed.decode_container(path.read_bytes(), path)
    names = packed.inflate_json(tensors["names"])
    for wrong in (5, ["mnist"], {}):
        tensors["names"] = packed.deflate_json({**names, "dataset": wrong})
        path.write_bytes(packed.encode_container(tensors))
        with pytest.raises(InputError, match="its data set is no name"):
            packed.read_packed(path)
    content = {"net": "n", "model": plain_state(model)}
    save_checkpoint(tmp_path / "x.pth", {**content, "dataset": 5})
    with pytest.raises(InputError, match="its 'dataset' is missing or of no use"):
        load_checkpoint(tmp_path / "x.pth", "n")


# ---------------------------------------------------------------------------- CIFAR-100


@pytest.fixture
def cifar100(tmp_path, monkeypatch) -> Path:
    """A folder with the archive of a small set, taken for CIFAR-100; and a narrow network."""
    write_cifar100(tmp_path, 84)
    prepare_vgg(tmp_path, monkeypatch.setattr, datasets.CIFAR100)
    return tmp_path


def test_the_fine_labels_of_cifar100_are_read(cifar100) -> None:
    (images, labels), (test_images, test_labels) = read_cifar(cifar100, "cifar100")
    assert images.shape == (84, 3, 32, 32) and test_images.shape == (16, 3, 32, 32)
    for (pictures, found), train in (((images, labels), True), ((test_images, test_labels), False)):
        theirs = datasets.CIFAR100(cifar100, train=train)
        assert found.tolist() == theirs.targets
        assert torch.equal(pictures.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
    assert labels.max() > 9  # which ten classes are too few for


def test_three_stages_on_cifar100(cifar100, capsys) -> None:
    files = ["--model_ori", cifar100 / "ori.pth", "--model", cifar100 / "model.pth"]
    flags = [*map(str, files), "--data", str(cifar100), "--dataset", "cifar100", *SHORT]
    flags += ["--lr_pretrain", "1e-3", "--batch_size", "32"]
    for stage in STAGES:
        vgg.main([stage, *flags])
    assert "published" not in capsys.readouterr().out
    model = narrow_vgg(classes=100)
    assert model[-1].out_features == cifar.SETS["cifar100"].classes == 100
    alq.load_packed(cifar100 / "model_posttrained.alq", model)
    content = load_checkpoint(cifar100 / "model_posttrained.pth", "vgg")
    assert all(torch.equal(x, content["model"][k]) for k, x in model.state_dict().items())
    vgg.main(["--EVAL", str(cifar100 / "model_posttrained.alq"), *flags])
    said = refusal(capsys, vgg, "--ALQ", *files, "--data", cifar100)
    assert re.search("ori.pth: is of data set cifar100, not cifar10; give --dataset cifar100", said)


def test_a_network_of_cifar10_is_refused_for_cifar100(cifar100, monkeypatch, capsys) -> None:
    write_cifar10(cifar100, 84)
    prepare_vgg(cifar100, monkeypatch.setattr)
    files = ["--model_ori", cifar100 / "ori.pth", "--model", cifar100 / "model.pth"]
    files += ["--data", cifar100, "--batch_size", "32"]
    vgg.main([*SHORT, "--PRETRAIN", *map(str, files)])
    said = refusal(capsys, vgg, "--ALQ", *files, "--dataset", "cifar100")
    assert "ori.pth: is of data set cifar10, not cifar100; give --dataset cifar10" in said
