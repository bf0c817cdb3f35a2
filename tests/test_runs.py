"""What one run may do to the files of another: nothing, or it says so in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from alq.files.paths import RunFiles, packed


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
