"""The parts of `check_gpu.py`: what each runs, and what of its output is the result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

from gpu_part import Part, Places
from gpu_trainings import digits, nothing, pictures, train_lenet5, train_resnet, train_vgg, training
from performance_tables import share_of_step


def tests(places: Places) -> list:
    chosen = "recorded and not cuda" if places.small else "not cpu and not pretend"
    own = ["-q", "-rf", "-p", "no:cacheprovider", "-k", chosen]
    return ["-m", "pytest", "tests/gpu", *own, f"--junitxml={places.output / 'tests.xml'}"]


def read_tests(places: Places) -> dict:
    """Return how many tests passed, and the names and messages of those that did not."""
    cases = list(ElementTree.parse(places.output / "tests.xml").iter("testcase"))
    passed = [case for case in cases if not len(case)]
    left = {case.get("name"): case[0] for case in cases if len(case)}
    return {
        "passed": len(passed),
        "skipped": [name for name, why in left.items() if why.tag == "skipped"],
        "failed": {n: why.get("message") for n, why in left.items() if why.tag != "skipped"},
    }


def test_lines(result: dict | None) -> list[str]:
    if not isinstance(result, dict):
        return []
    return [f"{result['passed']} passed", *(f"failed: {name}" for name in result["failed"])]


def benchmark(
    name: str, script: str, lines: Callable, full: str = "", small: str = "", title: str = ""
) -> Part:
    """Return the part that runs a script of benchmarks/, which takes --device and --json."""

    def command(places: Places) -> list:
        flags = shlex.split(small if places.small else full)
        return [f"benchmarks/{script}.py", *flags, "--device", places.device, *figures(places)]

    def figures(places: Places) -> list:
        return ["--json", places.output / f"{name}_figures.json"]

    def read(places: Places) -> object:
        return json.loads(figures(places)[1].read_text())["rows"]

    return Part(name, title, command, read, lines)


def step_lines(found: list[dict] | None) -> list[str]:
    steps = ("basis", "coordinate", "prune", "ste", "amsgrad")
    return [
        f"{row['network']}, {row['bitwidth']:.2f} bit: "
        + ", ".join(
            f"{name} {1e3 * seconds:.2f}"
            for name, seconds in row["seconds"].items()
            if name.removesuffix(" compiled") in steps
        )
        + " ms"
        for row in found or []
    ]


def share_lines(found: list[dict] | None) -> list[str]:
    return [
        f"{row['network']}, {row['bitwidth']:.2f} bit, batch {row['batch']}: forward and backward "
        f"{1e3 * row['seconds']['forward + backward']:.1f} ms, basis step "
        f"{1e3 * row['seconds']['basis']:.1f} ms, its share {share_of_step(row, ''):.0f} %"
        for row in found or []
    ]


def layout_lines(found: list[dict] | None) -> list[str]:
    return [
        f"{row['network']}, {row['precision']}, {row['layout']}, "
        f"{'with' if row['benchmark'] else 'without'} benchmark: {row['milliseconds']:.2f} ms"
        for row in found or []
    ]


def loader_lines(found: dict | None) -> list[str]:
    return [f"{way}: {rate:.0f} pictures/s" for way, rate in (found or {}).items()]


def memory(network: str) -> Part:
    """Return the part that measures the peak memory of the network's basis step."""
    name = f"memory_{network}"

    def command(places: Places) -> list:
        return ["tests/memory.py", places.device, "lenet5" if places.small else network]

    def read(places: Places) -> str:
        return (places.output / f"{name}.txt").read_text().strip().splitlines()[-1]

    return Part(name, f"memory of {network}'s basis step", command, read)


def load_pictures(places: Places) -> list:
    flags = ["--workers", "0", "--repeats", "1", "--batch_size", "8"] if places.small else []
    return [*LOADER.command(places), places.work / "pictures", *flags]


SMALL = "--network lenet5 --repeats 1"
STEPS = f"{SMALL} --bits 2"
LOADER = benchmark("loader", "loader", loader_lines, title="pictures a second of ILSVRC12's loader")
PARTS = [
    Part("tests", "the GPU's steps and files beside the CPU's", tests, read_tests, test_lines),
    benchmark("steps", "steps", step_lines, "", STEPS, "time and memory of the steps"),
    benchmark(
        "steps_compiled", "steps", step_lines, "--compile", STEPS,
        "the same, compiled ones beside them",
    ),
    benchmark(
        "training_step", "training_step", share_lines, "", f"{STEPS} --batch 4",
        "the basis step's share of a training step",
    ),
    benchmark(
        "layouts", "layouts", layout_lines, "", f"{SMALL} --batch 4",
        "the network's pass by layout, precision and choice of kernels",
    ),
    *map(memory, ("vgg", "resnet18", "resnet34")),
    Part("digits", "CIFAR-10's files with 50 000 coloured digits", digits, nothing),
    *(
        training(
            f"vgg_{name}", f"a short VGG schedule on them, {flags or 'float32'}",
            train_vgg(f"vgg_{name}", flags),
        )
        for name, flags in (
            ("float32", ""), ("tf32", "--tf32"), ("amp", "--amp"),
            ("amp_compile", "--amp --compile"),
        )
    ),
    Part("pictures", "made-up pictures in ILSVRC12's folders", pictures, nothing),
    replace(LOADER, command=load_pictures),
    training("resnet18", "a short ResNet18 schedule on them, --amp", train_resnet),
    training("lenet5", "the README's LeNet5", train_lenet5, resumable=True),
]  # fmt: skip
