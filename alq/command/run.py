"""From the command line to the table at the end: what the entry scripts call."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..data.loaders import memory_format
from ..errors import InputError, NotFinite
from ..extras.compiled import require_compiler
from ..files.disk import hold
from ..files.packed import put_packed, read_packed
from ..files.paths import RunFiles
from ..files.runlog import RunLog, describe_run
from ..files.scalars import Scalars
from ..inference.pack import pack_for_inference
from ..machine import processes
from ..machine.arithmetic import settle_cpu, settle_sums
from ..machine.interruption import Interruption, Stopped
from ..method.quantized_inputs import act_bit
from ..training.epoch import evaluate
from ..training.loop import size_of
from .arguments import OneLineParser
from .checks import check_dataset, check_flags
from .recipe import Recipe
from .report import layer_table, network_lines, parts_line, summary_table
from .resume import note, what_is_left
from .shared import Run
from .stages import alq, posttrain, pretrain

STAGES = {"PRETRAIN": pretrain, "ALQ": alq, "POSTTRAIN": posttrain}
# The flag that names what a stage starts from, and the stage that makes it.
SOURCES = {"ALQ": ("model_ori", "PRETRAIN"), "POSTTRAIN": ("model", "ALQ")}


def run_stages(recipe: Recipe, parser: OneLineParser, argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run the stages they name, one after the other, and print the table.

    Exit codes: 0; 2 for what the user can put right; 3 where numbers stopped being finite; 130 and
    143 after Ctrl-C and SIGTERM.
    """
    with errors_in_one_line(parser):
        processes.claim_device()
        args = parser.parse_args(argv)
        named = [name for name in STAGES if getattr(args, name)]
        check_flags(args, recipe, named)
        fill_in(args)
        set_arithmetic(args)
        with processes.join_processes(args.device):
            if args.EVAL:
                return print_result(recipe, evaluate_packed(recipe, args))
            files = RunFiles(args.model_ori, args.model)
            written = [files.model, *(files.target(name.lower()) for name in named)]
            with hold(written), Interruption() as interruption:
                run, left = begin_run(recipe, args, files, interruption, named)
                for name in left:
                    if code := processes.largest_over_processes(interruption.code):
                        raise Stopped(code)
                    result = STAGES[name](run)
                    if processes.is_main():
                        seconds = f"{result['seconds']:.0f} s"
                        print(f"{result['stage']}: {seconds}, saved {result['file']}")
                processes.wait_for_all()
                if processes.is_main():
                    files.resume_point.unlink(missing_ok=True)
            if left:
                print_result(recipe, result)


@contextmanager
def errors_in_one_line(parser: OneLineParser) -> Iterator[None]:
    """Turn the errors that end a run into one line on stderr and an exit code."""
    try:
        yield
    except NotFinite as error:
        parser.quit(error.code, f"{error}. The files hold what was good before")
    except InputError as error:
        parser.error(f"--{error}" if error.argument else str(error))
    except Stopped as stopped:
        parser.quit(stopped.code, f"{stopped}; the same command with --resume goes on from here")
    except KeyboardInterrupt:
        parser.quit(130, "aborted; the same command with --resume goes on from what was saved last")


def fill_in(args: Namespace) -> None:
    """Give the flags that depend on device and precision their value, where none was given.

    CUDA's kernels for channels_last are the fast ones in TensorFloat-32 and bfloat16; in float32
    they are said to be the slow ones. A CPU's are the fast ones.
    """
    on_cuda = args.device.type == "cuda"
    if args.channels_last is None:
        args.channels_last = not on_cuda or args.amp or args.tf32
    if args.cudnn_benchmark is None:
        args.cudnn_benchmark = on_cuda and not args.deterministic


def set_arithmetic(args: Namespace) -> None:
    """Set threads, precision, and whether kernels always add in one order; prepare the CPU."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    if args.deterministic or processes.launched():
        settle_sums(args.compile)  # after the line above, which sets the compiler, too
    torch.backends.cudnn.deterministic = args.deterministic
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = args.tf32  # matrix products never use it unless asked to
    settle_cpu()


def begin_run(
    recipe: Recipe, args: Namespace, files: RunFiles, interruption: Interruption, named: list[str]
) -> tuple[Run, list[str]]:
    """Return the run of the stages `named`, and those that are left to do if it is resumed."""
    if args.compile:
        require_compiler(args.device)
    scalars = Scalars(args.tensorboard) if args.tensorboard else None
    point, left = None, named
    if args.resume:
        point, left = what_is_left(files, args, recipe, named)
    log = RunLog(files.log, scalars)
    run = Run(recipe, args, files, log, interruption, point)
    check_sources(run, left)
    event = "resume" if point else "start"
    what = {"net": recipe.net, "dataset": recipe.dataset, "stages": named}
    run.log.announce(event, **what, **describe_run(args))
    return run, left


def check_sources(run: Run, left: list[str]) -> None:
    """Check that the checkpoints are there which a stage needs and no stage before it makes."""
    for name, (flag, maker) in SOURCES.items():
        if name in left and maker not in left:
            path = getattr(run.args, flag)
            if not run.require(path, maker, flag).get("finished", True):
                note(f"the stage that saved {path} was interrupted")


def evaluate_packed(recipe: Recipe, args: Namespace) -> dict:
    """Return the test accuracy of the packed file that --EVAL names, from that file alone.

    With --packed the network that is tested computes from bits; the tables are the same.
    """
    content = read_packed(args.EVAL)
    check_dataset(recipe, content.dataset, f"--EVAL {args.EVAL}")
    model, layout = recipe.network(), memory_format(args)
    model = model.to(args.device, memory_format=layout)  # type: ignore[call-overload]
    weights = put_packed(content, model, args.EVAL)
    tested = pack_for_inference(model, weights) if args.packed else model
    return {
        "stage": "packing",
        "top1_fp": None,
        "top1": evaluate(tested, recipe.load_test(args))["accuracy"],
        **size_of(weights),
        "file_bytes": sum(content.sizes.values()),
        "packed": args.EVAL,
        "parts": content.sizes,
        "weights": weights,
        "model": model,
    }


def print_result(recipe: Recipe, result: dict) -> None:
    """Print the last stage's tables, of several processes in the main one."""
    weights, packed = result["weights"], result["packed"]
    if not processes.is_main():
        return
    if not weights:
        top1 = result["top1"] if result["top1_fp"] is None else result["top1_fp"]
        print(f"full-precision top-1 on the test set: {top1:.2f} %")
        if M := act_bit(result["model"]):
            print(f"its activations have {M} bit")
        return
    numel = sum(weight.grouping.numel for weight in weights)
    print(layer_table(weights), summary_table(result, recipe.published, numel), sep="\n\n")
    print(f"\n{network_lines(result['model'], weights)}")
    if packed:
        print(f"{packed}: {parts_line(result['parts'])}")
