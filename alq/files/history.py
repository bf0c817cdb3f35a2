"""What logs tell of runs: the events of a log, and the epochs that count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError

STAGES = {"pretrain": "pretraining", "alq": "ALQ", "posttrain": "post-training"}
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
        epochs: by stage and number, the events of the epochs; number 0 has what was there before.
            The last of a round or a stage also has the accuracy on the test set, "test".
    """

    def __init__(self, log: Path) -> None:
        self.name = log.name.removesuffix(".jsonl")
        self.epochs: dict[str, dict[int, dict]] = {}
        for number, event in enumerate(read_events(log), 1):
            try:
                self._take(event)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{log}, line {number}: is not as a run logs it") from error
        if not any(map(any, self.epochs.values())):
            raise InputError(f"{log}: tells of no epoch; the first is logged at its end")

    def _take(self, event: Mapping) -> None:
        kind, stage = event["event"], event.get("stage")
        stage = stage if stage in STAGES else "alq"
        if kind == "plan":
            self._forget("alq")
        elif kind == "start" and event.get("stages"):
            self._forget(min((s.lower() for s in event["stages"]), key=list(STAGES).index))
        elif kind in ("before", "epoch"):
            number = int(event["epoch"]) if kind == "epoch" else 0
            self._forget(stage, number)
            if number and event["bitwidth"] is None:
                event = {**event, "bitwidth": FULL_PRECISION}
            self.epochs.setdefault(stage, {})[number] = dict(event)
        elif kind in ("round", "result"):
            epochs = self.epochs.setdefault(stage, {0: {}})
            epochs[max(epochs)]["test"] = event.get("top1_fp" if stage == "pretrain" else "top1")

    def _forget(self, stage: str, number: int = 0) -> None:
        """Drop epoch `number` of the stage and all that came after it: that is void."""
        kept = {n: e for n, e in self.epochs.get(stage, {}).items() if n < number}
        for later in list(STAGES)[list(STAGES).index(stage) :]:
            self.epochs.pop(later, None)
        if kept:
            self.epochs[stage] = kept

    def series(self, key: str, starts: Mapping[str, int]) -> tuple[list[int], list[float]]:
        """Return the numbers of epochs done at which `key` is known, and its values.

        `starts` are the numbers of epochs before each stage.
        """
        points = [
            (starts[stage] + number, float(epoch[key]))
            for stage, number, epoch in self._all()
            if epoch.get(key) is not None
        ]
        return [x for x, _ in points], [y for _, y in points]

    def names(self, starts: Mapping[str, int], rounds: bool) -> dict[int, str]:
        """Return what each epoch is part of: a stage or, where `rounds` are asked for, a round."""
        return {
            starts[stage] + n: f"round {e['round']}" if rounds and e["round"] else STAGES[stage]
            for stage, n, e in self._all()
            if n
        }

    def bits_by_layer(self) -> dict[str, dict[str, float]]:
        """Return the layers' and the "network"'s bits as sketched, and after each round."""
        found: dict[str, dict] = {}
        for stage, _, epoch in self._all():
            if layers := epoch.get("bitwidths"):
                pruned = epoch["kind"] == "prune"
                if pruned or not found:
                    sketched = stage == "alq" and epoch["round"] <= 1
                    column = str(epoch["round"]) if pruned else "sketch" if sketched else "start"
                    found[column] = {**layers, "network": epoch["bitwidth"]}
        return found

    def _all(self) -> list[tuple[str, int, dict]]:
        return [(s, n, self.epochs[s][n]) for s in STAGES for n in sorted(self.epochs.get(s, ()))]
