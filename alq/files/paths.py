"""The names of a run's files, which all follow from --model_ori and --model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKED_ENDING = ".alq"


@dataclass(frozen=True)
class RunFiles:
    """The files that a run reads and writes.

    Attributes:
        model_ori: the full-precision checkpoint, of --PRETRAIN.
        model: the quantized checkpoint, of --ALQ.
    """

    model_ori: Path
    model: Path

    @property
    def posttrained(self) -> Path:
        """The checkpoint of --POSTTRAIN, which leaves --model as --ALQ made it."""
        return self.model.with_name(f"{self.model.stem}_posttrained{self.model.suffix}")

    @property
    def log(self) -> Path:
        """The log, to which every stage appends."""
        return self.model.with_suffix(".jsonl")

    @property
    def resume_point(self) -> Path:
        """What --resume goes on from; it stays until the command has finished."""
        return self.model.with_name(f"{self.model.stem}.resume")


def packed(checkpoint: Path) -> Path:
    """The small file beside `checkpoint`, of the same network."""
    return checkpoint.with_suffix(PACKED_ENDING)
