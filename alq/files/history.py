"""What logs tell of runs: the events of a log, and the epochs that count."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

from ..errors import InputError

STAGES = {"pretrain": "pretraining", "alq": "ALQ", "posttrain": "post-training"}
ORDER = list(STAGES)
FULL_PRECISION = 32  # bits of a weight that is not quantized


def read_events(log: Path) -> list[dict]:
    """Return the events in a log; a torn last line, of a killed process, is left out.

    Raises: InputError names the file and the line that is none of a log.
    """
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{log} cannot be read: {error.strerror or error}") from error
    events = []
    for number, line in enumerate(lines[:-1] or lines, 1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            raise InputError(f"{log}, line {number}: no line of a run's log (JSON with an 'event')")
        events.append(event)
    return events


class History:
    """What a log tells of a run: of each stage, the last time that it ran.

    Attributes:
        name: the log's, without its ending.
        epochs: the events of the epochs; number 0 has what was there before the first. The last of
            a round or a stage also has the accuracy on the test set, "test".
        starts: how many epochs there were before each stage.
    """

    def __init__(self, log: Path) -> None:
        self.name = log.name.removesuffix(".jsonl")
        self.epochs: list[dict] = []
        self.starts: dict[str, int] = {}
        for number, event in enumerate(read_events(log), 1):
            try:
                self._take(event)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{log}, line {number}: is not as a run logs it") from error
        if not any(epoch["epoch"] for epoch in self.epochs):
            raise InputError(f"{log}: tells of no epoch; the first is logged at its end")
        align([self])

    def _take(self, event: Mapping) -> None:
        kind, stage = event["event"], event.get("stage")
        stage = stage if stage in STAGES else "alq"
        if kind == "plan":
            self._forget("alq", 0)
        elif kind == "start" and event.get("stages"):
            self._forget(min((name.lower() for name in event["stages"]), key=ORDER.index), 0)
        elif kind in ("before", "epoch"):
            epoch = {"epoch": 0, "round": 0, **event, "stage": stage}
            if kind == "epoch" and event["bitwidth"] is None:
                epoch["bitwidth"] = FULL_PRECISION
            self._forget(stage, epoch["epoch"])
            self.epochs.append(epoch)
        elif kind in ("round", "result"):
            if not self.epochs or self.epochs[-1]["stage"] != stage:
                self.epochs.append({"epoch": 0, "stage": stage})
            self.epochs[-1]["test"] = event.get("top1_fp" if stage == "pretrain" else "top1")

    def _forget(self, stage: str, number: int) -> None:
        """Drop epoch `number` of the stage and all that came after it: that is void."""
        end = ORDER.index(stage), number
        self.epochs = [e for e in self.epochs if (ORDER.index(e["stage"]), e["epoch"]) < end]

    def series(self, key: str) -> numpy.ndarray:
        """Return the numbers of epochs done at which `key` is known, and its values."""
        known = [epoch for epoch in self.epochs if epoch.get(key) is not None]
        points = [(self.starts[epoch["stage"]] + epoch["epoch"], epoch[key]) for epoch in known]
        return numpy.array(points, float).reshape(-1, 2).T

    def bits_by_layer(self) -> dict[str, dict[str, float]]:
        """Return the layers' and the "network"'s bits as sketched, and after each round."""
        found: dict[str, dict] = {}
        for epoch in (epoch for epoch in self.epochs if epoch.get("bitwidths")):
            pruned, first = epoch["kind"] == "prune", epoch["stage"] == "alq" and epoch["round"] < 2
            if pruned or not found:
                column = str(epoch["round"]) if pruned else "sketch" if first else "start"
                found[column] = {**epoch["bitwidths"], "network": epoch["bitwidth"]}
        return found


def align(runs: Sequence[History]) -> None:
    """Let each stage of the runs start together, after the longest of the stages before."""
    starts, done = {}, 0
    for stage in STAGES:
        starts[stage] = done
        done += max([e["epoch"] for run in runs for e in run.epochs if e["stage"] == stage] or [0])
    for run in runs:
        run.starts = starts
