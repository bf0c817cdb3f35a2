"""The three stages (SPEC section 6). Each starts from files, so each works in its own process."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from . import parallel, schedule
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Split
from .errors import InputError
from .flags import one_or_each
from .multibit import MultiBitWeight, average_bitwidth, quantize, restore, storage_bytes
from .optimizer import ALQ
from .runlog import RunLog, plain_flags
from .schedule import Epoch
from .training import compute_in_bfloat16, evaluate, train_epoch


@dataclass(frozen=True)
class Recipe:
    """What one entry script adds to the shared stages.

    Attributes:
        net: name of the network, as checkpoints record it.
        network: makes it, untrained.
        load_data: (flags, indices of the held-out images or None to draw them) -> loaders, indices.
        pretrain_optimizer: (parameters, flags) -> optimizer of the full-precision training.
        published: the paper's row: bitwidth, storage in bytes, top-1 in percent.
        fetch: flags -> full-precision weights to take instead of training, or None to train.
    """

    net: str
    network: Callable[[], nn.Module]
    load_data: Callable[[Namespace, torch.Tensor | None], tuple[Split, torch.Tensor]]
    pretrain_optimizer: Callable[..., Optimizer]
    published: dict[str, float]
    fetch: Callable[[Namespace], dict | None] = lambda args: None


@dataclass
class Training:
    """What a stage trains: the network, its optimizers, and the step each kind of epoch takes."""

    model: nn.Module
    optimizers: list[Optimizer]
    steps: dict[str, Callable[[], None]]
    weights: list[MultiBitWeight] = field(default_factory=list)
    best: float = -1.0  # validation accuracy of the best epoch so far, percent
    epochs_done: int = 0
    seconds: float = 0.0

    def check_same_everywhere(self, when: str) -> None:
        """Of several processes: give all the same running statistics, compare all the rest."""
        parallel.share_buffers(self.model)
        states = [list(optimizer.state.values()) for optimizer in self.optimizers]
        weights = [vars(weight) for weight in self.weights]
        parallel.check_same([self.model.state_dict(), states, weights], when)


@dataclass(frozen=True)
class Run:
    """One command: its recipe, its flags, its log."""

    recipe: Recipe
    args: Namespace
    log: RunLog

    def network(self) -> nn.Module:
        """A new network on the device. channels_last is what convolutions run fastest in."""
        model = self.recipe.network().to(self.args.device, memory_format=torch.channels_last)
        if self.args.amp:
            compute_in_bfloat16(model, self.args.device)
        if self.args.compile:
            model.compile()
        return model

    def checkpoint(self, path: Path, stage: str, training: Training, **more: object) -> None:
        """Save the network, its multi-bit weights and what the next stage needs to know."""
        content = {
            "net": self.recipe.net,
            "stage": stage,
            "flags": plain_flags(self.args),
            "model": plain_state(training.model),
            "weights": [weight.state_dict() for weight in training.weights],
        }
        save_checkpoint(path, {**content, **more})

    def require(self, path: Path, maker: str, flag: str) -> dict:
        """The checkpoint that the stage before saved at `path`, which `flag` names."""
        if not path.exists():
            raise InputError(f"--{flag} {path}: no such file; --{maker} makes it")
        return load_checkpoint(path, self.recipe.net)


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU, contiguous."""
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def posttrained_path(args: Namespace) -> Path:
    """Where --POSTTRAIN saves: beside --model, which it leaves as --ALQ made it."""
    return args.model.with_name(f"{args.model.stem}_posttrained{args.model.suffix}")


# ---------------------------------------------------------------------------- stages


def pretrain(run: Run) -> dict:
    """Train or fetch the full-precision network; its best epoch on validation -> --model_ori."""
    args = run.args
    torch.manual_seed(args.seed)
    model = run.network()
    data, val_indices = run.recipe.load_data(args, None)
    optimizer = run.recipe.pretrain_optimizer(model.parameters(), args)
    training = Training(model, [optimizer], {"pretrain": optimizer.step})

    def keep_best(epoch: Epoch, val_accuracy: float) -> None:
        if val_accuracy > training.best:
            training.best = val_accuracy
            run.checkpoint(args.model_ori, "pretrain", training, val_indices=val_indices)

    epochs = schedule.pretrain_schedule(args)
    fetched = run.recipe.fetch(args)
    if fetched is not None:
        load_fetched(model, fetched, args)
        run.checkpoint(args.model_ori, "pretrain", training, val_indices=val_indices)
        epochs = []
    follow(run, "pretrain", training, epochs, data, keep_best)
    model.load_state_dict(run.require(args.model_ori, "PRETRAIN", "model_ori")["model"])
    top1 = evaluate(model, data.test)["accuracy"]
    run.checkpoint(args.model_ori, "pretrain", training, val_indices=val_indices, top1_fp=top1)
    return finish(run, "pretrain", training, args.model_ori, top1_fp=top1, top1=None)


def alq(run: Run) -> dict:
    """Sketch --model_ori, then R rounds of basis, coordinate and pruning epochs -> --model."""
    args = run.args
    source = run.require(args.model_ori, "PRETRAIN", "model_ori")
    model = run.network()
    model.load_state_dict(source["model"])
    data, val_indices = run.recipe.load_data(args, source.get("val_indices"))
    weights = quantize(
        model, one_or_each(args.structure), one_or_each(args.subc), one_or_each(args.max_bit)
    )
    training = quantized_training(run, model, weights, len(data.train))
    kept = {"val_indices": val_indices, "top1_fp": source.get("top1_fp")}
    run.checkpoint(args.model, "alq", training, **kept)
    epochs = schedule.alq_schedule(args)

    def after_pruning(epoch: Epoch, val_accuracy: float) -> None:
        last_of_round = (
            training.epochs_done == len(epochs) or epochs[training.epochs_done].round != epoch.round
        )
        if last_of_round:
            top1 = evaluate(model, data.test)["accuracy"]
            run.log.write("round", round=epoch.round, top1=top1, **size_of(weights))
            run.checkpoint(args.model, "alq", training, **kept)

    follow(run, "alq", training, epochs, data, after_pruning)
    top1 = evaluate(model, data.test)["accuracy"]
    return finish(run, "alq", training, args.model, top1_fp=kept["top1_fp"], top1=top1)


def posttrain(run: Run) -> dict:
    """STE epochs, then coordinate epochs on --model; the best by validation accuracy is saved."""
    args = run.args
    source = run.require(args.model, "ALQ", "model")
    model = run.network()
    model.load_state_dict(source["model"])
    data, val_indices = run.recipe.load_data(args, source["val_indices"])
    weights = restore(model, source["weights"])
    training = quantized_training(run, model, weights, len(data.train))
    kept = {"val_indices": val_indices, "top1_fp": source["top1_fp"]}
    target = posttrained_path(args)

    def keep_best(epoch: Epoch, val_accuracy: float) -> None:
        if val_accuracy > training.best:
            training.best = val_accuracy
            run.checkpoint(target, "posttrain", training, **kept)

    follow(run, "posttrain", training, schedule.posttrain_schedule(args), data, keep_best)
    best = run.require(target, "POSTTRAIN", "model")
    model.load_state_dict(best["model"])
    training.weights = restore(model, best["weights"])
    top1 = evaluate(model, data.test)["accuracy"]
    return finish(run, "posttrain", training, target, top1_fp=kept["top1_fp"], top1=top1)


STAGES = {"PRETRAIN": pretrain, "ALQ": alq, "POSTTRAIN": posttrain}


# ---------------------------------------------------------------------------- what they share


def load_fetched(model: nn.Module, fetched: dict, args: Namespace) -> None:
    """Take over fetched full-precision weights."""
    try:
        model.load_state_dict(fetched)
    except RuntimeError as error:
        raise InputError(
            f"--model_ori_urls {args.model_ori_urls}: not the weights of --net {args.net}"
        ) from error


def quantized_training(
    run: Run, model: nn.Module, weights: list[MultiBitWeight], batches: int
) -> Training:
    """ALQ for the multi-bit weights, Adam for the biases and normalisation parameters."""
    args = run.args
    quantizer = ALQ(
        weights,
        lr=args.lr,
        weight_decay=args.wd,
        generator=torch.Generator().manual_seed(args.seed),
    )
    quantized = {id(weight.parameter) for weight in weights}
    rest = [p for p in model.parameters() if id(p) not in quantized]
    adam = torch.optim.Adam(rest, lr=args.lr)
    # M_p: the share of the candidates removed at each batch of the pruning epochs (SPEC section 5)
    M_p = (args.pr / args.top_k) / (args.epoch_prune * batches)
    if M_p > 1:
        raise InputError(
            f"--top_k {args.top_k}: too few candidates to prune a share --pr {args.pr} in "
            f"{args.epoch_prune * batches} batches; use --top_k {args.top_k * M_p:.2g} or more"
        )

    def both(step: Callable[[], None]) -> Callable[[], None]:
        def take() -> None:
            with parallel.same_arithmetic():
                step()
                adam.step()

        return take

    steps = {
        "basis": both(quantizer.basis_step),
        "coordinate": both(quantizer.coordinate_step),
        "ste": both(quantizer.ste_step),
        "prune": both(lambda: quantizer.prune_step(args.top_k, M_p)),
    }
    return Training(model, [quantizer, adam], steps, weights)


def follow(
    run: Run,
    stage: str,
    training: Training,
    epochs: list[Epoch],
    data: Split,
    after_epoch: Callable[[Epoch, float], None],
) -> None:
    """Train through `epochs`; after each: evaluate, log, `after_epoch`, save a resume point."""
    resume_point = run.args.model.with_name(f"{run.args.model.stem}_{stage}.resume")
    if run.args.resume and resume_point.exists():
        resume(training, load_checkpoint(resume_point, run.recipe.net), epochs)
    model = training.model
    network = parallel.replicate(model)
    while training.epochs_done < len(epochs):
        started = time.monotonic()
        number, epoch = training.epochs_done, epochs[training.epochs_done]
        for optimizer in training.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = epoch.lr
        model.train(epoch.kind != "prune")  # a pruning epoch keeps the running statistics
        data.train.set_epoch(number)
        title = f"{stage} {number + 1}/{len(epochs)} {epoch.kind}"
        quiet = None if parallel.is_main() else True
        with tqdm(data.train, desc=title, unit="batch", disable=quiet) as batches:
            step = training.steps[epoch.kind]
            train = train_epoch(network, batches, step, weights=data.train.weights)
            training.check_same_everywhere(title)
            val = evaluate(model, data.val)
            size = size_of(training.weights)
            batches.set_postfix_str(
                f"loss {train['loss']:.4f}, val {val['accuracy']:.2f} %"
                + (f", {size['bitwidth']:.3f} bit" if training.weights else "")
            )
        seconds = time.monotonic() - started
        training.seconds += seconds
        training.epochs_done += 1
        run.log.write(
            "epoch",
            stage=stage,
            epoch=number + 1,
            **dataclasses.asdict(epoch),
            loss=train["loss"],
            train_accuracy=train["accuracy"],
            val_loss=val["loss"],
            val_accuracy=val["accuracy"],
            **size,
            bitwidths={w.name: w.bitwidth for w in training.weights},
            seconds=round(seconds, 2),
        )
        after_epoch(epoch, val["accuracy"])
        state = {
            "net": run.recipe.net,
            "epochs": [dataclasses.asdict(epoch) for epoch in epochs],
            "epochs_done": training.epochs_done,
            "seconds": training.seconds,
            "best": training.best,
            "model": plain_state(model),
            "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        }
        save_checkpoint(resume_point, state)
    resume_point.unlink(missing_ok=True)


def resume(training: Training, state: dict, epochs: list[Epoch]) -> None:
    """Put `training` back to where `state` was saved."""
    if state["epochs"] != [dataclasses.asdict(epoch) for epoch in epochs]:
        raise InputError(
            "--resume: the flags give another schedule than the run that was interrupted"
        )
    training.model.load_state_dict(state["model"])
    for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    training.epochs_done, training.seconds = state["epochs_done"], state["seconds"]
    training.best = state["best"]


def size_of(weights: list[MultiBitWeight]) -> dict:
    """The network's average bitwidth and its storage in bytes; None where nothing is quantized."""
    if not weights:
        return {"bitwidth": None, "storage_bytes": None}
    return {"bitwidth": average_bitwidth(weights), "storage_bytes": storage_bytes(weights)}


def finish(
    run: Run, stage: str, training: Training, path: Path, **accuracies: float | None
) -> dict:
    """Log and return the stage's result."""
    result = {
        "stage": stage,
        **accuracies,
        **size_of(training.weights),
        "file_bytes": path.stat().st_size,
        "seconds": round(training.seconds, 1),
    }
    run.log.write("result", **result)
    return {**result, "file": path, "weights": training.weights}
