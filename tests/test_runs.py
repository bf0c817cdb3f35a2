"""What one run may do to the files of another: nothing, or it says so in one line."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from pathlib import Path

import pytest

from alq.command.resume import check_same_run
from alq.errors import InputError
from alq.files import disk
from alq.files.paths import RunFiles, packed, part


@pytest.mark.parametrize(
    ("model", "stem", "ending"),
    [
        ("net.pth", "net", ".pth"),
        ("net.pt", "net", ".pt"),
        ("net", "net", ""),
        ("bits0.5", "bits0.5", ""),
        ("bits0.9", "bits0.9", ""),
        ("bits0.5.pth", "bits0.5", ".pth"),
        ("v1.2.final", "v1.2.final", ""),
    ],
)
def test_a_dot_in_a_name_belongs_to_it(model: str, stem: str, ending: str) -> None:
    files = RunFiles(Path("ori.pth"), Path("runs") / model)
    names = files.log, files.resume_point, files.posttrained, packed(files.posttrained)
    ends = ".jsonl", ".resume", f"_posttrained{ending}", "_posttrained.alq"
    assert names == tuple(Path("runs") / (stem + end) for end in ends)
    assert packed(files.model) == Path("runs") / f"{stem}.alq"
    assert part(files.model) == Path("runs") / f"{stem}.part{ending}"


def test_a_lock_leaves_nothing_behind(tmp_path) -> None:
    net = tmp_path / "new" / "net.pth"
    with disk.hold([net, net.with_suffix(".pt")]):
        assert [path.name for path in net.parent.iterdir()] == ["net.lock"]
    assert not net.parent.exists()
    with disk.hold([net]):
        net.touch()
    assert [path.name for path in net.parent.iterdir()] == ["net.pth"]


def test_what_killed_runs_left_half_written_is_removed(tmp_path) -> None:
    """Of this run's own files: another's may be at work."""
    kept = ["net.pth", "net2.pth.01234567.tmp", "net.pth.notes.tmp", "net_a.pth.01234567.tmp"]
    left = [f"net{end}.01234567.tmp" for end in (".pth", ".part.pth", ".alq", ".resume")]
    for name in (*kept, *left):
        (tmp_path / name).touch()
    with disk.hold([tmp_path / "net.pth"]):
        assert {path.name for path in tmp_path.iterdir()} == {*kept, "net.lock"}


def test_all_processes_refuse_what_the_main_one_cannot_lock(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(disk, "is_main", lambda: False)
    monkeypatch.setattr(disk, "gather_from_all", lambda own: ["net.lock is held", own])
    with pytest.raises(InputError, match=r"net\.lock is held"), disk.hold([tmp_path / "net.pth"]):
        pass


@pytest.mark.parametrize("system", ["no locks on this file system", "no fcntl"])
def test_systems_without_locks_go_without(system, tmp_path, monkeypatch) -> None:
    def lockf(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = None if system == "no fcntl" else Namespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(disk, "fcntl", fcntl)
    with disk.hold([tmp_path / "net.pth"]):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_run_has_just_removed_is_not_taken(tmp_path, monkeypatch) -> None:
    """Else a third run could lock the file that takes its place."""
    lockf, path = disk.fcntl.lockf, tmp_path / "net.pth"

    def late(file: object, kind: int) -> None:
        (tmp_path / "net.lock").unlink()
        lockf(file, kind)

    monkeypatch.setattr(disk.fcntl, "lockf", late)
    with pytest.raises(InputError, match="held by another run"), disk.hold([path]):
        pass


def test_a_download_is_not_gone_on_with_as_training() -> None:
    """Its resume point holds the downloaded network, which training would start from."""
    files = RunFiles(Path("ori.pth"), Path("net.pth"))
    args = Namespace(DOWNLOAD=False, file_kb=None)
    saved = {"flags": {"DOWNLOAD": True, "processes": 1}}
    with pytest.raises(InputError, match="--DOWNLOAD False: that run had True; give that, or"):
        check_same_run({"stage": "pretrain", **saved}, files, args, "that run", ())
    check_same_run({"stage": "alq", **saved}, files, args, "that run", ())  # it is done


def test_two_writers_of_one_file_do_not_meet(tmp_path) -> None:
    """The second writes, and ends, while the first is at it."""
    path = tmp_path / "net.pth"

    def first(file) -> None:
        file.write(b"fir")
        disk.write_atomically(path, lambda file: file.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b"st")

    disk.write_atomically(path, first)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["net.pth"]
