"""The command line that the entry scripts share: every flag, group by group as -h shows them.

Each group is a table of argparse's options by flag. Most defaults are each script's own.
"""

import argparse
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files.floats import FLOATS
from ..method.structures import STRUCTURES
from . import arguments as a

# Flags that may differ between a run and its resumption. Other devices, numbers of threads, layouts
# and kernels add in another order, so that their results differ in the last digits; floats, coded
# and fold are the packed file's; all others change nothing.
MAY_CHANGE = (
    "data", "model", "model_ori", "device", "threads", "workers", "compile", "channels_last",
    "cudnn_benchmark", "save_every", "floats", "coded", "fold", "tensorboard",
)  # fmt: skip
ACT_FROM = ("alq", "pretrain")  # the stages that binary activations can begin with
# What a command does, which its resumption may do the rest of; its data set is compared apart.
NOT_COMPARED = ("PRETRAIN", "ALQ", "POSTTRAIN", "EVAL", "packed", "resume", "dataset")


def number(parse: object, metavar: str, text: str, default: float | None = None) -> dict:
    """Return the options of a flag that takes one value."""
    return {"type": parse, "metavar": metavar, "help": text, "default": default}


def dataset_flag(names: Iterable[str]) -> dict:
    """Return the options of --dataset: one of the names, by default the first, the paper's."""
    paper, *others = names
    text = (
        f"the data; another than {paper}, the paper's, is in the default names of the checkpoints "
        "(checkpoints/NET_DATASET_model.pth)"
    )
    return {"choices": [paper, *others], "default": paper, "help": text}


def switch(text: str) -> dict:
    """Return the options of a flag that takes none."""
    return {"action": "store_true", "help": text}


def either(text: str) -> dict:
    """Return the options of a flag that can be given as --flag and as --no-flag, or left out."""
    return {"action": argparse.BooleanOptionalAction, "help": text}


# In the order of the published scripts.
PUBLISHED = {
    "data": number(Path, "DIR", "where the data set lies"),
    "val_size": number(a.positive, "N", "training images held out for validation"),
    "model_ori": number(a.file, "FILE", "full-precision checkpoint"),
    "model": number(a.file, "FILE", "quantized checkpoint; its log is beside it"),
    "PRETRAIN": switch("stage 1: train the full-precision network"),
    "ALQ": switch("stage 2: quantize --model_ori adaptively"),
    "POSTTRAIN": switch("stage 3: train the quantized --model further"),
    "lr": number(a.rate, "RATE", "learning rate at the start of a round, and of post-training"),
    "R": number(a.epochs, "N", "rounds of basis, coordinate and pruning epochs"),
    "epoch_prune": number(a.epochs, "N", "pruning epochs a round"),
    "epoch_basis": number(a.some_epochs, "N", "epochs a round that optimise the bases B"),
    "ld_basis": number(a.factor, "FACTOR", "rate factor before each basis epoch"),
    "epoch_coord": number(a.some_epochs, "N", "epochs a round that optimise the coordinates alpha"),
    "ld_coord": number(a.factor, "FACTOR", "rate factor before each coordinate epoch"),
    "wd": number(
        a.at_least_0, "WD", "weight decay of the coordinates (coordinate and pruning epochs)", 0.0
    ),
    "pr": number(a.share, "PR", "pruning ratio: a round leaves about exp(-PR) of the coordinates"),
    "top_k": number(a.share, "SHARE", "share of a layer that is a candidate at a batch"),
    "structure": {
        "nargs": "+", "choices": STRUCTURES,
        "help": "which weights form a group; one value for all layers, or one per layer in the "
        "network's order",
    },
    "subc": {
        "nargs": "+", "type": a.count, "metavar": "N",
        "help": "pieces of an output row, for subchannelwise layers; 0 for others; likewise",
    },
    "max_bit": {
        "nargs": "+", "type": a.bits, "metavar": "I",
        "help": "bits a weight starts from, 1 to 8; likewise",
    },
    "batch_size": number(a.positive, "N", "images a batch, over all processes"),
}  # fmt: skip

BURIED = {
    "epoch_pretrain": number(a.epochs, "N", "epochs of full-precision training"),
    "lr_pretrain": number(a.rate, "RATE", "its learning rate"),
    "milestones_pretrain": {
        "nargs": "*", "type": a.count, "metavar": "EPOCH",
        "help": "epochs before which the rate is cut",
    },
    "ld_pretrain": number(a.factor, "FACTOR", "the rate is multiplied by this at each milestone"),
    "warmup_pretrain": number(
        a.some_epochs, "N", "epochs over which the rate first rises linearly", 0
    ),
    "epoch_ste": number(
        a.some_epochs, "N", "post-training epochs of basis steps on a full-precision copy"
    ),
    "ld_ste": number(a.factor, "FACTOR", "rate factor before each of them"),
    "epoch_post_coord": number(a.some_epochs, "N", "epochs of coordinate steps after them"),
    "ld_post_coord": number(a.factor, "FACTOR", "rate factor before each of those"),
    "lr_post_coord": number(
        a.rate, "RATE", "rate that they start from; without it they go on from the last"
    ),
}  # fmt: skip

BEYOND = {
    "EVAL": number(
        a.file, "FILE",
        "test the packed FILE (.alq) and nothing else; no stage and no checkpoint is needed",
    ),
    "packed": switch(
        "--EVAL tests the network that computes from the bits of its weights; "
        "fast on CPUs with numba: pip install -e '.[inference]'"
    ),
    "target_bit": number(
        a.rate, "BITS", "--ALQ prunes to this average bitwidth, whatever rounds it takes"
    ),
    "target_kb": number(
        a.rate, "KB", "--ALQ prunes to this storage of the weights (1e3 bytes), likewise"
    ),
    "file_kb": number(
        a.rate, "KB",
        "--ALQ prunes until the packed file has this size, what costs the loss least per byte of "
        "it first; takes --coded --fold, and the --floats that it is to have",
    ),
    "act_bit": number(
        a.bits_or_none, "M",
        "the input of every layer but the first in M binary bases, 1 to 8; 0 for float", 0,
    ),
    "act_from": {
        "choices": list(ACT_FROM),
        "help": f"the stage from which --act_bit holds (default: {ACT_FROM[0]}); give it to all "
        "later ones, too",
    },
    "floats": {
        "choices": list(FLOATS), "default": "float32",
        "help": "how the packed file holds coordinates, biases and normalisation; the stage that "
        "writes it rounds them before its test; 8bit to 3bit go with --coded",
    },
    "coded": switch("the packed file in its smallest form, entropy-coded"),
    "fold": switch(
        "move the constants of units without bits into the biases behind them; the packed file, "
        "which is --coded, then stores nothing of such units"
    ),
}  # fmt: skip

MACHINE = {
    "seed": number(a.seed, "N", "of the split, the start, the order, the pruning", 0),
    "device": {"type": a.device, "help": "cpu, cuda, cuda:1, mps, ..."},
    "threads": number(a.threads, "N", "CPU threads (default: torch's choice)"),
    "amp": switch(
        "the network's forward and backward pass in bfloat16 where that is safe; gradients, "
        "moments, alpha and all of the quantizer stay float32"
    ),
    "tf32": switch("convolutions in TensorFloat-32 on CUDA; without it, and in all else, float32"),
    "compile": switch(
        "compile the network and the quantizer's steps: minutes at the start, and seconds whenever "
        "a layer's largest number of bits changes. Needs a C++ compiler, on CUDA also triton"
    ),
    "channels_last": either(
        "pictures and convolutions with the channels last in memory (default: on a CPU, and on "
        "CUDA with --tf32 or --amp)"
    ),
    "cudnn_benchmark": either(
        "try out which kernels are the fastest for each shape of a convolution (default: on CUDA "
        "without --deterministic)"
    ),
    "deterministic": switch(
        "kernels that add in a fixed order on CUDA, too: the same seed gives the same bits; "
        "slower. The CPU needs no flag. A warning names what has no such kernel"
    ),
    "save_every": number(
        a.at_least_0, "MINUTES",
        "resume point within an epoch, besides that after each; 0 for none", 10.0,
    ),
    "tensorboard": number(Path, "DIR", "write the log's numbers there too, for TensorBoard"),
    "resume": switch(
        "go on from the last resume point; the flags must be those of the run, but for "
        f"{', '.join(f'--{flag}' for flag in MAY_CHANGE)}; stages that are done may be left out"
    ),
}  # fmt: skip

GROUPS = {
    "published flags": PUBLISHED,
    "numbers that the published scripts bury in their code": BURIED,
    "beyond the paper": BEYOND,
    "machine": MACHINE,
}


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: those of switches, and of flags left out, do not.

    Lists are shown as they are typed.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class ScriptParser(a.OneLineParser):
    """Knows the shared flags, with one script's `defaults`; a script adds its own to the groups.

    Attributes:
        published, beyond, machine: groups of flags as -h shows them.
    """

    def __init__(self, description: str, defaults: dict) -> None:
        super().__init__(description=description, formatter_class=DefaultsFormatter)
        groups = []
        for title, flags in GROUPS.items():
            group = self.add_argument_group(title)
            for flag, options in flags.items():
                group.add_argument(f"--{flag}", **options)
            groups.append(group)
        self.published, _, self.beyond, self.machine = groups
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.set_defaults(device=device, **defaults)

    def add_dataset(self, options: dict, net: str, dataset: str) -> None:
        """Add --dataset, and let the defaults of the checkpoints' names be those for `dataset`."""
        self.beyond.add_argument("--dataset", **options)
        if dataset != options["default"]:
            for flag in ("model_ori", "model"):
                self.set_defaults(**{flag: Path(f"checkpoints/{net}_{dataset}_{flag}.pth")})


def grouping_options(args: Namespace) -> dict[str, Any]:
    """Return the flags of the grouping as `alq.quantize` takes them: one value stands for all."""
    values = {flag: getattr(args, flag) for flag in ("structure", "subc", "max_bit")}
    return {flag: list_[0] if len(list_) == 1 else list_ for flag, list_ in values.items()}
