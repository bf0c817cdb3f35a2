"""From the command line to the table at the end: what the entry scripts call."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from . import parallel
from .errors import InputError
from .loop import size_of
from .packed import ENDING, load_packed, read_packed
from .report import layer_table, parts_line, summary_table
from .resume import resume_path
from .runlog import RunLog, describe_run
from .stages import STAGES, Recipe, Run
from .training import evaluate


def run_stages(recipe: Recipe, parser: ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run the stages they name and print the table."""
    try:
        parallel.claim_device()
    except InputError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    named = [name for name in STAGES if getattr(args, name)]
    if not named and not args.EVAL:
        parser.error(
            "nothing to do: give one or more of "
            + " ".join(f"--{name}" for name in STAGES)
            + ", or --EVAL FILE"
        )
    if named and args.EVAL:
        parser.error(f"--EVAL {args.EVAL}: tests a finished file; give it without --{named[0]}")
    if args.model == args.model_ori:
        parser.error(f"--model {args.model}: is --model_ori too, which would be overwritten")
    if args.model.suffix == ENDING:
        parser.error(f"--model {args.model}: {ENDING} is the packed file's ending; use .pth")
    if getattr(args, "DOWNLOAD", False) and not args.PRETRAIN:
        parser.error("--DOWNLOAD goes with --PRETRAIN: it fetches what that would train")
    set_arithmetic(args)
    try:
        with parallel.joined(args.device):
            if args.EVAL:
                result = evaluate_packed(recipe, args)
            else:
                result = run_named(recipe, args, named)
            main = parallel.is_main()
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last finished epoch", file=sys.stderr)
        raise SystemExit(130) from None
    if main:
        print_result(recipe, result)


def run_named(recipe: Recipe, args: Namespace, named: list[str]) -> dict:
    """Run the named stages, one after the other; the last one's result."""
    log = RunLog(args.model.with_suffix(".jsonl"))
    log.write("start", net=recipe.net, stages=named, **describe_run(args))
    later = list(STAGES)[list(STAGES).index(named[0]) :]
    if not args.resume:  # what an older run left, which started from other files
        remove([resume_path(args, name.lower()) for name in later])
    for name in named:
        result = STAGES[name](Run(recipe, args, log))
        if parallel.is_main():
            print(f"{result['stage']}: {result['seconds']:.0f} s, saved {result['file']}")
    remove([resume_path(args, name.lower()) for name in named])
    return result


def remove(paths: list[Path]) -> None:
    parallel.wait()
    if parallel.is_main():
        for path in paths:
            path.unlink(missing_ok=True)
    parallel.wait()


def evaluate_packed(recipe: Recipe, args: Namespace) -> dict:
    """The test accuracy of the packed file that --EVAL names, from that file alone."""
    model = recipe.network().to(args.device, memory_format=torch.channels_last)
    weights = load_packed(args.EVAL, model)
    return {
        "stage": "packing",
        "top1_fp": None,
        "top1": evaluate(model, recipe.load_test(args))["accuracy"],
        **size_of(weights),
        "file_bytes": args.EVAL.stat().st_size,
        "packed": args.EVAL,
        "parts": read_packed(args.EVAL).sizes,
        "weights": weights,
    }


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
        top1 = result["top1"] if result["top1_fp"] is None else result["top1_fp"]
        print(f"full-precision top-1 on the test set: {top1:.2f} %")
        return
    numel = sum(weight.grouping.numel for weight in result["weights"])
    print(
        layer_table(result["weights"]), summary_table(result, recipe.published, numel), sep="\n\n"
    )
    if result["packed"]:
        print(f"\n{result['packed']}: {parts_line(result['parts'])}")
