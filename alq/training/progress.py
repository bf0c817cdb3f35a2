"""The bars of a run, and how long the rest of it will take."""

from collections.abc import Sequence
from statistics import median

from tqdm import tqdm

from ..machine.processes import is_main
from .schedule import Epoch

# Whose seconds an epoch's are like, while there was none of its own kind.
LIKE = {"ste": "basis", "prune": "coordinate"}
RECENT = 3  # epochs of a kind, whose median says how long one lasts


class Progress:
    """Shows a bar for each epoch, of several processes in the main one, and the time left.

    Attributes:
        stages: the epochs of each stage that is to run, in order, as far as they are known.
    """

    def __init__(self, show: bool | None = None) -> None:
        """Make one that shows bars, or not; None: where the output is a terminal."""
        self.show = show
        self.stages: dict[str, Sequence[Epoch]] = {}
        self._seconds: dict[str, list[float]] = {}  # of the epochs so far, by kind

    def __str__(self) -> str:
        counts = (f"{stage} {len(epochs)}" for stage, epochs in self.stages.items())
        return f"epochs: {', '.join(counts)}"

    def bar(self, title: str, left: str, batches: int, done: int) -> tqdm:
        """Return a bar over an epoch's batches; it stays open for what `evaluate` then finds."""
        disable = True if not is_main() else None if self.show is None else not self.show
        return tqdm(
            total=batches, initial=done, desc=title, unit="batch", disable=disable, postfix=left
        )

    def note(self, epoch: Epoch, seconds: float) -> None:
        """Take into account how long an epoch took."""
        self._seconds.setdefault(epoch.kind, []).append(seconds)

    def left(self, stage: str, epochs: Sequence[Epoch]) -> str:
        """Say how long `epochs`, what is left of the stage, will take, and those of later stages.

        Nothing is said before each kind of epoch, or one like it, has been seen.
        """
        names = list(self.stages)
        later = names[names.index(stage) + 1 :] if stage in names else []
        rest = [epoch for name in later for epoch in self.stages[name]]
        times = {"stage": self._time(epochs), "all": self._time([*epochs, *rest]) if rest else ""}
        said = ", ".join(f"{what} {time}" for what, time in times.items() if time)
        return said and f"left: {said}"

    def _time(self, epochs: Sequence[Epoch]) -> str:
        """Return about how long the epochs take; "" without a basis to tell."""
        known = {kind: median(seconds[-RECENT:]) for kind, seconds in self._seconds.items()}
        known = {k: known[like] for k, like in LIKE.items() if like in known} | known
        if any(epoch.kind not in known for epoch in epochs):
            return ""
        return tqdm.format_interval(sum(known[epoch.kind] for epoch in epochs))
