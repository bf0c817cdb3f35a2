"""The method's claims, each as a comparison of short LeNet5 runs on MNIST.

    python benchmarks/ablations.py loss_aware     # steps that know the loss / the reconstruction
    python benchmarks/ablations.py adaptive       # pruned across layers / within layers / uniform
    python benchmarks/ablations.py smooth         # many small prunings / one cut an epoch
    python benchmarks/ablations.py defects        # what the authors' two defects cost
    python benchmarks/ablations.py structures     # sketches of the trained weights, no training
    python benchmarks/ablations.py size           # file size against accuracy, lenet5.py's flags
    python benchmarks/ablations.py recipe         # what each extra gains at 10 KB, likewise

All arms of a claim start from the same full-precision network and share schedule and seed. Each
writes its own log, CLAIM_ARM.jsonl; an arm whose log has a result is not run again.
`benchmarks/figures.py` draws the logs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import alq.method.optimizer
import arms
import lenet5
from alq.command.run import set_arithmetic
from alq.data import mnist
from alq.data.loaders import TensorLoader
from alq.files.checkpoint import load_checkpoint
from alq.files.runlog import RunLog, describe_run
from alq.method.structures import make_grouping
from alq.training.epoch import evaluate
from alq.training.loop import Training, quantized_training, size_of, train
from alq.training.schedule import Epoch, Schedule
from published_runs import read_events

TRAINED = Path("checkpoints/published/ablations/lenet5_model_ori.pth")
LOGS = Path("checkpoints/ablations")


def run_arm(claim: str, arm: arms.Arm, args: argparse.Namespace) -> None:
    """Train one arm and log its epochs, its accuracy after each pruning and before it."""
    torch.manual_seed(args.seed)
    source = load_checkpoint(args.model_ori, "lenet5")
    model = lenet5.LeNet5().to(args.device, memory_format=torch.channels_last)
    model.load_state_dict(source["model"])
    data, _ = mnist.load_splits(args, source["val_indices"])
    kind = mnist.SETS[args.dataset]
    part = (x[: args.train_size] for x in (data.train.images, data.train.labels))
    batches = TensorLoader(*part, args.batch_size, kind.mean, kind.std, args.seed)
    log = new_log(args.out / f"{claim}_{arm.name}.jsonl")
    log.write("start", net="lenet5", claim=claim, arm=arm.name, **describe_run(args))
    training = training_of(f"{claim} {arm.name}", arm, model, args.seed, len(batches))

    def point(after: str) -> dict:
        tested, validated = evaluate(model, data.test), evaluate(model, data.val)
        found = {"top1": tested["accuracy"], "val_accuracy": validated["accuracy"]}
        found |= size_of(training.weights)
        log.write("point", after=after, epoch=training.epochs_done, **found)
        return found

    found = point("sketch")

    def after_epoch(epoch: Epoch, val: dict) -> None:
        nonlocal found
        if epoch.kind in ("prune", "coordinate") or training.epochs_done == len(arm.epochs):
            found = point(epoch.kind)

    train(training, list(arm.epochs), batches, data.val, log.write, after_epoch)
    log.write("result", **found, seconds=round(training.seconds, 1))


def training_of(title: str, arm: arms.Arm, model: nn.Module, seed: int, batches: int) -> Training:
    """Sketch the full-precision `model` and return the training that `arm` asks for."""
    full = [parameter.detach().clone() for parameter in model.parameters() if parameter.dim() > 1]
    structure, subc = (lenet5.DEFAULTS[key] for key in ("structure", "subc"))
    weights = alq.quantize(model, structure, subc, arm.max_bit)
    schedule = Schedule(lr=arms.LR, seed=seed)
    plan = arm.plan(batches)
    training = quantized_training(title, model, weights, schedule, plan=plan, optimizer=arm.kind)
    if arm.from_full:
        for weight, w in zip(weights, full, strict=True):
            training.optimizers[0].state[weight.parameter]["w0"] = weight.grouping.to_groups(w)
    return training


def new_log(path: Path) -> RunLog:
    """Return an empty log at `path`."""
    path.unlink(missing_ok=True)
    return RunLog(path)


def structures(args: argparse.Namespace) -> None:
    """Log the sketch's error and size for each layer, structure and max_bit."""
    source = load_checkpoint(args.model_ori, "lenet5")
    log = new_log(args.out / "structures_sketch.jsonl")
    log.write("start", net="lenet5", claim="structures", arm="sketch", **describe_run(args))
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


# ---------------------------------------------------------------------------- whole commands


def run_command(claim: str, arm: str, args: argparse.Namespace) -> None:
    """Run `lenet5.py` with the arm's flags; log and files are named for the arm."""
    model = args.out / f"{claim}_{arm}.pth"
    own = [
        "--model_ori",
        args.model_ori,
        "--model",
        model,
        "--data",
        args.data,
        "--seed",
        args.seed,
    ]
    if args.threads:
        own += ["--threads", args.threads]
    model.with_suffix(".jsonl").unlink(missing_ok=True)
    lenet5.main([*arms.COMMANDS[claim][arm].split(), *map(str, own)])


# ---------------------------------------------------------------------------- command line


def finished(log: Path) -> bool:
    """Return whether the run that wrote `log` came to its end."""
    last = read_events(log)[-1] if log.exists() else {"event": None}
    return last["event"] == "result" and last.get("stage") != "alq"  # a command goes on from there


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", nargs="+", choices=[*arms.CLAIMS, "structures", *arms.COMMANDS])
    parser.add_argument("--arm", nargs="+", help="only these arms")
    parser.add_argument("--model_ori", type=Path, default=TRAINED)
    parser.add_argument("--out", type=Path, default=LOGS, help="folder of the logs")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--train_size", type=int, default=20000, help="training images of an epoch; not of commands"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int)
    parser.set_defaults(
        batch_size=lenet5.DEFAULTS["batch_size"],
        augment=0,
        compile=False,
        tf32=False,
        channels_last=True,
        cudnn_benchmark=False,
        deterministic=False,
        dataset="mnist",
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    set_arithmetic(args)
    for claim in args.claim:
        if claim == "structures":
            structures(args)
            continue
        chosen = (
            {arm.name: arm for arm in arms.CLAIMS[claim]()}
            if claim in arms.CLAIMS
            else arms.COMMANDS[claim]
        )
        for name, arm in chosen.items():
            log = args.out / f"{arms.SAME.get((claim, name), f'{claim}_{name}')}.jsonl"
            if (args.arm and name not in args.arm) or finished(log):
                continue
            if claim in arms.COMMANDS:
                run_command(claim, name, args)
            elif (claim, name) in arms.SAME:
                run_arm("adaptive", arms.pruned("across_layers"), args)
            else:
                run_arm(claim, arm, args)


if __name__ == "__main__":
    main()
