"""The names of a run's files, which all follow from --model_ori and --model."""

from dataclasses import dataclass
from pathlib import Path

PACKED_ENDING = ".alq"
CHECKPOINT_ENDINGS = (".pth", ".pt")  # any other dot is part of a name, as in bits0.5


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
        return beside(self.model, "_posttrained")

    @property
    def log(self) -> Path:
        """The log, to which every stage appends."""
        return beside(self.model, ending=".jsonl")

    @property
    def resume_point(self) -> Path:
        """What --resume goes on from; it stays until the command has finished."""
        return beside(self.model, ending=".resume")

    def target(self, stage: str) -> Path:
        """Return the checkpoint that `stage` (pretrain, alq, posttrain) writes."""
        return {"pretrain": self.model_ori, "alq": self.model}.get(stage, self.posttrained)

    def sources(self, stage: str) -> list[Path]:
        """Return the checkpoints that `stage` reads: one, or none."""
        return {"alq": [self.model_ori], "posttrain": [self.model]}.get(stage, [])


def beside(checkpoint: Path, more: str = "", ending: str | None = None) -> Path:
    """Return `checkpoint` with `more` in its name, and `ending` in place of its own if given."""
    own = checkpoint.suffix if checkpoint.suffix in CHECKPOINT_ENDINGS else ""
    ending = own if ending is None else ending
    return checkpoint.with_name(checkpoint.name.removesuffix(own) + more + ending)


def packed(checkpoint: Path) -> Path:
    """Return the packed file beside `checkpoint`, of the same network."""
    return beside(checkpoint, ending=PACKED_ENDING)


def part(checkpoint: Path) -> Path:
    """Return where `checkpoint` is until its stage has finished."""
    return beside(checkpoint, ".part")
