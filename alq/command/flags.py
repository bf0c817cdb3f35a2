"""The command line that the entry scripts share: published names, their defaults, their checks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..method.structures import STRUCTURES


class OneLineParser(argparse.ArgumentParser):
    """Refuses bad input with one line on stderr and exit code 2. Flags are not abbreviated."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.quit(2, f"{message} (-h explains every flag)", "error: ")

    def quit(self, code: int, message: str, kind: str = "") -> None:
        """Exit after one line on stderr."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a torchrun
            print(f"{self.prog}: {kind}{' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(code)


def bounded(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable:
    """An argparse type: a number of `kind` in [low, high], or (low, high] when `open_low`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if open_low else low <= value) or value > high or value == float("inf"):
            limits = f"{'above' if open_low else 'at least'} {low}"
            limits += f" and at most {high}" if high != float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {limits}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # as argparse's messages call it
    return parse


def file(text: str) -> Path:
    """An argparse type: a file's name."""
    path = Path(text)
    if not path.name or path.name == ".." or "\0" in text or len(os.fsencode(path.name)) > 200:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no name for a file; give one of 1 to 200 bytes, such as run/model.pth"
        )
    return path


def device(text: str) -> torch.device:
    """An argparse type: a device that is there."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found).tolist()  # the device "meta" holds no values
    except Exception as error:  # each kind of device has its own way to say no
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot be used here ({reason}); give cpu, or a device that is there"
        ) from error
    return found


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# Flags that may differ between a run and its resumption. Other devices, numbers of threads and
# compiled steps add in another order, so that their results differ in the last digits; floats and
# coded are the packed file's; all others change nothing.
MAY_CHANGE = (
    "data", "model", "model_ori", "device", "threads", "workers", "compile", "save_every",
    "floats", "coded",
)  # fmt: skip
# What a command does, which its resumption may do the rest of.
NOT_COMPARED = ("PRETRAIN", "ALQ", "POSTTRAIN", "DOWNLOAD", "EVAL", "resume")

count = bounded(int, 0, 10**9)
positive = bounded(int, 1, 10**9)
some_epochs = bounded(int, 0, 10**5)
epochs = bounded(int, 1, 10**5)
seed = bounded(int, 0, 10**12)  # times a million, with the epoch's number, it fits 64 bits
threads = bounded(int, 1, 4096)
rate = bounded(float, 0, open_low=True)
factor = bounded(float, 0, 1, open_low=True)

# Stage, then (flag, type, metavar, help). The defaults are each script's own.
STAGE_FLAGS = {
    "pretraining (--PRETRAIN)": [
        ("epoch_pretrain", epochs, "N", "epochs of full-precision training"),
        ("lr_pretrain", rate, "RATE", "learning rate"),
        ("milestones_pretrain", count, "EPOCH", "epochs before which the rate is cut"),
        ("ld_pretrain", factor, "FACTOR", "the rate is multiplied by this at each milestone"),
        ("warmup_pretrain", some_epochs, "N", "epochs over which the rate first rises linearly"),
    ],
    "adaptive quantization (--ALQ)": [
        ("lr", rate, "RATE", "learning rate at the start of a round, and of post-training"),
        ("R", epochs, "N", "rounds of basis, coordinate and pruning epochs"),
        ("epoch_prune", epochs, "N", "pruning epochs a round"),
        ("epoch_basis", some_epochs, "N", "epochs a round that optimise the bases B"),
        ("ld_basis", factor, "FACTOR", "rate factor before each basis epoch"),
        ("epoch_coord", some_epochs, "N", "epochs a round that optimise the coordinates alpha"),
        ("ld_coord", factor, "FACTOR", "rate factor before each coordinate epoch"),
        ("wd", bounded(float, 0), "WD", "weight decay of the coordinates (coordinate epochs)"),
        ("pr", bounded(float, 0, 1, True), "SHARE", "share of the coordinates to prune a round"),
        (
            "top_k",
            bounded(float, 0, 1, True),
            "SHARE",
            "share of a layer that is a candidate at a batch",
        ),
        (
            "target_bit",
            rate,
            "BITS",
            "prune to this average bitwidth, whatever rounds it takes",
        ),
        ("target_kb", rate, "KB", "prune to this storage of the weights (1e3 bytes), likewise"),
    ],
    "post-training (--POSTTRAIN)": [
        ("epoch_ste", some_epochs, "N", "epochs of basis steps on a full-precision copy"),
        ("ld_ste", factor, "FACTOR", "rate factor before each of them"),
        ("epoch_post_coord", some_epochs, "N", "epochs of coordinate steps after them"),
        ("ld_post_coord", factor, "FACTOR", "rate factor before each of those"),
        ("lr_post_coord", rate, "RATE", "rate that they start from (default: go on from the last)"),
    ],
}


def make_parser(
    description: str,
    defaults: dict,
    prog: str | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """The shared flags with one script's `defaults`; a script may add its own afterwards."""
    parser = OneLineParser(
        prog=prog,
        description=description,
        parents=parents,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for add in (
        _add_stages, _add_files, _add_quantizer, _add_numbers, _add_extras, _add_machine,
    ):  # fmt: skip
        add(parser)
    shared = {
        "warmup_pretrain": 0,
        "lr_post_coord": None,
        "target_bit": None,
        "target_kb": None,
        "wd": 0.0,
        "seed": 0,
        "device": default_device(),
    }
    parser.set_defaults(**{**shared, **defaults})
    return parser


def _add_stages(parser: argparse.ArgumentParser) -> None:
    """Which stages to run."""
    stages = parser.add_argument_group("stages (any of them, run in this order)")
    stages.add_argument("--PRETRAIN", action="store_true", help="train the full-precision network")
    stages.add_argument("--ALQ", action="store_true", help="quantize --model_ori adaptively")
    stages.add_argument(
        "--POSTTRAIN", action="store_true", help="train the quantized --model further"
    )

    stages.add_argument(
        "--EVAL", type=file, metavar="FILE",
        help="test the packed FILE (.alq) and nothing else; no stage and no checkpoint is needed",
    )  # fmt: skip


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Data and files."""
    files = parser.add_argument_group("data and files")
    files.add_argument("--data", type=Path, metavar="DIR", help="where the data set lies")
    files.add_argument(
        "--val_size", type=positive, metavar="N", help="training images held out for validation"
    )
    files.add_argument(
        "--batch_size", type=positive, metavar="N", help="images a batch, over all processes"
    )
    files.add_argument("--model_ori", type=file, metavar="FILE", help="full-precision checkpoint")
    files.add_argument(
        "--model", type=file, metavar="FILE", help="quantized checkpoint; its log is beside it"
    )


def _add_quantizer(parser: argparse.ArgumentParser) -> None:
    """How weights are grouped."""
    quantizer = parser.add_argument_group(
        "multi-bit weights (one value for all layers, or one per layer in the network's order)"
    )
    quantizer.add_argument(
        "--structure", nargs="+", choices=STRUCTURES, help="which weights form a group"
    )
    quantizer.add_argument(
        "--subc", nargs="+", type=count, metavar="N",
        help="pieces of an output row, for subchannelwise layers; 0 for others",
    )  # fmt: skip
    quantizer.add_argument(
        "--max_bit",
        nargs="+",
        type=bounded(int, 1, 8),
        metavar="I",
        help="bits a weight starts from, 1 to 8",
    )


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    """The numbers of each stage (STAGE_FLAGS)."""
    for title, flags in STAGE_FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, metavar, text in flags:
            nargs = "*" if name.startswith("milestones") else None
            group.add_argument(f"--{name}", type=kind, nargs=nargs, metavar=metavar, help=text)


def _add_extras(parser: argparse.ArgumentParser) -> None:
    """What the paper does not do; all off by default."""
    extras = parser.add_argument_group("beyond the paper (--ALQ, --POSTTRAIN)")
    extras.add_argument(
        "--distill", type=bounded(float, 0, 1), default=0.0, metavar="WEIGHT",
        help="share of the loss that compares with the answers of --model_ori",
    )  # fmt: skip
    extras.add_argument(
        "--temperature", type=rate, default=4.0, metavar="T",
        help="what --distill divides the logits by, which softens the answers",
    )  # fmt: skip
    extras.add_argument(
        "--per_byte", action="store_true",
        help="prune the coordinates that cost the loss least per byte saved, not each",
    )  # fmt: skip

    extras.add_argument(
        "--floats", choices=["float32", "float16"], default="float32",
        help="how the packed file holds coordinates, biases and normalisation; the stage that "
        "writes it rounds them before its test",
    )  # fmt: skip
    extras.add_argument(
        "--coded", action="store_true",
        help="entropy-code bitwidths and exponents in the packed file",
    )  # fmt: skip


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """Seed, device, precision."""
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--seed", type=seed, metavar="N", help="of the split, the start, the order, the pruning"
    )
    machine.add_argument("--device", type=device, help="cpu, cuda, cuda:1, mps, ...")
    machine.add_argument(
        "--threads", type=threads, metavar="N", help="CPU threads (default: torch's choice)"
    )
    machine.add_argument(
        "--amp",
        action="store_true",
        help="the network's forward and backward pass in bfloat16 where that is safe; gradients, "
        "moments, alpha and all of the quantizer stay float32",
    )
    machine.add_argument(
        "--tf32",
        action="store_true",
        help="convolutions in TensorFloat-32 on CUDA; without it, and in all else, float32",
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network and the quantizer's steps: minutes at the start, and "
        "seconds whenever a layer's largest number of bits changes. Needs a C++ compiler",
    )
    machine.add_argument(
        "--deterministic",
        action="store_true",
        help="kernels that add in a fixed order on CUDA, too: the same seed gives the same bits; "
        "slower. The CPU needs no flag. A warning names what has no such kernel",
    )
    machine.add_argument(
        "--save_every", type=bounded(float, 0), metavar="MINUTES", default=10.0,
        help="resume point within an epoch, besides that after each; 0 for none",
    )  # fmt: skip
    machine.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last resume point; the flags must be those of the run, but for "
        f"{', '.join(f'--{flag}' for flag in MAY_CHANGE)}; stages that are done may be left out",
    )


def one_or_each(values: Sequence | None) -> object:
    """A flag's list as `alq.quantize` takes it: a list of one stands for all layers."""
    return values[0] if values is not None and len(values) == 1 else values
