"""The trainings of `check_gpu.py`, the data that they need, and what of their logs is told."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable

from gpu_part import Part, Places

VGG = (
    "--PRETRAIN --ALQ --POSTTRAIN --epoch_pretrain 3 --milestones_pretrain 2 --lr_pretrain 1e-3 "
    "--target_bit 1.0 --pr 0.7 --epoch_basis 1 --epoch_coord 1 --epoch_ste 2 --epoch_post_coord 1"
)
RESNET = (
    "--PRETRAIN --ALQ --POSTTRAIN --net resnet18 --epoch_pretrain 1 --warmup_pretrain 0 --R 1 "
    "--epoch_basis 1 --epoch_coord 1 --epoch_ste 1 --epoch_post_coord 1 --val_size 256"
)
TINY = (
    "--batch_size 20 --val_size 15 --epoch_pretrain 1 --milestones_pretrain --max_bit 2 --R 1 "
    "--epoch_basis 1 --epoch_coord 1 --pr 0.4 --top_k 0.4 --epoch_ste 1 --epoch_post_coord 1"
)


def files(places: Places, name: str) -> list:
    folder = places.work / name
    own = ["--model_ori", folder / "ori.pth", "--model", folder / "model.pth"]
    return [*own, "--device", places.device]


def train_vgg(name: str, flags: str = "") -> Callable[[Places], list]:
    """Return the command that trains VGG on the coloured digits, anew each time."""

    def command(places: Places) -> list:
        data, own = places.work / "digits", [*files(places, name), *shlex.split(flags)]
        if places.small:
            stages = "--PRETRAIN --ALQ --POSTTRAIN"
            return ["tests/narrow.py", "vgg", data, *shlex.split(f"{stages} {TINY}"), *own]
        return ["tests/small_sets.py", "vgg", data, *shlex.split(VGG), *own]

    return command


def train_resnet(places: Places) -> list:
    """Return the command that trains ResNet18 on the made-up pictures."""
    data, own = places.work / "pictures", [*files(places, "resnet18"), "--amp"]
    if places.small:
        stages = shlex.split(f"--PRETRAIN --ALQ --POSTTRAIN {TINY}")
        return ["tests/narrow.py", "resnet", data, *stages, *own]
    return ["resnet.py", "--data", data, *shlex.split(RESNET), *own]


def train_lenet5(places: Places) -> list:
    """Return the command of the README, which goes on where it was stopped."""
    script = "tests/lenet5_on_a_sliver.py" if places.small else "lenet5.py"
    own = [*files(places, "lenet5"), *shlex.split(TINY if places.small else "")]
    return [script, "--PRETRAIN", "--ALQ", "--POSTTRAIN", "--resume", *own]


def read_log(name: str) -> Callable[[Places], dict]:
    """Return what reads a training's log: seconds of the epochs by kind, and the results.

    The log itself is copied to the other results.
    """

    def read(places: Places) -> dict:
        log = (places.work / name / "model.jsonl").read_text()
        (places.output / f"{name}.jsonl").write_text(log)
        events = list(map(json.loads, log.splitlines()))
        last = max(k for k, event in enumerate(events) if event["event"] == "start")
        epochs = [event for event in events[last:] if event["event"] == "epoch"]
        seconds: Counter[str] = Counter()
        for epoch in epochs:
            seconds[f"{epoch['stage']} {epoch['kind']}"] += epoch["seconds"]
        count = Counter(f"{epoch['stage']} {epoch['kind']}" for epoch in epochs)
        results = [event for event in events[last:] if event["event"] == "result"]
        return {
            "epochs": len(epochs),
            "seconds an epoch": {k: round(s / count[k], 2) for k, s in seconds.items()},
            "results": results,
            "last validation accuracy": epochs[-1]["val_accuracy"],
        }

    return read


def training_lines(result: dict | None) -> list[str]:
    if not isinstance(result, dict):
        return []
    each = ", ".join(f"{kind} {s}" for kind, s in result["seconds an epoch"].items())
    lines = [f"{result['epochs']} epochs; seconds an epoch: {each}"]
    for found in result["results"]:
        size = "" if found["bitwidth"] is None else f", {found['bitwidth']:.3f} bit"
        top1 = found["top1_fp"] if found["top1"] is None else found["top1"]
        lines.append(f"{found['stage']}: {top1:.2f} %{size}")
    return lines


def digits(places: Places) -> list:
    count = 300 if places.small else 50_000
    return ["tests/small_sets.py", "cifar", places.work / "digits", count]


def pictures(places: Places) -> list:
    sizes = "--train 60 --val 20 --size 80 60" if places.small else "--train 4096 --val 512"
    script = "benchmarks/made_up_pictures.py"
    return [script, places.work / "pictures", *shlex.split(sizes)]


def nothing(places: Places) -> None:
    """Return the result of a part that only makes what others need."""


def training(name: str, title: str, command: Callable, **more: object) -> Part:
    return Part(name, title, command, read_log(name), training_lines, **more)
