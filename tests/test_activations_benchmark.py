"""The runs behind the figure of activations, on a sliver of the digits; accuracies say nothing."""

from __future__ import annotations

from matplotlib import pyplot as plt

import activations as benchmark
from alq.files.checkpoint import load_checkpoint
from test_cli import ROOT

FLAGS = (
    "--flags --val_size 100 --batch_size 50 --epoch_pretrain 1 --milestones_pretrain --epoch_ste 1 "
    "--epoch_post_coord 0 --top_k 0.5 --threads 1"
).split()


def test_a_part_of_the_grid_its_table_and_its_figure(sliver, tmp_path, capsys) -> None:
    part = ["--dataset", "mnist", "--act", "1", "0", "--seed", "0", "--weights", "32", "2"]
    part += ["--out", str(tmp_path), "--data", str(ROOT / "data")]
    benchmark.main(["run", *part, *FLAGS])
    logs = {log.name: log.read_bytes() for log in tmp_path.glob("*.jsonl")}
    assert sorted(logs) == [
        "mnist_w2_a0_float_seed0.jsonl", "mnist_w2_a1_alq_seed0.jsonl",
        "mnist_w32_a0_float_seed0.jsonl", "mnist_w32_a1_pretrain_seed0.jsonl",
    ]  # fmt: skip
    capsys.readouterr()
    benchmark.main(["run", *part, *FLAGS])  # nothing is left to do
    assert capsys.readouterr().err == ""
    assert logs == {log.name: log.read_bytes() for log in tmp_path.glob("*.jsonl")}

    benchmark.main(["table", *part])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [cell.strip("| ") for cell in lines[0][3:]] == ["1 bit", "float", "seeds"]
    assert [line[1:3] for line in lines[2:]] == [["32 bit", "pretrain"], ["2 bit", "alq"]]
    for line in lines[2:]:
        assert all(0 < float(cell) <= 100 for cell in line[3:5])
    picture = tmp_path / "activations.png"
    benchmark.main(["figure", *part, "--picture", str(picture)])
    assert plt.imread(picture)[..., :3].std() > 0.02


def test_activations_can_begin_in_post_training(sliver, tmp_path) -> None:
    part = ["--dataset", "mnist", "--act", "1", "--seed", "0", "--weights", "2"]
    part += ["--start", "posttrain", "--out", str(tmp_path), "--data", str(ROOT / "data")]
    benchmark.main(["run", *part, *FLAGS])
    name = "mnist_w2_a1_posttrain_seed0"
    saved = [
        load_checkpoint(tmp_path / f"{name}{end}.pth", "lenet5") for end in ("", "_posttrained")
    ]
    quantized = [any("binary_input" in key for key in each["model"]) for each in saved]
    assert quantized == [False, True]
