"""VGG on CIFAR-10's file format: the network, the augmentation, the three stages."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from torch.nn import functional as F
from torchvision import datasets, transforms

import vgg
from alq.data.cifar import SETS, load_splits, read_cifar
from alq.data.loaders import CropFlip, TensorLoader
from alq.errors import InputError
from alq.method.network import quantizable, restore
from narrow import narrow_vgg, prepare_vgg
from small_sets import write_cifar10

# A schedule of seconds: one or two batches an epoch, one epoch of everything.
SHORT = shlex.split(
    "--batch_size 32 --val_size 20 --epoch_pretrain 2 --milestones_pretrain --lr_pretrain 1e-3 "
    "--R 2 --epoch_basis 1 --epoch_coord 1 --pr 0.4 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1 "
    "--max_bit 3 --device cpu"
)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with the archive of a small set, taken for CIFAR-10; and a narrow network."""
    write_cifar10(tmp_path, 84)
    prepare_vgg(tmp_path, monkeypatch.setattr)
    return tmp_path


def log_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_network_is_that_of_the_paper() -> None:
    weights = quantizable(vgg.VGG())
    assert sum(w.numel() for w in weights.values()) == 14_022_016  # 56.09 MB
    pair = ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"]
    kinds = [*pair * 3, "Flatten", *["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear"]
    assert [type(layer).__name__ for layer in vgg.VGG()] == kinds
    assert len(weights) == len(vgg.DEFAULTS["structure"]) == len(vgg.DEFAULTS["subc"])


def test_files_in_cifar10s_format_are_read(cifar) -> None:
    (images, labels), (test_images, test_labels) = read_cifar(cifar)
    assert images.shape == (84, 3, 32, 32) and images.dtype == torch.uint8
    assert test_images.shape == (16, 3, 32, 32)
    assert labels.dtype == torch.int64 and len(test_labels) == 16
    picture, label = datasets.CIFAR10(cifar)[5]
    assert torch.equal(transforms.functional.pil_to_tensor(picture), images[5])
    assert label == labels[5]


def test_without_data_the_error_says_where_the_archive_belongs(tmp_path, monkeypatch) -> None:
    def no_network(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"put cifar-10-python.tar.gz from https://.* into "):
        read_cifar(tmp_path)


def test_a_half_downloaded_archive_is_refused(cifar, monkeypatch) -> None:
    archive = cifar / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-1000])

    def no_network(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match="no intact CIFAR-10"):
        read_cifar(cifar)


def test_a_cut_and_flip_is_torchvisions() -> None:
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8)
    draws = CropFlip().draw(50, torch.Generator().manual_seed(0))
    changed = CropFlip()(images, draws)
    for image, (top, left, mirror), result in zip(images, draws.tolist(), changed, strict=True):
        cut = transforms.functional.crop(F.pad(image, [4] * 4), top, left, 32, 32)
        assert torch.equal(result, transforms.functional.hflip(cut) if mirror else cut)


def test_augmentation_has_torchvisions_distribution() -> None:
    """Every image on its own takes one of the 9 x 9 x 2 results, as torchvision's classes do."""
    count, kinds = 16200, 162
    place = torch.arange(32, dtype=torch.uint8).expand(32, 32)
    image = torch.stack([place.T, place])  # (2, 32, 32): every pixel holds its row and column
    torch.manual_seed(0)
    both = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()])
    theirs = torch.stack([both(image) for _ in range(count)])
    draws = CropFlip().draw(count, torch.Generator().manual_seed(0))
    ours = CropFlip()(image.expand(count, -1, -1, -1), draws)

    def frequencies(pictures: torch.Tensor) -> torch.Tensor:
        row, left, right = (pictures[:, c, 16, x].long() for c, x in ((0, 16), (1, 15), (1, 16)))
        mirrored = (left > right).long()
        kind = (row - 12) * 18 + (torch.minimum(left, right) - 11) * 2 + mirrored
        return torch.bincount(kind, minlength=kinds).double()

    for found in (frequencies(theirs), frequencies(ours)):
        assert len(found) == kinds and found.sum() == count
        chi_square = ((found - count / kinds) ** 2 / (count / kinds)).sum()
        assert chi_square < 232  # 161 degrees of freedom: exceeded once in 5000
    # Neighbours in a batch are independent: equal draws as often as chance has it.
    same = (draws[1:] == draws[:-1]).all(1).float().mean()
    assert same == pytest.approx(1 / kinds, abs=0.003)


def test_only_training_images_change_and_only_with_seed_and_epoch(cifar) -> None:
    args = vgg.command_line().parse_args(["--data", str(cifar), *SHORT])
    data, val_indices = load_splits(args, None)
    images = read_cifar(cifar)[0][0]
    kind = SETS["cifar10"]
    plain = TensorLoader(images[val_indices], val_indices, 1000, kind.mean, kind.std)
    for epoch in (0, 1):
        data.val.set_epoch(epoch)
        assert torch.equal(next(iter(data.val))[0], next(iter(plain))[0])

    def epoch_of(number: int) -> torch.Tensor:
        data.train.set_epoch(number)
        torch.rand(3)  # what else the run draws has no influence
        return torch.cat([x for x, _ in data.train])

    assert torch.equal(epoch_of(3), epoch_of(3))
    assert not torch.equal(epoch_of(3), epoch_of(4))


def test_three_stages_in_three_commands(cifar, capsys) -> None:
    """Each stage starts from the files of the one before."""
    model_ori, model = cifar / "ori.pth", cifar / "model.pth"
    files = ["--data", str(cifar), "--model_ori", str(model_ori), "--model", str(model)]
    for stage in ("--PRETRAIN", "--ALQ", "--POSTTRAIN"):
        vgg.main([stage, *files, *SHORT])
    log = log_of(model.with_suffix(".jsonl"))
    epochs = [line for line in log if line["event"] == "epoch"]
    assert all(line["loss"] < 10 for line in epochs)
    kinds = [line["kind"] for line in epochs]
    assert kinds == [*["pretrain"] * 2, *["basis", "coordinate", "prune"] * 2, "ste", "coordinate"]
    bits = [line["bitwidth"] for line in epochs if line["stage"] != "pretrain"]
    assert bits[0] == bits[1] > bits[2] == bits[3] == bits[4] > bits[5] == bits[6]
    final = torch.load(model.with_name("model_posttrained.pth"), weights_only=True)
    network = narrow_vgg()
    network.load_state_dict(final["model"])
    weights = restore(network, final["weights"])
    assert all(torch.equal(w.parameter.cpu(), final["model"][w.name]) for w in weights)
    assert "published (paper)" in capsys.readouterr().out


def test_a_last_batch_of_one_picture_is_refused_before_any_work(cifar, capsys) -> None:
    files = ["--data", str(cifar), "--model", str(cifar / "model.pth"), *SHORT]
    with pytest.raises(SystemExit):
        vgg.main(["--PRETRAIN", *files, "--batch_size", "63"])  # of 64
    error = capsys.readouterr().err
    assert "--batch_size 63: of 64 training images the last batch has 1" in error
    assert "use --batch_size 62 (" in error and error.count("\n") == 1


def test_precision_and_compile_flags(cifar, monkeypatch, compiler) -> None:
    """bfloat16 stays within the network, of which every stage compiles its own."""
    compiled: list[torch.nn.Module] = []  # only noted: compiling takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net))
    files = ["--data", str(cifar), "--model_ori", str(cifar / "ori"), "--model", str(cifar / "m")]
    vgg.main(["--PRETRAIN", "--ALQ", *files, *SHORT, "--amp", "--compile"])
    source, final = (torch.load(cifar / name, weights_only=True) for name in ("ori", "m"))
    assert len(compiled) == 2
    assert all(w["alpha"].dtype == torch.float32 for w in final["weights"])
    for state in (source["model"], final["model"]):
        assert list(state) == list(narrow_vgg().state_dict())
        assert {v.dtype for k, v in state.items() if "num_batches" not in k} == {torch.float32}
