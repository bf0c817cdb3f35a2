"""What to run first on a GPU: `make check-gpu`, or `python3 benchmarks/check_gpu.py --output DIR`.

Needs torch, torchvision, numpy, safetensors, tqdm and pytest, and no network. Each part is a
process of its own, of at most 10 minutes; together they take at most 30. Part NAME leaves
DIR/NAME.json: the part, its command, seconds, status and result, the device and the version of
torch; and what it printed in DIR/NAME.txt. A part that fails does not stop the others. Exit code 1
if one failed or was left out.

    python3 benchmarks/check_gpu.py --parts tests steps     # some of them
    python3 benchmarks/check_gpu.py --device cpu --small    # whether this script itself works

The training on 50 000 pictures has MNIST's digits in colour, in CIFAR-10's files. The ILSVRC12
pictures are made up. So both tell times and whether training works; no accuracy compares with the
paper's, but that of LeNet5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_part import Part, Places
from gpu_parts import PARTS

ROOT = Path(__file__).resolve().parents[1]
GRACE = 60  # seconds that a part has to save its state, once it is asked to stop


def run(part: Part, places: Places, left: float) -> dict:
    """Run one part within `left` seconds; return what its JSON holds."""
    command = [sys.executable, *part.command(places)]
    limit = min(60 * part.minutes, left)
    started, status = time.monotonic(), "left out: no time"
    result: object = None
    if limit > 30:
        with (places.output / f"{part.name}.txt").open("w") as printed:
            code = finish(command, limit, printed)
        status = describe(code, part.resumable)
        if status != "failed" or (part.name == "tests" and code == 1):  # some tests failed
            try:
                result = part.read(places)
            except (OSError, LookupError, ValueError) as error:
                status, result = "failed", f"no result: {error!r}"
    tests = result if part.name == "tests" and isinstance(result, dict) else None
    if tests is not None and (tests["failed"] or not tests["passed"]):
        status = "failed"
    shown = ["python3", *(str(word) for word in command[1:])]
    return {
        "part": part.name,
        "title": part.title,
        "command": " ".join(shown),
        "seconds": round(time.monotonic() - started, 1),
        "status": status,
        "result": result,
        **machine(places.device),
    }


def finish(command: list, limit: float, printed: object) -> int | None:
    """Run a command to its end and return its exit code; None if it did not stop when asked to."""
    environment = {**os.environ, "ALQ_CHECK_GPU": "1"}
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=printed,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            for wait, number in ((limit, signal.SIGTERM), (GRACE, signal.SIGKILL)):
                try:
                    return process.wait(wait)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, number)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return None


def describe(code: int | None, resumable: bool) -> str:
    """Return the status that an exit code stands for."""
    if code == 0:
        return "ok"
    if code == 143 and resumable:
        return "stopped: time is up; the same part goes on from there"
    return "failed"


def machine(device: str) -> dict[str, object]:
    """Describe what a result depends on."""
    on_cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "capability": list(torch.cuda.get_device_capability(device)) if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("checkpoints/check_gpu"), metavar="DIR")
    parser.add_argument(
        "--work", type=Path, default=Path("checkpoints/check_gpu_work"), metavar="DIR",
        help="for data and trainings, 1.5 GB",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu to try this out")
    parser.add_argument("--small", action="store_true", help="tiny networks and data: a rehearsal")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], metavar="PART",
        default=[part.name for part in PARTS], help=", ".join(part.name for part in PARTS),
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=30, help="for all parts together (30)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the part is ended, too
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu --small works")
    work = args.work.resolve() / ("small" if args.small else "full")
    places = Places(args.output.resolve(), work, args.device, args.small)
    for folder in (places.output, places.work):
        folder.mkdir(parents=True, exist_ok=True)
    end, reports = time.monotonic() + 60 * args.minutes, []
    for part in (part for part in PARTS if part.name in args.parts):
        report = run(part, places, end - time.monotonic())
        (places.output / f"{part.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        reports.append(report)
        line = f"{part.name:18}{report['seconds']:7.0f} s  {report['status']}"
        print(line, *part.lines(report["result"]), sep="\n    ", flush=True)
    print(f"{reports[-1]['device']}, torch {reports[-1]['torch']}; results in {places.output}")
    raise SystemExit(any(r["status"].startswith(("failed", "left out")) for r in reports))


if __name__ == "__main__":
    main()
