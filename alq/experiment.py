"""From the command line to the table at the end: what the entry scripts call."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import torch

from . import parallel
from .errors import InputError
from .report import layer_table, summary_table
from .runlog import RunLog, describe_run
from .stages import STAGES, Recipe, Run


def run_stages(recipe: Recipe, parser: ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run the stages they name and print the table."""
    try:
        parallel.claim_device()
    except InputError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    named = [name for name in STAGES if getattr(args, name)]
    if not named:
        parser.error(
            "nothing to do: give one or more of " + " ".join(f"--{name}" for name in STAGES)
        )
    if getattr(args, "DOWNLOAD", False) and not args.PRETRAIN:
        parser.error("--DOWNLOAD goes with --PRETRAIN: it fetches what that would train")
    set_arithmetic(args)
    try:
        with parallel.joined(args.device):
            log = RunLog(args.model.with_suffix(".jsonl"))
            log.write("start", net=recipe.net, stages=named, **describe_run(args))
            results = [STAGES[name](Run(recipe, args, log)) for name in named]
            main = parallel.is_main()
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last finished epoch", file=sys.stderr)
        raise SystemExit(130) from None
    if not main:
        return
    for result in results:
        print(f"{result['stage']}: {result['seconds']:.0f} s, saved {result['file']}")
    print_result(recipe, results[-1])


def set_arithmetic(args: Namespace) -> None:
    """Threads and precision."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = args.tf32  # matrix products never use it unless asked to
    # Moments of weights that get no gradient decay into denormals, 13x slower on CPUs.
    torch.set_flush_denormal(True)


def print_result(recipe: Recipe, result: dict) -> None:
    """The last stage's tables."""
    if not result["weights"]:
        print(f"full-precision top-1 on the test set: {result['top1_fp']:.2f} %")
        return
    numel = sum(weight.grouping.numel for weight in result["weights"])
    print(
        layer_table(result["weights"]), summary_table(result, recipe.published, numel), sep="\n\n"
    )
