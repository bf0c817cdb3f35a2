"""What the logs of the scripts' runs say: which command made which stage, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alq.errors import InputError
from alq.files.history import read_events
from alq.files.runlog import plain_flags
from networks import NETWORKS

STAGES = ("pretrain", "alq", "posttrain")
# Flags that a run of the default schedule may set: they name files, data, stages and the machine,
# or what is drawn at random. All others say how a network is trained or what is computed.
MAY_DIFFER = {
    "PRETRAIN", "ALQ", "POSTTRAIN", "DOWNLOAD", "EVAL", "data", "dataset", "model", "model_ori",
    "seed", "device", "threads", "workers", "channels_last", "cudnn_benchmark", "deterministic",
    "resume", "save_every", "tensorboard",
}  # fmt: skip
# Flags that are gone, and what they were by default.
GONE = {"distill": 0.0, "temperature": 4.0, "per_byte": False}
NEEDED = {
    "start": ("net", "stages", "flags", "device", "threads", "time"),
    "result": ("bitwidth", "storage_bytes", "top1", "top1_fp", "seconds"),
}


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        commands: the `start` event of the command that ran it, and the `resume` events of those
            that went on with it.
        result: its `result` event, None while it has none.
    """

    commands: list[dict]
    result: dict | None = None

    def said(self, key: str) -> list:
        """Return what its commands' events say of `key`, each value once."""
        return list(dict.fromkeys(command.get(key) for command in self.commands))


@dataclass
class Run:
    """The stages that a log tells of, the last run of each."""

    log: Path
    net: str = ""
    stages: dict[str, Stage] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Tell whether all three stages have come to their end."""
        return all(name in self.stages and self.stages[name].result for name in STAGES)

    @property
    def commands(self) -> list[dict]:
        """Return the commands of all stages."""
        return [command for stage in self.stages.values() for command in stage.commands]

    @property
    def dataset(self) -> str | None:
        """Return the stages' data set, the paper's where a log tells none; None if they differ."""
        paper = NETWORKS[self.net].recipe.dataset if self.net in NETWORKS else None
        found = {command.get("dataset", paper) for command in self.commands}
        return found.pop() if len(found) == 1 else None

    @property
    def default(self) -> bool:
        """Tell whether the commands of all stages had the flags of the default schedule."""
        alike = (has_default_flags(c["net"], c["flags"]) for c in self.commands)
        return self.dataset is not None and all(alike)

    @property
    def final(self) -> dict:
        """Return the result of post-training."""
        return self.stages["posttrain"].result

    def take(self, command: dict) -> None:
        """Note what a `start` or `resume` event begins."""
        self.net = command["net"]
        named = [name for name in STAGES if name.upper() in command["stages"]]
        if command["event"] == "resume":
            left = [n for n in named if n not in self.stages or not self.stages[n].result]
            for name in left[:1]:  # the stage that was interrupted
                self.stages.setdefault(name, Stage([])).commands.append(command)
            named = left[1:]
        else:  # what followed from these stages' earlier results is void
            for name in STAGES[STAGES.index(named[0]) if named else 0 :]:
                self.stages.pop(name, None)
        self.stages.update({name: Stage([command]) for name in named})


def read_run(log: Path) -> Run:
    """Return the run that `log` tells of; it has no stages if no script's command made it.

    Raises: InputError names the file and the line that cannot be read.
    """
    run = Run(log)
    for number, event in enumerate(read_events(log), 1):
        if event["event"] in ("start", "resume") and "stages" in event:
            check_fields(event, "start", f"{log}, line {number}")
            run.take(event)
        elif event["event"] == "result" and event.get("stage") in run.stages:
            check_fields(event, "result", f"{log}, line {number}")
            run.stages[event["stage"]].result = event
    return run


def result_of(log: Path, stage: str) -> dict | None:
    """Return a stage's last result in a log, None where there is none, or no log."""
    found = read_events(log) if log.exists() else []
    return next((e for e in found[::-1] if e["event"] == "result" and e["stage"] == stage), None)


def check_fields(event: dict, kind: str, where: str) -> None:
    """Raise InputError if an event lacks a field that its kind has."""
    if lacking := [name for name in NEEDED[kind] if name not in event]:
        raise InputError(f"{where}: the event '{event['event']}' has no '{lacking[0]}'")


def read_runs(folder: Path) -> list[Run]:
    """Return the finished runs in a folder of logs, by name.

    Raises: InputError if the folder holds no logs, or something else under a log's name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds logs (*.jsonl)")
    logs = sorted(folder.glob("*.jsonl"))
    if not logs:
        raise InputError(f"{folder}: no logs (*.jsonl) in it; name a folder that holds some")
    return [run for run in map(read_run, logs) if run.finished]


def has_default_flags(net: str, flags: dict) -> bool:
    """Tell whether a command's flags are its script's defaults, but for those that MAY_DIFFER.

    One that neither the script nor GONE knows may be off. One that the log does not know came
    later, and is off unless it is given.
    """
    if net not in NETWORKS:
        return False
    defaults = {**GONE, **plain_flags(NETWORKS[net].default_flags())}
    return all(
        value == defaults[name] if name in defaults else value is False
        for name, value in flags.items()
        if name not in MAY_DIFFER
    )
