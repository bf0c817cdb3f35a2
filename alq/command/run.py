"""From the command line to the table at the end: what the entry scripts call."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import torch

from ..errors import InputError, NotFinite
from ..extras.compiled import require_compiler
from ..files.packed import load_packed, read_packed
from ..files.runlog import RunLog, describe_run, log_path
from ..machine import processes
from ..machine.arithmetic import settle_cpu
from ..machine.interruption import Interruption, Stopped
from ..training.epoch import evaluate
from ..training.loop import size_of
from .checks import check_files, check_layers, check_numbers, check_stages
from .report import layer_table, parts_line, summary_table
from .resume import read_point, resume_path
from .stages import SOURCES, STAGES, Recipe, Run


def run_stages(recipe: Recipe, parser: ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run the stages they name and print the table.

    Exit codes: 0; 2 for what the user can put right; 3 where numbers stopped being finite; 130 and
    143 after Ctrl-C and SIGTERM.
    """
    try:
        processes.claim_device()
    except InputError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    named = [name for name in STAGES if getattr(args, name)]
    try:
        check_stages(args, named)
        check_numbers(args)
        if named:
            check_files(args, named)
            check_layers(args, recipe.network)
        set_arithmetic(args)
        if named and args.compile:
            require_compiler(args.device)
        with processes.join_processes(args.device):
            result = run_named(recipe, args, named) if named else evaluate_packed(recipe, args)
            main = processes.is_main()
    except NotFinite as error:
        parser.quit(error.code, str(error))
    except InputError as error:
        parser.error(with_dashes(str(error), args))
    except Stopped as stopped:
        parser.quit(stopped.code, f"{stopped}; the same command with --resume goes on from here")
    except KeyboardInterrupt:
        parser.quit(130, "aborted; the same command with --resume goes on from what was saved last")
    if main:
        print_result(recipe, result)


def with_dashes(message: str, args: Namespace) -> str:
    """A message of the library, which names an argument first, as one about a flag."""
    name = message.partition(" ")[0].rstrip(":")
    return f"--{message}" if hasattr(args, name) else message


def run_named(recipe: Recipe, args: Namespace, named: list[str]) -> dict:
    """Run the named stages, one after the other; the last one's result."""
    log = RunLog(log_path(args))
    with Interruption() as interruption:
        point = read_point(args, recipe.net, named) if args.resume else None
        if args.resume and not point and processes.is_main():
            print(f"note: no resume point {resume_path(args)}; starting anew", file=sys.stderr)
        left = named[named.index(point["stage"].upper()) :] if point else named
        run = Run(recipe, args, log, interruption, point)
        check_sources(run, left)
        event = "resume" if point else "start"
        log.announce(event, net=recipe.net, stages=named, **describe_run(args))
        for name in left:
            if code := processes.largest_over_processes(interruption.code):
                raise Stopped(code)
            result = STAGES[name](run)
            if processes.is_main():
                print(f"{result['stage']}: {result['seconds']:.0f} s, saved {result['file']}")
        processes.wait_for_all()
        if processes.is_main():
            resume_path(args).unlink(missing_ok=True)
    return result


def check_sources(run: Run, named: list[str]) -> None:
    """That the checkpoints are there which a stage needs and no stage before it makes."""
    for name, (flag, maker) in SOURCES.items():
        if name in named and maker not in named:
            path = getattr(run.args, flag)
            if not run.require(path, maker, flag).get("finished", True) and processes.is_main():
                print(f"note: the stage that saved {path} was interrupted", file=sys.stderr)


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
    """Threads, precision, and kernels that always add in one order."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:  # before CUDA's first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = args.deterministic
    torch.backends.cudnn.allow_tf32 = args.tf32  # matrix products never use it unless asked to
    settle_cpu()


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
