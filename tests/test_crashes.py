"""Runs that are killed, stopped, or have no room to write end in the files of the run that was not.

The victims are real processes, forked from this one (tests/crashes.py).
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import alq.command.resume
import alq.command.stages
import alq.files.disk
import lenet5
from alq.files.checkpoint import load_checkpoint, save_checkpoint
from alq.files.disk import hold
from alq.machine.interruption import Interruption
from crashes import DeadlyFile, die_in, finish, finish_and_time, fork

pytestmark = pytest.mark.usefixtures("sliver")
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("--PRETRAIN", "--ALQ", "--POSTTRAIN")
SHORT = (
    "--val_size 100 --batch_size 25 --epoch_pretrain 3 --R 2 --epoch_basis 1 --epoch_coord 1 "
    "--epoch_ste 2 --epoch_post_coord 1 --top_k 0.5 --max_bit 3 --threads 1 --device cpu"
).split()
KILLS = 12  # moments at which each stage is killed


def run(folder: Path, *flags: str) -> None:
    os.chdir(folder)  # so that the flags in the files are the same in all folders
    files = ["--model_ori", "ori.pth", "--model", "model.pth", "--data", str(ROOT / "data")]
    lenet5.main([*SHORT, *files, *flags])


SECONDS: dict[str, float] = {}  # of computing, that each stage takes


@pytest.fixture(scope="module")
def finished(sliver, tmp_path_factory) -> Path:
    """Each stage on its own, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    for stage in STAGES:
        child = fork(lambda stage=stage: run(folder, stage), folder / "out")
        code, SECONDS[stage] = finish_and_time(child)
        assert code == 0, (folder / "out").read_text()
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
    assert not [name for name in own if re.search(r"\.(resume|lock|part|tmp)", name)]
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

    alq.files.disk.open = deadly


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_again_and_again_ends_in_the_same_files(stage, finished, tmp_path) -> None:
    """By time and in the middle of a write, at random; some runs save within the epochs."""
    chance = random.Random(stage)
    kills, round = 0, 0
    while kills < KILLS:
        folder = tmp_path / str(round)
        before(stage, finished, folder)
        code = None
        while code != 0:
            by_time = chance.random() < 0.6
            seconds, size = chance.uniform(0, SECONDS[stage]), int(10 ** chance.uniform(0, 7.5))
            die = partial(die_in, seconds) if by_time else partial(dying_write, size)
            flags = "--resume", "--save_every", chance.choice(["0", "10", "1e-9"])
            work = partial(dying_run, die if kills < KILLS else int, folder, stage, *flags)
            if (code := finish(fork(work, folder / "out"))) != 0:
                killed = signal.SIGPROF if by_time else signal.SIGKILL
                assert code == -killed, (folder / "out").read_text()
                kills += 1
        assert_as_finished(folder, finished, stage)
        round += 1


def dying_run(die: Callable, folder: Path, stage: str, *flags: str) -> None:
    die()
    run(folder, stage, *flags)


def run_signalled(folder: Path, stage: str, stop: int, batch: int, *flags: str) -> None:
    """The process is asked to stop after so many batches."""
    points = alq.command.resume.ResumePoints
    save_if_due, batches = points.save_if_due, itertools.count(1)

    def signalled(self, between_epochs: bool) -> None:
        if not between_epochs and next(batches) == batch:
            os.kill(os.getpid(), stop)
        save_if_due(self, between_epochs)

    points.save_if_due = signalled
    run(folder, stage, *flags)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_asked_to_stop_saves_and_says_so(stage, stop, finished, tmp_path) -> None:
    folder = tmp_path / "run"
    before(stage, finished, folder)
    asked = partial(run_signalled, folder, stage, stop, 11, "--save_every", "0")
    assert finish(fork(asked, folder / "out")) == 128 + stop
    said = (folder / "out").read_text()
    assert f"stopped by {stop.name}; the same command with --resume goes on from here" in said
    assert "Traceback" not in said
    point = load_checkpoint(folder / "model.resume", "lenet5")
    assert (point["epochs_done"], point["batches"]) == (1, 3)
    assert finish(fork(lambda: run(folder, stage, "--resume"), folder / "out")) == 0
    assert_as_finished(folder, finished, stage)


def test_a_second_ctrl_c_acts_at_once(tmp_path) -> None:
    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' `&` has it ignored
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.code == 130
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    assert finish(fork(work, tmp_path / "out")) == 70
    assert "KeyboardInterrupt" in (tmp_path / "out").read_text()


def test_a_kill_at_any_byte_leaves_the_file_before(tmp_path) -> None:
    path = tmp_path / "x.pth"
    content = {"net": "n", "model": {"w": torch.arange(50.0)}}
    save_checkpoint(path, content)
    size, whole = path.stat().st_size, path.read_bytes()
    for cut in [0, 1, size // 2, size - 65, size - 1, *random.Random(0).sample(range(size), 15)]:

        def work(cut=cut) -> None:
            dying_write(cut)
            save_checkpoint(path, {**content, "net": "m"})

        assert finish(fork(work, tmp_path / "out")) == -signal.SIGKILL
        assert path.read_bytes() == whole
    save_checkpoint(path, {**content, "net": "m"})
    assert load_checkpoint(path, "m")
    with hold([path]):  # as every run does first
        pass
    assert [p.name for p in tmp_path.iterdir() if p.name != "out"] == ["x.pth"]


@pytest.mark.parametrize("stage", STAGES)
def test_no_room_to_write_keeps_what_was_there(stage, finished, tmp_path) -> None:
    """A limit on the size of files: a write beyond it fails as one on a full disk does."""
    folder = tmp_path / "run"
    before(stage, finished, folder)
    for name in WRITTEN[stage]:  # of an older run
        shutil.copy(finished / name, folder / name)
    kept = contents(folder)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        run(folder, stage)

    assert finish(fork(work, folder / "out")) == 2
    said = (folder / "out").read_text().splitlines()
    assert "cannot be written: File too large; make room or name another file" in said[-1]
    assert {key: x for key, x in contents(folder).items() if key != "out"} == kept


def test_a_point_of_another_run_is_refused(finished, tmp_path) -> None:
    folder = tmp_path / "run"
    before("--ALQ", finished, folder)

    def refused(message: str, *flags: str) -> None:
        (folder / "out").unlink(missing_ok=True)
        assert finish(fork(lambda: run(folder, *flags, "--resume"), folder / "out")) == 2
        said = (folder / "out").read_text()
        assert message in said and said.count("\n") == 1, said

    asked = partial(run_signalled, folder, "--ALQ", signal.SIGTERM, 3)
    assert finish(fork(asked, folder / "out")) == 143
    point = (folder / "model.resume").read_bytes()
    refused("--pr 0.1: the run to resume had 0.8", "--ALQ", "--pr", "0.1")
    refused("--resume: the run to resume was in --ALQ; name that stage", "--PRETRAIN")
    (folder / "model.resume").write_bytes(point[:1000])
    refused("model.resume is truncated", "--ALQ")
    shutil.copy(folder / "ori.pth", folder / "model.resume")
    refused("model.resume is no resume point; delete it to start anew", "--ALQ")
    (folder / "model.resume").write_bytes(point)
    source = load_checkpoint(folder / "ori.pth", "lenet5")
    save_checkpoint(folder / "ori.pth", {**source, "top1_fp": 1.0})
    refused("ori.pth is not the file that the run to resume started from", "--ALQ")
    assert finish(fork(lambda: run(folder, "--ALQ"), folder / "out")) == 0  # anew


# ---------------------------------------------------------------------------- one run and another


def refuse(folder: Path, *flags: str) -> str:
    """What a run says that ends with exit code 2, in its one line. It changes nothing."""
    before = contents(folder), (folder / "model.jsonl").read_bytes()
    out = folder.parent / "refused"
    out.unlink(missing_ok=True)
    assert finish(fork(lambda: run(folder, *flags), out)) == 2, out.read_text()
    assert (contents(folder), (folder / "model.jsonl").read_bytes()) == before
    assert out.read_text().count("\n") == 1, out.read_text()
    return out.read_text()


def interrupt(folder: Path, stage: str, batch: int, *flags: str) -> None:
    asked = partial(run_signalled, folder, stage, signal.SIGTERM, batch, "--save_every", "0")
    assert finish(fork(partial(asked, *flags), folder / "out")) == 143


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def run_waiting(folder: Path, stage: str) -> None:
    """The run halts in its second epoch until it may go on."""
    points = alq.command.resume.ResumePoints
    save_if_due, batches = points.save_if_due, itertools.count(1)

    def waiting(self, between_epochs: bool) -> None:
        if not between_epochs and next(batches) == 11:
            (folder / "at_work").touch()
            wait_for(folder / "go_on")
        save_if_due(self, between_epochs)

    points.save_if_due = waiting
    run(folder, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_on_the_same_files_is_refused(stage, finished, tmp_path) -> None:
    folder = tmp_path / "run"
    before(stage, finished, folder)
    first = fork(partial(run_waiting, folder, stage), folder / "out")
    wait_for(folder / "at_work")
    others = [[stage], ["--POSTTRAIN", "--resume"], ["--PRETRAIN", "--model_ori", "x.pth"]]
    if stage == "--PRETRAIN":
        others.append([stage, "--model", "x.pth"])
    for other in others:
        held = "ori.lock" if "--model" in other else "model.lock"
        assert f"{held} is held by another run" in refuse(folder, *other)
    (folder / "go_on").touch()
    assert finish(first) == 0, (folder / "out").read_text()
    assert_as_finished(folder, finished, stage)


def test_a_lock_is_not_kept_by_what_a_killed_run_leaves(tmp_path) -> None:
    """Neither by its file nor by a process that it has started."""
    path = tmp_path / "x.pth"

    def work() -> None:
        with hold([path]):
            if child := os.fork():
                (tmp_path / "child").write_text(str(child))
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
            os._exit(0)

    assert finish(fork(work, tmp_path / "out")) == -signal.SIGKILL
    assert (tmp_path / "x.lock").exists()
    with hold([path]):
        assert (tmp_path / "x.lock").exists()
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert not (tmp_path / "x.lock").exists()


@pytest.mark.parametrize(("stage", "batch"), [*zip(STAGES, (20, 30, 20), strict=True)])
def test_a_repetition_that_is_interrupted_has_not_lost_the_result(
    stage, batch, finished, tmp_path
) -> None:
    """What it has so far is beside it, in a file of the same form."""
    folder, path = tmp_path / "run", Path(WRITTEN[stage][0])
    before(stage, finished, folder)
    for name in WRITTEN[stage]:
        shutil.copy(finished / name, folder / name)
    interrupt(folder, stage, batch, "--seed", "1")
    for name in WRITTEN[stage]:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    so_far = folder / f"{path.stem}.part.pth"
    assert load_checkpoint(so_far, "lenet5")["finished"] is False
    so_far.write_bytes(b"")  # the resume point holds it, too
    again = partial(run, folder, stage, "--seed", "1", "--resume")
    assert finish(fork(again, folder / "out")) == 0, (folder / "out").read_text()
    assert load_checkpoint(folder / path, "lenet5")["flags"]["seed"] == 1
    assert not so_far.exists()


def killed_at_the_end(folder: Path) -> None:
    """With all epochs done, before the best is read back."""
    alq.command.stages.load_checkpoint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run(folder, "--POSTTRAIN")


def killed_at_the_start(folder: Path) -> None:
    """After it has saved where it starts, before its own resume point."""
    alq.command.resume.ResumePoints.save = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    run(folder, "--POSTTRAIN")


def test_a_later_run_that_is_killed_leaves_the_earlier_one_to_resume(finished, tmp_path) -> None:
    folder = tmp_path / "run"
    before("--POSTTRAIN", finished, folder)
    for work in (killed_at_the_end, killed_at_the_start):
        assert finish(fork(partial(work, folder), folder / "out")) == -signal.SIGKILL
    again = partial(run, folder, "--POSTTRAIN", "--resume")
    assert finish(fork(again, folder / "out")) == 0, (folder / "out").read_text()
    for name in WRITTEN["--POSTTRAIN"]:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("other", ["absent.pth", "other.pth"])
def test_a_point_of_another_full_precision_network_is_refused(other, finished, tmp_path) -> None:
    """Which may be a run's own, as several with one --model share a resume point."""
    folder = tmp_path / "run"
    before("--ALQ", finished, folder)
    (folder / "ori.pth").rename(folder / "other.pth")
    interrupt(folder, "--PRETRAIN", 24)
    said = refuse(folder, "--PRETRAIN", "--resume", "--model_ori", other)
    assert f"model.resume is of a run that writes ori.pth, not {other}; name that" in said
    moved = folder.rename(tmp_path / "moved")
    again = partial(run, moved, "--PRETRAIN", "--resume")
    assert finish(fork(again, moved / "out")) == 0, (moved / "out").read_text()
    assert (moved / "ori.pth").read_bytes() == (finished / "ori.pth").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_there_is_nothing_to_resume_after_the_end(stage, finished, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    result = WRITTEN[stage][0]
    before = contents(folder), (folder / "model.jsonl").read_bytes()
    out = tmp_path / "again"
    assert finish(fork(lambda: run(folder, stage, "--resume", "--threads", "2"), out)) == 0
    assert f"note: nothing to resume: {result} is finished" in out.read_text()
    assert out.read_text().count("\n") == 1
    assert (contents(folder), (folder / "model.jsonl").read_bytes()) == before
    said = refuse(folder, stage, "--resume", "--pr", "0.1")
    assert f"--pr 0.1: the run that made {result} had 0.8; give that, or start anew" in said
    source = {"--ALQ": "ori.pth", "--POSTTRAIN": "model.pth"}.get(stage)
    if source:
        content = load_checkpoint(folder / source, "lenet5")
        save_checkpoint(folder / source, {**content, "top1_fp": 1.0})
        said = refuse(folder, stage, "--resume")
        assert f"{source} is not the file that the run that made {result} started from" in said
