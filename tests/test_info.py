"""`python -m alq info`, and the packed file that the stages write and --EVAL reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import alq
import lenet5
from alq.__main__ import main
from alq.command.info import inspect, weights_by_bits
from alq.method.weight import prune

pytestmark = pytest.mark.usefixtures("sliver")
ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--val_size 100 --batch_size 100 --epoch_pretrain 1 --R 1 --epoch_basis 1 --epoch_coord 0 "
    "--epoch_ste 1 --epoch_post_coord 0 --top_k 0.5 --max_bit 2 --threads 1"
).split()


@pytest.fixture(scope="module")
def folder(sliver, tmp_path_factory) -> Path:
    """All stages in one command."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, "--PRETRAIN", "--ALQ", "--POSTTRAIN")
    return folder


def run(folder: Path, *flags: str) -> None:
    files = ["--model_ori", str(folder / "ori.pth"), "--model", str(folder / "model.pth")]
    lenet5.main([*SHORT, *files, "--data", str(ROOT / "data"), *flags])


def results(folder: Path) -> dict[str, dict]:
    events = map(json.loads, (folder / "model.jsonl").read_text().splitlines())
    return {event["stage"]: event for event in events if event["event"] == "result"}


# ---------------------------------------------------------------------------- stages and --EVAL


def test_eval_needs_the_packed_file_alone(folder, tmp_path, capsys, monkeypatch) -> None:
    packed = tmp_path / "copy.alq"
    packed.write_bytes((folder / "model_posttrained.alq").read_bytes())
    monkeypatch.chdir(tmp_path)
    lenet5.main(["--EVAL", str(packed), "--data", str(ROOT / "data"), "--val_size", "100"])
    printed = capsys.readouterr().out
    result = results(folder)["posttrain"]
    (row,) = [line for line in printed.splitlines() if line.startswith("after packing")]
    assert row.endswith(f" {result['top1']:.2f}")  # bit for bit the same network
    assert "conv1.weight" in printed and "published (paper)" in printed
    assert f"{packed}: {packed.stat().st_size} bytes = signs " in printed
    assert result["file_bytes"] == packed.stat().st_size
    assert list(tmp_path.iterdir()) == [packed]  # no log, no checkpoint


def test_alq_packs_when_it_is_the_last_stage(folder, tmp_path, capsys) -> None:
    assert not (folder / "model.alq").exists()
    (tmp_path / "ori.pth").write_bytes((folder / "ori.pth").read_bytes())
    run(tmp_path, "--ALQ")
    assert results(tmp_path)["alq"]["file_bytes"] == (tmp_path / "model.alq").stat().st_size
    assert f"{tmp_path / 'model.alq'}: " in capsys.readouterr().out
    ours, theirs = inspect(tmp_path / "model.pth"), inspect(tmp_path / "model.alq")
    assert ours["layers"] == theirs["layers"] and ours["rest_bytes"] == theirs["rest_bytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--EVAL", "absent.alq"], "absent.alq cannot be read: No such file"),
        (["--EVAL", str(ROOT / "README.md")], "README.md is not an ALQ packed file"),
        (["--EVAL", "FOLDER/ori.pth"], "ori.pth is not an ALQ packed file"),
        (
            ["--EVAL", "FOLDER/other.alq"],
            "other.alq: holds another network: conv1.weight is absent",
        ),
        (["--EVAL", "x.alq", "--ALQ"], "tests a finished file; give it without --ALQ"),
        (["--ALQ", "--model", "x.alq"], "--model x.alq: .alq is the packed file's ending"),
        ([], "or --EVAL FILE"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, flags, message) -> None:
    other = nn.Sequential(nn.Linear(4, 4))
    alq.save_packed(folder / "other.alq", other, alq.quantize(other))
    with pytest.raises(SystemExit) as stop:
        run(folder, *[flag.replace("FOLDER", str(folder)) for flag in flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------- info


def test_info_as_json_has_the_numbers_of_the_run(folder, capsys) -> None:
    path = folder / "model_posttrained.alq"
    main(["info", str(path), "--json"])
    info = json.loads(capsys.readouterr().out)
    result = results(folder)["posttrain"]
    assert info["bitwidth"] == pytest.approx(result["bitwidth"])
    assert info["storage_bytes"] == result["storage_bytes"]
    assert info["weights"] == 430500 and info["float32_bytes"] == 4 * 430500
    assert info["compression"] == pytest.approx(4 * 430500 / result["storage_bytes"])
    assert info["file_bytes"] == path.stat().st_size == sum(info["parts"].values())
    assert info["rest_bytes"] == 4 * 580 == info["parts"]["rest"]
    fc1 = info["layers"][2]
    assert fc1["shape"] == [500, 800] and fc1["structure"] == "subchannelwise"
    assert (fc1["subc"], fc1["groups"], fc1["n"], fc1["max_bit"]) == (2, 1000, 400, 2)
    for layer in info["layers"]:
        counts = layer["groups_by_bits"]
        assert sum(counts) == layer["groups"] and len(counts) == layer["max_bit"] + 1
        live = sum(bits * count for bits, count in enumerate(counts))
        assert layer["bitwidth"] == live / layer["groups"]
        assert layer["storage_bytes"] == live * (layer["n"] / 8 + 4)
    assert sum(weights_by_bits(info["layers"])) == pytest.approx(100)


def test_info_as_a_table(folder, capsys) -> None:
    for name in ("model_posttrained.alq", "model_posttrained.pth"):
        main(["info", str(folder / name)])
        printed = capsys.readouterr().out
        assert "0 bit  1 bit  2 bit" in printed and "20x1x5x5   kernelwise" in printed
        assert ("bytes = signs" in printed) == name.endswith("alq")
    main(["info", str(folder / "ori.pth")])
    assert "checkpoint in full precision, 1.72 MB of values" in capsys.readouterr().out


def test_info_of_a_network_with_nothing_left(tmp_path, capsys) -> None:
    layer = nn.Linear(8, 4)
    (weight,) = alq.quantize(layer)
    prune([weight], [weight.mask])
    alq.save_packed(tmp_path / "nothing.alq", layer, [weight])
    main(["info", str(tmp_path / "nothing.alq")])
    assert (
        "0.000 bit on average, 0.0 KB; in float32 0.1 KB (nothing left)" in capsys.readouterr().out
    )
    assert inspect(tmp_path / "nothing.alq")["compression"] is None


def test_info_runs_as_a_module_and_refuses_in_one_line(tmp_path) -> None:
    command = [sys.executable, "-m", "alq", "info", str(tmp_path / "absent.alq")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "absent.alq cannot be read: No such file" in done.stderr


def test_info_refuses_a_resume_point(tmp_path, capsys) -> None:
    alq.files.checkpoint.save_checkpoint(tmp_path / "x.resume", {"net": "lenet5", "model": {}})
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "x.resume")])
    assert "x.resume is a resume point" in capsys.readouterr().err


def test_the_picture(folder, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    file = str(folder / "model_posttrained.alq")
    main(["info", file, "--plot", str(tmp_path / "bits.png")])
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ([file, "--plot", str(tmp_path / "bits.xyz")], "'.xyz' is no kind of picture"),
        ([str(folder / "ori.pth"), "--plot", "x.png"], "has no multi-bit weights to plot"),
    ):
        with pytest.raises(SystemExit):
            main(["info", *arguments])
        assert message in capsys.readouterr().err


def test_a_missing_matplotlib_is_named(folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["info", str(folder / "model_posttrained.alq"), "--plot", "x.png"])
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err
