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
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
import alq.optimizer
import changed
import lenet5
from alq.checkpoint import load_checkpoint
from alq.data import TensorLoader
from alq.experiment import set_arithmetic
from alq.loop import quantized_training, size_of, train_through
from alq.runlog import RunLog, describe_run
from alq.schedule import Epoch, Schedule
from alq.structures import make_grouping
from alq.training import evaluate

TRAINED = Path("checkpoints/published/lenet5_model_ori.pth")
LOGS = Path("checkpoints/ablations")
LR, LD = 1e-3, 0.8  # of all arms: the paper's rate and factor for LeNet5


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Attributes:
        name: in the log's name and the figure.
        epochs: what each epoch does (`alq.schedule.Epoch.kind`).
        max_bit: of the sketch.
        kind: class of the quantizer.
        plan: (batches of an epoch) -> what a pruning epoch does.
        instead: functions in the place of `alq.optimizer`'s.
        from_full: STE steps start from the full-precision weights, not from the sketch.
    """

    name: str
    epochs: Sequence[Epoch]
    max_bit: int = 6
    kind: type[alq.ALQ] = alq.ALQ
    plan: Callable[[int], object] = lambda batches: None
    instead: dict[str, Callable] = field(default_factory=dict)
    from_full: bool = False


def decaying(kinds: Sequence[str], round: int = 0) -> list[Epoch]:
    return [Epoch(kind, LR * LD ** (k + 1), round) for k, kind in enumerate(kinds)]


ROUND = ["basis", "basis", "coordinate"]
ROUNDS, PR, TOP_K = 4, 0.9, 0.01
# Four rounds that end in a pruning epoch, then one that only trains.
PRUNING = [
    epoch for r in range(1, ROUNDS + 1) for epoch in decaying([*ROUND, "prune"], r)
] + decaying(ROUND, ROUNDS + 1)


def loss_aware() -> list[Arm]:
    """At 1 and 2 bits, the same for all groups."""
    arms = []
    for bits in (1, 2):
        ste, alternating = decaying(["ste"] * 6), decaying(["basis"] * 4 + ["coordinate"] * 2)
        arms += [
            Arm(f"{bits}bit_sketch", [], bits),
            Arm(f"{bits}bit_reconstruction", ste, bits, changed.Reconstruction, from_full=True),
            Arm(f"{bits}bit_ste", ste, bits, from_full=True),
            Arm(f"{bits}bit_alq", alternating, bits),
        ]
    return arms


def pruned(name: str, **instead: Callable) -> Arm:
    def plan(batches: int) -> object:
        return changed.AcrossLayers(PR, batches, TOP_K)

    return Arm(name, PRUNING, plan=plan, instead=instead)


def adaptive() -> list[Arm]:
    return [
        pruned("across_layers"),
        Arm("within_layers", PRUNING, plan=lambda b: changed.WithinLayers(PR, b, 4 * b)),
        Arm("uniform", PRUNING, plan=lambda b: changed.Uniform((4, 3, 2, 1), b, 4 * b)),
    ]


def smooth() -> list[Arm]:
    cut = Arm("one_cut", PRUNING, plan=lambda b: changed.OneCut(PR, b, 4 * b))
    return [pruned("every_batch"), cut]


def defects() -> list[Arm]:
    return [
        pruned("none"),
        pruned("lost_flips", optimise_bases=changed.bases_losing_flips),
        pruned("wrong_ranking", choose_pruned=changed.choose_by_wrong_values),
    ]


# The same run under several claims' names: run once.
SAME = {
    ("smooth", "every_batch"): "adaptive_across_layers",
    ("defects", "none"): "adaptive_across_layers",
}


def run_arm(claim: str, arm: Arm, args: argparse.Namespace) -> None:
    """Train one arm and log its epochs, its accuracy after each pruning and before it."""
    torch.manual_seed(args.seed)
    source = load_checkpoint(args.model_ori, "lenet5")
    model = lenet5.LeNet5().to(args.device, memory_format=torch.channels_last)
    model.load_state_dict(source["model"])
    data, _ = lenet5.load_data(args, source["val_indices"])
    part = (x[: args.train_size] for x in (data.train.images, data.train.labels))
    train = TensorLoader(*part, args.batch_size, lenet5.MEAN, lenet5.STD, args.seed)
    full = [parameter.detach().clone() for parameter in model.parameters() if parameter.dim() > 1]
    weights = alq.quantize(
        model, lenet5.DEFAULTS["structure"], lenet5.DEFAULTS["subc"], arm.max_bit
    )
    log = new_log(args.out / f"{claim}_{arm.name}.jsonl")
    log.write("start", net="lenet5", claim=claim, arm=arm.name, **describe_run(args))

    def point(after: str) -> dict:
        tested = evaluate(model, data.test)
        validated = evaluate(model, data.val)
        found = {
            "top1": tested["accuracy"],
            "val_accuracy": validated["accuracy"],
            **size_of(weights),
        }
        log.write("point", after=after, epoch=training.epochs_done, **found)
        return found

    schedule = Schedule(lr=LR, seed=args.seed)
    plan = arm.plan(len(train))
    training = quantized_training(model, weights, schedule, plan=plan, kind=arm.kind)
    if arm.from_full:
        for weight, w in zip(weights, full, strict=True):
            training.optimizers[0].state[weight.parameter]["w0"] = weight.grouping.to_groups(w)
    found = point("sketch")

    def after_epoch(epoch: Epoch, val: dict) -> None:
        nonlocal found
        if epoch.kind in ("prune", "coordinate") or training.epochs_done == len(arm.epochs):
            found = point(epoch.kind)

    with ExitStack() as changes:
        for name, function in arm.instead.items():
            changes.enter_context(patch.object(alq.optimizer, name, function))
        train_through(
            f"{claim} {arm.name}", training, list(arm.epochs), train, data.val, log.write,
            after_epoch,
        )  # fmt: skip
    log.write("result", **found, seconds=round(training.seconds, 1))


def new_log(path: Path) -> RunLog:
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

# One basis, one coordinate and one pruning epoch a round; five epochs of post-training.
SHORT = (
    "--ALQ --POSTTRAIN --epoch_basis 1 --epoch_coord 1 --pr 1 "
    "--epoch_ste 4 --ld_ste 0.7 --epoch_post_coord 1 --ld_post_coord 0.7"
)
TEN_KB = f"{SHORT} --max_bit 3 --target_kb 9.4"
COMMANDS = {
    "size": {
        "6bit": f"{SHORT} --R 1 --pr 1e-6",
        **{f"{bits:g}bit": f"{SHORT} --target_bit {bits}" for bits in (3, 1.5)},
        **{
            f"{bits:g}bit": f"{SHORT} --max_bit 3 --target_bit {bits}"
            for bits in (0.8, 0.41, 0.2, 0.1, 0.055)
        },
    },
    "recipe": {
        "plain": TEN_KB,
        "distill": f"{TEN_KB} --distill 0.7",
        "augment": f"{TEN_KB} --augment 2",
        "per_byte": f"{TEN_KB} --per_byte",
        "finer": f"{TEN_KB} --subc 0 0 8 5",
        "longer": f"{TEN_KB} --epoch_ste 12 --ld_ste 0.9",
    },
}


def run_command(claim: str, arm: str, args: argparse.Namespace) -> None:
    """`lenet5.py` with the arm's flags; its log and its files are named for the arm."""
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
    lenet5.main([*COMMANDS[claim][arm].split(), *map(str, own)])


# ---------------------------------------------------------------------------- command line

CLAIMS = {f.__name__: f for f in (loss_aware, adaptive, smooth, defects)}


def finished(log: Path) -> bool:
    """Whether the run that wrote `log` came to its end."""
    last = json.loads(log.read_text().splitlines()[-1]) if log.exists() else {"event": None}
    return last["event"] == "result" and last.get("stage") != "alq"  # a command goes on from there


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", nargs="+", choices=[*CLAIMS, "structures", *COMMANDS])
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
        batch_size=lenet5.DEFAULTS["batch_size"], augment=0, tf32=False, deterministic=False
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    set_arithmetic(args)
    for claim in args.claim:
        if claim == "structures":
            structures(args)
            continue
        arms = {arm.name: arm for arm in CLAIMS[claim]()} if claim in CLAIMS else COMMANDS[claim]
        for name, arm in arms.items():
            log = args.out / f"{SAME.get((claim, name), f'{claim}_{name}')}.jsonl"
            if (args.arm and name not in args.arm) or finished(log):
                continue
            if claim in COMMANDS:
                run_command(claim, name, args)
            elif (claim, name) in SAME:
                run_arm("adaptive", pruned("across_layers"), args)
            else:
                run_arm(claim, arm, args)


if __name__ == "__main__":
    main()
