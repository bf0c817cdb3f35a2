"""The numbers of a run for TensorBoard, from the events of its log."""

import weakref
from pathlib import Path
from typing import Any

from ..errors import InputError
from .disk import explain_failed_write
from .history import STAGES


class Scalars:
    """Writes the numbers of each event that it is called with into `folder`, for TensorBoard.

    A stage is a run there, whose steps count the epochs. What stages ended with is one more run,
    "result", whose steps count the stages. What earlier runs wrote of the first step, and after it,
    TensorBoard then drops: an interrupted run that goes on leaves no point twice.

    Raises: InputError where the package is missing or the folder cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "tensorboard: needs the package of that name: pip install tensorboard",
                "tensorboard",
            ) from error
        self.folder, self.new_writer = Path(folder), SummaryWriter
        self.writers: dict[str, Any] = {}
        weakref.finalize(self, close, self.writers)
        self.epoch = 0
        with explain_failed_write(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: str, **fields: Any) -> None:
        """Write what `RunLog.write` is called with."""
        stage = fields.get("stage", "alq")  # a plan and a round have none
        numbers = {key: x for key, x in fields.items() if isinstance(x, (int, float))}
        layers = fields.get("bitwidths", {})
        numbers |= {f"bits/{name}": bits for name, bits in layers.items()}
        if event in ("epoch", "before"):
            self.epoch = int(numbers.pop("epoch", 0))
            numbers.pop("round", None)
            self._write(stage, self.epoch, numbers)
        elif event == "round":
            self._write("alq", self.epoch, {"top1": fields["top1"]})  # the rest is the epoch's
        elif event == "result":
            self._write("result", 1 + list(STAGES).index(stage), numbers)
            close(self.writers)  # the next stage has others

    def _write(self, run: str, step: int, numbers: dict[str, float]) -> None:
        with explain_failed_write(self.folder):
            if run not in self.writers:
                self.writers[run] = self.new_writer(str(self.folder / run), purge_step=step)
            for tag, value in numbers.items():
                self.writers[run].add_scalar(tag, value, step)
            self.writers[run].flush()


def close(writers: dict[str, Any]) -> None:
    """Close all files, and forget them."""
    while writers:
        writers.popitem()[1].close()
