"""Runs that are killed, stopped, or have no room to write end in the files of the run that was not.

The victims are real processes, forked from this one (tests/crashes.py).
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import alq.checkpoint
import lenet5
import lenet5_on_a_sliver
from crashes import DeadlyFile, finish, fork

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("--PRETRAIN", "--ALQ", "--POSTTRAIN")
SHORT = (
    "--val_size 100 --batch_size 25 --epoch_pretrain 3 --R 2 --epoch_basis 1 --epoch_coord 1 "
    "--epoch_ste 2 --epoch_post_coord 1 --top_k 0.5 --max_bit 3 --threads 1 --device cpu"
).split()
KILLS = 20  # moments at which each stage is killed


@pytest.fixture(scope="module", autouse=True)
def data():
    """The digits, read once for all processes."""
    sets = lenet5_on_a_sliver.sliver(ROOT / "data")
    before, lenet5.read_mnist = lenet5.read_mnist, lambda root: sets
    threads = torch.get_num_threads()
    yield
    lenet5.read_mnist = before
    torch.set_num_threads(threads)


def run(folder: Path, *flags: str) -> None:
    os.chdir(folder)  # so that the flags in the files are the same in all folders
    files = ["--model_ori", "ori.pth", "--model", "model.pth"]
    lenet5.main([*flags, *SHORT, *files])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Each stage on its own, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    for stage in STAGES:
        assert finish(fork(lambda stage=stage: run(folder, stage), folder / "out")) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".jsonl"}


def events(folder: Path) -> dict[str, list[dict]]:
    """What the log says of the run but for the time it took, by stage."""
    found: dict[str, list[dict]] = {}
    for event in map(json.loads, (folder / "model.jsonl").read_text().splitlines()):
        stage = event.get("stage", "alq")  # "plan" and "round" are ALQ's
        if event["event"] == "start":  # killed before the first resume point, it starts anew
            found.update({name.lower(): [] for name in event["stages"]})
        elif event["event"] != "resume":
            del event["time"]
            event.pop("seconds", None)
            found[stage].append(event)
    return found


WRITTEN = {
    "--PRETRAIN": ["ori.pth"],
    "--ALQ": ["model.pth", "model.alq"],
    "--POSTTRAIN": ["model_posttrained.pth", "model_posttrained.alq"],
}


def assert_as_finished(folder: Path, finished: Path, stage: str) -> None:
    """Byte for byte the same files, and the same log."""
    own, others = contents(folder), contents(finished)
    for name in WRITTEN[stage]:
        assert own[name] == others[name], name
    assert not {"model.resume", "model.resume.tmp"} & set(own)
    name = stage[2:].lower()
    assert events(folder)[name] == events(finished)[name]


def before(stage: str, finished: Path, folder: Path) -> None:
    """What the stages before left."""
    folder.mkdir()
    for earlier in STAGES[: STAGES.index(stage)]:
        for name in WRITTEN[earlier]:
            shutil.copy(finished / name, folder / name)


def dying_write(size: int):
    """Patch the writing of all files so that the process dies after `size` bytes."""
    left, opened = [size], builtins.open

    def deadly(path, mode="r", *rest, **options):
        file = opened(path, mode, *rest, **options)
        return DeadlyFile(file, left) if mode == "wb" else file

    alq.checkpoint.open = deadly


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_again_and_again_ends_in_the_same_files(stage, finished, tmp_path) -> None:
    """By time and in the middle of a write, at random; some runs save within the epochs."""
    chance = random.Random(stage)
    kills, round = 0, 0
    while kills < KILLS:
        folder = tmp_path / str(round)
        before(stage, finished, folder)
        while True:
            save_every = chance.choice(["0", "10", "1e-9"])
            at_byte = kills < KILLS and chance.random() < 0.4
            size = int(10 ** chance.uniform(0, 7.5))

            def work(size=size, at_byte=at_byte, save_every=save_every, folder=folder) -> None:
                if at_byte:
                    dying_write(size)
                run(folder, stage, "--save_every", save_every, "--resume")

            child = fork(work, folder / "out")
            if kills < KILLS and not at_byte:
                time.sleep(chance.uniform(0, 1.2))
                os.kill(child, signal.SIGKILL)
            if (code := finish(child)) == 0:
                break
            assert code == -signal.SIGKILL, (folder / "out").read_text()
            kills += 1
        assert_as_finished(folder, finished, stage)
        round += 1
