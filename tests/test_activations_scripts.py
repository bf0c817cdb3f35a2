"""Activations in binary bases through the scripts, their files and `fit`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

import alq
import alq.command.resume
import few_digits
import lenet5
import resnet
import vgg
from alq.__main__ import main as alq_main
from alq.command.operations import places
from alq.errors import InputError
from alq.files.packed import read_packed
from alq.method.network import quantizable
from alq.method.quantized_inputs import activations_in
from narrow import RESNET_FLAGS, prepare_resnet, prepare_vgg
from networks import NETWORKS
from small_sets import write_cifar10, write_imagenet
from test_cli import ROOT, assert_equal_checkpoints, events, files, load, run
from test_parallel import torchrun

ALL = ("--PRETRAIN", "--ALQ", "--POSTTRAIN")
NAMES = ("ori.pth", "model.pth", "model_posttrained.pth")
FED = ["conv2", "fc1", "fc2"]


def activations_of(path: Path) -> dict[str, int]:
    """Bits by layer in a checkpoint."""
    state = load(path)["model"]
    return {k.split(".")[0]: len(v) for k, v in state.items() if k.endswith("binary_input.gamma")}


@pytest.fixture(scope="module")
def quantized(sliver, tmp_path_factory) -> Path:
    """All three stages with activations of 2 bit from the second on."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, *ALL, "--act_bit", "2")
    return folder


def test_the_stages_pass_the_activations_on(quantized, capsys) -> None:
    assert [list(activations_of(quantized / name)) for name in NAMES] == [[], FED, FED]
    assert [event.get("act_bit") for event in events(quantized, "result")] == [None, 2, 2]
    assert events(quantized, "start")[0]["flags"]["act_bit"] == 2
    state = load(quantized / "model_posttrained.pth")["model"]
    for layer in FED:
        assert (state[f"{layer}.binary_input.gamma"] > 0).all()
        assert state[f"{layer}.binary_input.lowest"] == 0


def test_the_packed_file_brings_its_activations_along(quantized, capsys) -> None:
    packed = quantized / "model_posttrained.alq"
    capsys.readouterr()
    lenet5.main(["--EVAL", str(packed)])
    printed = capsys.readouterr().out
    top1 = events(quantized, "result")[-1]["top1"]
    assert "activations: 2 bit into 3 layers, float into conv1" in printed
    assert f"{top1:.2f}" in printed

    model, x = lenet5.LeNet5().eval(), torch.randn(5, 1, 28, 28)
    alq.load_packed(packed, model)
    y = model(x)
    twin = lenet5.LeNet5().eval()
    alq.quantize_activations(twin, 2)
    alq.load_packed(packed, twin)
    assert torch.equal(twin(x), y) and len(activations_in(model)) == 3
    again = quantized / "again.alq"
    alq.save_packed(again, model, alq.load_packed(packed, model), dataset="mnist")
    assert again.read_bytes() == packed.read_bytes()


def test_a_packed_file_that_does_not_fit_changes_nothing(quantized, tmp_path) -> None:
    packed = quantized / "model_posttrained.alq"
    other = lenet5.LeNet5()
    alq.quantize_activations(other, 3)
    with pytest.raises(InputError, match=r"conv2.binary_input.gamma is float32 \(2,\) in the file"):
        alq.load_packed(packed, other)
    plain = lenet5.LeNet5()
    alq.save_packed(tmp_path / "plain.alq", plain, alq.quantize(plain))
    with pytest.raises(InputError, match=r"conv2.binary_input.gamma is absent in the file"):
        alq.load_packed(tmp_path / "plain.alq", other)
    narrow = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(InputError, match="another network"):
        alq.load_packed(packed, narrow)
    assert not activations_in(narrow)


def test_info_knows_the_bits_of_the_activations(quantized, capsys) -> None:
    for name in ("model.pth", "model_posttrained.alq"):
        alq_main(["info", str(quantized / name)])
        assert "activations: into the layers, in their order, float, 2 bit, 2 bit, 2 bit" in (
            capsys.readouterr().out
        )
    alq_main(["info", "--json", str(quantized / "model.pth")])
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["act_bit"] for layer in layers] == [0, 2, 2, 2]


@pytest.mark.parametrize("start", ["pretrain", "posttrain"])
def test_they_start_where_asked(sliver, tmp_path, start) -> None:
    if start == "pretrain":
        run(tmp_path, *ALL, "--act_bit", "1", "--act_from", "pretrain")
    else:
        run(tmp_path, *ALL[:2])
        run(tmp_path, "--POSTTRAIN", "--act_bit", "1")
    found = [bool(activations_of(tmp_path / name)) for name in NAMES]
    assert found == {"pretrain": [True] * 3, "posttrain": [False, False, True]}[start]
    assert {*activations_of(tmp_path / NAMES[2]).values()} == {1}


def test_each_stage_alone_gives_the_same_files(quantized, tmp_path) -> None:
    for stage in ALL:
        run(tmp_path, stage, "--act_bit", "2")
    for name in NAMES:
        assert_equal_checkpoints(quantized / name, tmp_path / name)


def test_resumed_it_ends_in_the_same_files(quantized, tmp_path, monkeypatch) -> None:
    """Stopped after a basis epoch and after the first epoch of post-training."""
    save = alq.command.resume.ResumePoints.save
    for stage, after, names in (("alq", 1, ALL), ("posttrain", 1, ALL[1:])):

        def save_and_stop(self, stage=stage, after=after) -> None:
            save(self)
            if (self.training.stage, self.training.epochs_done) == (stage, after):
                raise KeyboardInterrupt

        monkeypatch.setattr(alq.command.resume.ResumePoints, "save", save_and_stop)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, *names, "--act_bit", "2", *["--resume"] * (stage == "posttrain"))
        assert stopped.value.code == 130
    monkeypatch.setattr(alq.command.resume.ResumePoints, "save", save)
    run(tmp_path, "--POSTTRAIN", "--act_bit", "2", "--resume")
    for name in NAMES:
        assert_equal_checkpoints(quantized / name, tmp_path / name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--POSTTRAIN"], "--act_bit 0: --model {}/model.pth has activations of 2 bit; give that"),
        (["--POSTTRAIN", "--act_bit", "3"], "--act_bit 3: --model {}/model.pth has activations of"),
        (["--ALQ", "--act_from", "alq"], "--act_from alq: goes with --act_bit, which is 0"),
        (["--ALQ", "--act_bit", "9"], "argument --act_bit: 9 is out of range"),
    ],
)
def test_other_bits_are_refused_by_the_flag(quantized, capsys, flags, message) -> None:
    before = {path: path.read_bytes() for path in quantized.glob("*.*") if path.suffix != ".lock"}
    with pytest.raises(SystemExit) as stopped:
        run(quantized, *flags)
    assert stopped.value.code == 2
    assert message.format(quantized) in capsys.readouterr().err
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_network_without_them_gives_the_file_it_gave(tmp_path) -> None:
    """Whose bytes follow from the published network."""
    published = Path(__file__).parents[1] / "checkpoints" / "published" / "lenet5.alq"
    model = lenet5.LeNet5()
    alq.save_packed(tmp_path / "again.alq", model, alq.load_packed(published, model))
    again, before = read_packed(tmp_path / "again.alq"), read_packed(published)
    assert again.rest.keys() == before.rest.keys()
    assert abs(sum(again.sizes.values()) - sum(before.sizes.values())) < 16  # zlibs differ


def test_floats_of_16_bit_hold_the_levels_too(quantized, tmp_path) -> None:
    model = lenet5.LeNet5().eval()
    weights = alq.load_packed(quantized / "model_posttrained.alq", model)
    alq.round_floats(model, weights)
    alq.save_packed(tmp_path / "small.alq", model, weights, "float16", coded=True)
    twin, x = lenet5.LeNet5().eval(), torch.randn(5, 1, 28, 28)
    alq.load_packed(tmp_path / "small.alq", twin)
    assert torch.equal(twin(x), model(x))


SHORT = shlex.split(
    "--batch_size 20 --epoch_pretrain 1 --R 1 --epoch_basis 1 --epoch_coord 1 --pr 0.3 --top_k 0.5 "
    "--epoch_ste 1 --epoch_post_coord 1 --max_bit 2 --device cpu --act_bit 2"
)


def test_vgg_goes_through_all_stages(tmp_path, monkeypatch) -> None:
    write_cifar10(tmp_path, 55)
    prepare_vgg(tmp_path, monkeypatch.setattr)
    flags = [*ALL, "--data", str(tmp_path), "--val_size", "15", *SHORT, *files(tmp_path)]
    vgg.main(flags)
    state = load(tmp_path / "model_posttrained.pth")["model"]
    levels = {k: v for k, v in state.items() if "binary_input" in k}
    assert len(levels) == 2 * 8 and all(v.isfinite().all() for v in levels.values())
    assert not any(v.any() for k, v in levels.items() if k.endswith("lowest"))  # all behind ReLU


def test_resnet_goes_through_all_stages(tmp_path, monkeypatch) -> None:
    write_imagenet(tmp_path / "data", 50, classes=2)
    prepare_resnet(monkeypatch.setattr)
    flags = [*ALL, "--data", str(tmp_path / "data"), "--val_size", "10", "--workers", "0"]
    resnet.main([*flags, *RESNET_FLAGS, *SHORT, *files(tmp_path)])
    assert len(activations_of(tmp_path / "model_posttrained.pth")) > 0
    state = load(tmp_path / "model_posttrained.pth")["model"]
    fed = [k for k in state if k.endswith("binary_input.gamma")]
    assert len(fed) == 13 and "layer1.0.downsample.0.binary_input.gamma" in fed


def test_two_processes_fit_the_levels_that_one_does(tmp_path) -> None:
    """The batches of one are shared out to two; in float64, so that rounding decides nothing.

    They are so small that the fit is of all values, for samples would differ. The last batch, of
    one picture, leaves one process without.
    """
    flags = shlex.split(
        "--PRETRAIN --ALQ --val_size 35 --batch_size 5 --epoch_pretrain 1 --R 1 --epoch_basis 1 "
        "--epoch_coord 1 --top_k 0.4 --max_bit 2 --act_bit 2 --act_from pretrain --device cpu "
        f"--data {ROOT / 'data'}"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    few_digits.main(46, [*flags, *files(one)])
    torchrun("few_digits.py", "46", *flags, *files(two))
    a, b = (load(folder / "model.pth")["model"] for folder in (one, two))
    assert [k for k in a if "gamma" in k] == [f"{layer}.binary_input.gamma" for layer in FED]
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=1e-7, rtol=0, msg=key)


def linear_network() -> tuple[torch.nn.Sequential, list]:
    from torch import nn

    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    x = torch.randn(96, 6)
    y = (x[:, :3] + x[:, 3:].abs()).argmax(1)
    return model, [(x[k : k + 16], y[k : k + 16]) for k in range(0, 96, 16)]


def test_fit_calibrates_before_its_first_step() -> None:
    model, batches = linear_network()
    weights = alq.quantize(model, max_bit=3)
    placed = alq.quantize_activations(model, 2)
    seen = []
    model.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, [a.training for a in placed.values()]))
    )
    before = [p.clone() for p in model.parameters()]
    stepped = []

    def loss(model, batch):
        now = zip(before, model.parameters(), strict=True)
        stepped.append(any(not torch.equal(a, b) for a, b in now))
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    schedule = alq.Schedule(
        R=1, epoch_basis=1, epoch_coord=1, pr=0.3, epoch_ste=1, epoch_post_coord=0
    )
    result = alq.fit(model, weights, batches, batches, loss, schedule, progress=False)
    assert result["val_loss"] < 3
    calibration = [modes for modes in seen if modes == (False, [True, True])]
    assert len(calibration) == 2 * len(batches)  # before each of the two stages
    assert seen[: len(batches)] == calibration[: len(batches)] and not any(stepped[: len(batches)])
    pruning = (False, [False, False])
    assert seen.count(pruning) == len(batches) * (1 + 6)  # a pruning epoch; evaluations
    assert (True, [True, True]) in seen


def test_a_wrong_first_layer_is_found_in_the_first_batch() -> None:
    class Backwards(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.begin = torch.nn.Linear(8, 3), torch.nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.begin(x).relu())

    _, batches = linear_network()
    for first in (None, "begin.weight"):
        model = Backwards()
        weights = alq.quantize(model, max_bit=2)
        alq.quantize_activations(model, 2, first=first)
        schedule = alq.Schedule(R=1, epoch_basis=1, epoch_coord=0, pr=0.1, epoch_ste=0,
                                epoch_post_coord=0)  # fmt: skip
        arguments = (model, weights, batches, batches)
        if first:
            alq.fit(*arguments, schedule=schedule, progress=False)
        else:
            with pytest.raises(InputError, match=r"^begin: is the first layer that is called"):
                alq.fit(*arguments, schedule=schedule, progress=False)


def counted_by_hand(weight: alq.MultiBitWeight, M: int, uses: int) -> dict[str, int]:
    """Each live basis at each position, one by one."""
    counts = {"words": 0, "additions": 0, "multiply_adds": 0}
    for alive in weight.mask.flatten().tolist():
        if alive:
            for _ in range(uses):
                counts["words"] += M * len(range(0, weight.n, 64))
                counts["additions"] += 0 if M else weight.n
                counts["multiply_adds"] += M + 1
    return counts


def test_operations_are_those_of_counting_by_hand(quantized, capsys) -> None:
    file = quantized / "model_posttrained.alq"
    alq_main(["info", "--ops", "--json", str(file)])
    *rows, total = json.loads(capsys.readouterr().out)["operations"]
    model = lenet5.LeNet5()
    weights = alq.load_packed(file, model)
    # Places that a layer computes, inputs and results of one picture.
    shapes = [(24 * 24, 28 * 28, 20 * 24 * 24), (8 * 8, 20 * 144, 50 * 64), (1, 800, 500)]
    shapes.append((1, 500, 10))
    for row, weight, (uses, inputs, results) in zip(rows, weights, shapes, strict=True):
        M = 0 if weight.name == "conv1.weight" else 2
        expected = counted_by_hand(weight, M, uses)
        numel = weight.parameter.numel()
        expected |= {
            "name": weight.name, "multiply_adds_dense": uses * numel, "comparisons": M * inputs,
            "bytes_float32": 4 * (numel + inputs + results),
            "bytes_int8": numel + inputs + 4 * results,
        }  # fmt: skip
        size = weight.storage_bytes + (inputs * M / 8 if M else 4 * inputs) + 4 * results
        assert {key: row[key] for key in expected} == expected
        assert size <= row["bytes"] < size + 2
    assert total["words"] == sum(row["words"] for row in rows)
    alq_main(["info", "--ops", str(file)])
    assert len(capsys.readouterr().out.splitlines()) == 3 + 5


def test_operations_of_an_unknown_network_are_refused(tmp_path, capsys) -> None:
    model, _ = linear_network()
    alq.save_packed(tmp_path / "net.alq", model, alq.quantize(model, max_bit=2))
    with pytest.raises(SystemExit):
        alq_main(["info", "--ops", str(tmp_path / "net.alq")])
    assert "--ops: no network of the scripts has these layers" in capsys.readouterr().err


def test_every_layer_of_the_networks_has_a_place() -> None:
    for net in NETWORKS.values():
        model = net.recipe.shapes()
        found = places(model, torch.empty(1, *net.picture, device="meta"))
        assert found.keys() == quantizable(model).keys()
    transposed = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 5, 2, stride=2))
    (place,) = places(transposed, torch.rand(1, 3, 4, 4)).values()
    assert place == (16, 48, 5 * 64)  # 16 * 60 multiply-adds
