"""The method's claims, each as a comparison of short LeNet5 runs.

    python benchmarks/ablations.py adaptive       # pruned across layers / within layers / uniform
    python benchmarks/ablations.py smooth         # many small prunings / one cut an epoch
    python benchmarks/ablations.py defects        # what the authors' two defects cost
    python benchmarks/ablations.py ridge          # the relative ridge / the published one
    python benchmarks/ablations.py structures     # sketches of the trained weights, no training
    python benchmarks/ablations.py size           # file size against accuracy, lenet5.py's flags
    python benchmarks/ablations.py adaptive --dataset fashion_mnist --seed 0 1      # a part

The first five run on MNIST and Fashion-MNIST with three seeds each. All arms of a claim start from
the same full-precision network, which is trained first where it is missing, and share schedule and
seed. Each writes its own log, DATASET_CLAIM_ARM_seedN.jsonl; one whose log has its result is not
run again. `size` are whole commands on MNIST, one seed, from --model_ori; their logs are
size_ARM.jsonl. `benchmarks/figures.py` draws the logs. Whether steps that know the loss train
better is asked by `benchmarks/sweep.py`.

Time, on one core of an x86-64 CPU: an arm has 19 epochs of 157 batches at 21 to 28 ms a step, and
some 30 evaluations of 10 000 images at half a second: a minute and a half. Seven arms (what claims
share is run once), three seeds, two data sets: 65 minutes, and a minute for each full-precision
network. Without a claim, the first five are run: all of seed 0 before seed 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import arms
import lenet5
import short_runs
from alq.command.run import set_arithmetic
from alq.files.checkpoint import load_checkpoint
from alq.method.structures import make_grouping
from alq.training.epoch import evaluate
from alq.training.loop import size_of, train
from alq.training.schedule import Epoch
from published_runs import result_of
from short_runs import Start
from small_networks import SMALL_NETWORKS

TRAINED = Path("checkpoints/published/ablations/lenet5_model_ori.pth")
LOGS = Path("checkpoints/ablations")


def run_arm(name: str, arm: arms.Arm, start: Start, args: argparse.Namespace) -> None:
    """Train one arm and log its epochs, its accuracy after each pruning and before it."""
    model, batches, data, top1_fp = start.load(args)
    network = SMALL_NETWORKS[start.net]
    training = arms.training_of("alq", arm, network, model, start.seed, len(batches))
    log = start.new_log(log_name(name, start), args, arm=name, top1_fp=top1_fp)

    def point(after: str, val: dict) -> dict:
        found = {"top1": evaluate(model, data.test)["accuracy"], "val_accuracy": val["accuracy"]}
        found |= size_of(training.weights)
        log.write("point", after=after, epoch=training.epochs_done, **found)
        return found

    found = point("sketch", evaluate(model, data.val))

    def after_epoch(epoch: Epoch, val: dict) -> None:
        nonlocal found
        if epoch.kind in ("prune", "coordinate"):
            found = point(epoch.kind, val)

    def note(event: str, **fields: object) -> None:
        log.write(event, **short_runs.compact(fields))

    train(training, list(arm.epochs), batches, data.val, note, after_epoch)
    log.write("result", **found, seconds=round(training.seconds, 1))


def log_name(name: str, start: Start) -> str:
    """Return what the log of an arm is called; `name` has the claim and the arm."""
    return f"{start.dataset}_{name}_seed{start.seed}"


def structures(start: Start, args: argparse.Namespace) -> None:
    """Log the sketch's error and size for each layer, structure and max_bit."""
    source = load_checkpoint(start.train(args), start.net)
    log = start.new_log(log_name("structures_sketch", start), args, arm="structures_sketch")
    for name, w in source["model"].items():
        if w.dim() < 2:
            continue
        ways = (
            [("channelwise", None), ("kernelwise", None), ("pixelwise", None)]
            if w.dim() == 4
            else [("subchannelwise", subc) for subc in (1, 2, 4, 10) if w.shape[1] % subc == 0]
        )
        for structure, subc in ways:
            grouping = make_grouping(name, tuple(w.shape), structure, subc)
            for max_bit in range(1, 9):
                weight = alq.MultiBitWeight.from_parameter(name, w, grouping, max_bit)
                error = (weight.w_hat() - w).square().sum() / w.square().sum()
                log.write(
                    "sketch", layer=name, structure=structure, subc=grouping.subc, max_bit=max_bit,
                    G=weight.G, n=weight.n, error=float(error), bitwidth=weight.bitwidth,
                    storage_bytes=weight.storage_bytes, float32_bytes=4 * w.numel(),
                )  # fmt: skip
    log.write("result")


def run_claim(claim: str, start: Start, args: argparse.Namespace) -> None:
    """Run what has no result yet of a claim, for one data set and seed."""
    if claim == "structures":
        if not short_runs.finished(args.out / f"{log_name('structures_sketch', start)}.jsonl"):
            structures(start, args)
        return
    for arm in arms.CLAIMS[claim]():
        name = arms.SAME.get((claim, arm.name), f"{claim}_{arm.name}")
        done = short_runs.finished(args.out / f"{log_name(name, start)}.jsonl")
        if not done and (not args.arm or arm.name in args.arm):
            print(log_name(name, start), file=sys.stderr, flush=True)
            run_arm(name, arm, start, args)


# ---------------------------------------------------------------------------- whole commands


def run_command(arm: str, args: argparse.Namespace) -> None:
    """Run `lenet5.py` with the arm's flags; log and files are named for the arm."""
    model = args.out / f"size_{arm}.pth"
    own = ["--model_ori", args.model_ori, "--model", model, "--data", args.data]
    own += ["--seed", args.seed[0], "--threads", args.threads]
    model.with_suffix(".jsonl").unlink(missing_ok=True)
    lenet5.main([*arms.SIZES[arm].split(), *map(str, own)])


def run_commands(args: argparse.Namespace) -> None:
    """Run the commands that have no result yet."""
    for name in arms.SIZES:
        done = result_of(args.out / f"size_{name}.jsonl", "posttrain") is not None
        if not done and (not args.arm or name in args.arm):
            run_command(name, args)


# ---------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trained = [*arms.CLAIMS, "structures"]
    parser.add_argument("claim", nargs="*", choices=[[], *trained, "size"])
    parser.add_argument("--arm", nargs="+", help="only these arms")
    parser.add_argument("--model_ori", type=Path, default=TRAINED, help="of size")
    short_runs.add_flags(parser, LOGS, 20000)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    set_arithmetic(args)
    claims = args.claim or trained
    for seed, dataset, claim in product(args.seed, args.dataset, claims):
        if claim in trained:
            run_claim(claim, Start("lenet5", dataset, seed), args)
    if "size" in claims:
        run_commands(args)


if __name__ == "__main__":
    main()
