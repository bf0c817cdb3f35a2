"""The three stages (SPEC section 6). Each starts from files, so each works in its own process."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.loaders import Loader, Split
from ..errors import InputError
from ..extras.compiled import quantizer_kind
from ..extras.distill import distillation
from ..files.checkpoint import load_checkpoint, load_model, save_checkpoint, weights_in
from ..files.coding import round_floats
from ..files.packed import ENDING, save_packed
from ..files.runlog import RunLog, plain_flags
from ..machine.interruption import Interruption
from ..machine.processes import check_batch_norm, is_main
from ..method.network import quantize, restore
from ..training import schedule
from ..training.epoch import LossFunction, classification, compute_in_bfloat16, evaluate
from ..training.loop import Training, quantized_training, score, size_of, train_through
from ..training.pruning import Layers, PruningPlan, SketchedLayer, expected_size, pruning_plan
from ..training.schedule import Epoch
from .checks import asked_layers, check_data, check_same_layers, posttrained_path
from .flags import one_or_each
from .report import expectation, published_target
from .resume import ResumePoints, plain_state


@dataclass(frozen=True)
class Recipe:
    """What one entry script adds to the shared stages.

    Attributes:
        net: name of the network, as checkpoints record it.
        network: makes it, untrained.
        load_data: (flags, indices of the held-out images or None to draw them) -> loaders, indices.
        load_test: flags -> the loader of the test set, which needs no other images.
        pretrain_optimizer: (parameters, flags) -> optimizer of the full-precision training.
        published: the paper's row, if it has one: bitwidth, storage in bytes, top-1 in percent.
        fetch: flags -> full-precision weights to take instead of training, or None to train.
    """

    net: str
    network: Callable[[], nn.Module]
    load_data: Callable[[Namespace, Tensor | None], tuple[Split, Tensor]]
    load_test: Callable[[Namespace], Loader]
    pretrain_optimizer: Callable[..., Optimizer]
    published: dict[str, float] | None = None
    fetch: Callable[[Namespace], dict | None] = lambda args: None


# Whose checkpoints serve where a stage's are asked for: post-training may go on from itself.
MADE_BY = {"PRETRAIN": {"pretrain"}, "ALQ": {"alq", "posttrain"}}


@dataclass(frozen=True)
class Run:
    """One command: its recipe, its flags, its log, and whether it is to stop.

    `point` is the resume point of the first stage that it runs, None to start it anew.
    """

    recipe: Recipe
    args: Namespace
    log: RunLog
    interruption: Interruption
    point: dict | None = None

    def network(self) -> nn.Module:
        """A new network on the device. channels_last is what convolutions run fastest in."""
        model = self.recipe.network().to(self.args.device, memory_format=torch.channels_last)
        if self.args.amp:
            compute_in_bfloat16(model, self.args.device)
        if self.args.compile:
            model.compile()
        return model

    def load_data(self, model: nn.Module, val_indices: Tensor | None) -> tuple[Split, Tensor]:
        """The recipe's; InputError if `model` cannot be trained on a batch of them."""
        data, val_indices = self.recipe.load_data(self.args, val_indices)
        check_batch_norm(model, data.train.count, self.args.batch_size)
        check_data(self.args, self.recipe.network, data)
        return data, val_indices

    def announce_pruning(self, layers: Layers, batches: int) -> tuple[PruningPlan, dict]:
        """Print what --ALQ will leave of the freshly sketched `layers`; the plan and that size."""
        plan = pruning_plan(self.args, layers, batches)
        size = expected_size(plan, layers)
        if is_main():
            print(f"--ALQ, {expectation(plan, size)}")
            if note := published_target(plan, size, self.recipe.published):
                print(note)
        return plan, size

    def resume_points(
        self, stage: str, training: Training, source: Path | None = None
    ) -> ResumePoints:
        """Those of `stage`, which starts from checkpoint `source`; `training` goes back to one."""
        points = ResumePoints(
            self.args, self.recipe.net, stage, training, self.log, self.interruption, source
        )
        if self.point and self.point["stage"] == stage:
            points.go_back(self.point)
        return points

    def checkpoint(
        self, path: Path, stage: str, training: Training, finished: bool, **more: object
    ) -> None:
        """Save the network, its multi-bit weights and what the next stage needs to know."""
        flags = plain_flags(self.args)
        for about_interruptions in ("resume", "save_every"):  # of which the result holds no trace
            del flags[about_interruptions]
        content = {
            "net": self.recipe.net,
            "stage": stage,
            "finished": finished,
            "flags": flags,
            "model": plain_state(training.model),
            "weights": [weight.state_dict() for weight in training.weights],
        }
        save_checkpoint(path, {**content, **more})

    def loss(self, teacher: dict | None = None) -> LossFunction:
        """The training loss; --distill reads its teacher from --model_ori unless it is given."""
        if not self.args.distill:
            return classification
        if teacher is None:
            teacher = self.require(self.args.model_ori, "PRETRAIN", "model_ori")["model"]
        model = self.network()
        model.load_state_dict(teacher)
        return distillation(model, self.args.distill, self.args.temperature)

    def require(self, path: Path, maker: str, flag: str) -> dict:
        """The checkpoint that the stage before saved at `path`, which `flag` names."""
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise InputError(f"--{flag} {path}: {what}; --{maker} makes it")
        content = load_checkpoint(path, self.recipe.net)
        if lacking := sorted({"stage", "model"} - set(content)):
            raise InputError(f"--{flag} {path}: has no '{lacking[0]}'; make it again by --{maker}")
        if content["stage"] not in MADE_BY[maker]:
            raise InputError(
                f"--{flag} {path}: holds what --{content['stage'].upper()} saved; "
                f"give what --{maker} makes"
            )
        return content


# ---------------------------------------------------------------------------- stages


def pretrain(run: Run) -> dict:
    """Train or fetch the full-precision network; its best epoch on validation -> --model_ori."""
    args = run.args
    torch.manual_seed(args.seed)
    model = run.network()
    data, val_indices = run.load_data(model, None)
    if args.ALQ:
        layers = [
            SketchedLayer(*layer) for layer in asked_layers(args, run.recipe.network).values()
        ]
        run.announce_pruning(layers, len(data.train))
    optimizer = run.recipe.pretrain_optimizer(model.parameters(), args)
    training = Training(model, [optimizer], {"pretrain": optimizer.step})

    def keep_best(epoch: Epoch, val: dict) -> None:
        if score(val) > training.best:
            training.best = score(val)
            run.checkpoint(args.model_ori, "pretrain", training, False, val_indices=val_indices)

    points = run.resume_points("pretrain", training)
    fetched = run.recipe.fetch(args)
    if fetched is not None:
        load_model(model, fetched, f"--model_ori_urls {args.model_ori_urls}")
        epochs = []
    else:
        epochs = schedule.pretrain_schedule(args)
    follow(points, epochs, data, keep_best)
    if epochs:
        load_model(model, load_checkpoint(args.model_ori, run.recipe.net)["model"], "--model_ori")
    top1 = evaluate(model, data.test)["accuracy"]
    kept = {"val_indices": val_indices, "top1_fp": top1}
    run.checkpoint(args.model_ori, "pretrain", training, True, **kept)
    return finish(run, "pretrain", training, args.model_ori, top1_fp=top1, top1=None)


def alq(run: Run) -> dict:
    """Sketch --model_ori, then rounds of basis, coordinate and pruning epochs -> --model."""
    args = run.args
    source = run.require(args.model_ori, "PRETRAIN", "model_ori")
    model = run.network()
    load_model(model, source["model"], f"--model_ori {args.model_ori}")
    data, val_indices = run.load_data(model, source.get("val_indices"))
    weights = quantize(
        model, one_or_each(args.structure), one_or_each(args.subc), one_or_each(args.max_bit)
    )
    plan, size = run.announce_pruning(weights, len(data.train))
    loss = run.loss(source["model"])
    kind = quantizer_kind(args.compile)
    training = quantized_training(model, weights, args, loss, plan, kind)
    kept = {"val_indices": val_indices, "top1_fp": source.get("top1_fp")}
    epochs = schedule.alq_schedule(args, plan.rounds)
    points = run.resume_points("alq", training, args.model_ori)
    if not points.resumed:
        run.log.write("plan", plan=str(plan), rounds=plan.rounds, expected=size)
        run.checkpoint(args.model, "alq", training, False, **kept)

    def after_pruning(epoch: Epoch, val: dict) -> None:
        finished = training.epochs_done == len(epochs)
        if finished or epochs[training.epochs_done].round != epoch.round:
            top1 = evaluate(model, data.test)["accuracy"]
            run.log.write("round", round=epoch.round, top1=top1, **size_of(weights))
            run.checkpoint(args.model, "alq", training, finished, **kept)

    follow(points, epochs, data, after_pruning)
    if args.floats == "float16" and not args.POSTTRAIN:
        round_floats(model, weights)
    top1 = evaluate(model, data.test)["accuracy"]
    return finish(run, "alq", training, args.model, top1_fp=kept["top1_fp"], top1=top1)


def posttrain(run: Run) -> dict:
    """STE epochs, then coordinate epochs on --model; the best by validation accuracy is saved."""
    args = run.args
    source = run.require(args.model, "ALQ", "model")
    states = weights_in(source, f"--model {args.model}")
    check_same_layers(args, run.recipe.network, states, source.get("val_indices", ()))
    model = run.network()
    load_model(model, source["model"], f"--model {args.model}")
    data, val_indices = run.load_data(model, source.get("val_indices"))
    weights = restore(model, states)
    kind = quantizer_kind(args.compile)
    training = quantized_training(model, weights, args, run.loss(), kind=kind)
    kept = {"val_indices": val_indices, "top1_fp": source.get("top1_fp")}
    target = posttrained_path(args)

    def keep_best(epoch: Epoch, val: dict) -> None:
        if score(val) > training.best:
            training.best = score(val)
            run.checkpoint(target, "posttrain", training, False, **kept)

    epochs = schedule.posttrain_schedule(args)
    points = run.resume_points("posttrain", training, args.model)
    if not points.resumed:
        run.checkpoint(target, "posttrain", training, False, **kept)
    follow(points, epochs, data, keep_best)
    best = load_checkpoint(target, run.recipe.net)
    load_model(model, best["model"], str(target))
    training.weights = restore(model, best["weights"])
    if args.floats == "float16":
        round_floats(model, training.weights)
    run.checkpoint(target, "posttrain", training, True, **kept)
    top1 = evaluate(model, data.test)["accuracy"]
    return finish(run, "posttrain", training, target, top1_fp=kept["top1_fp"], top1=top1)


STAGES = {"PRETRAIN": pretrain, "ALQ": alq, "POSTTRAIN": posttrain}
# The flag that names what a stage starts from, and the stage that makes it.
SOURCES = {"ALQ": ("model_ori", "PRETRAIN"), "POSTTRAIN": ("model", "ALQ")}


def follow(
    points: ResumePoints,
    epochs: list[Epoch],
    data: Split,
    after_epoch: Callable[[Epoch, dict], None],
) -> None:
    """`train_through` with the run's log and its resume points."""

    def then_save(epoch: Epoch, val: dict) -> None:
        after_epoch(epoch, val)
        points.after_epoch()

    if not points.resumed:
        points.save()
    train_through(
        points.stage,
        points.training,
        epochs,
        data.train,
        data.val,
        points.log.write,
        then_save,
        points.after_step,
    )


def finish(
    run: Run, stage: str, training: Training, path: Path, **accuracies: float | None
) -> dict:
    """Log and return the stage's result; the last quantizing stage writes the packed file too."""
    packed, parts = None, None
    if training.weights and (stage == "posttrain" or not run.args.POSTTRAIN):
        packed = path.with_suffix(ENDING)
        args = run.args
        parts = save_packed(packed, training.model, training.weights, args.floats, args.coded)
    result = {
        "stage": stage,
        **accuracies,
        **size_of(training.weights),
        "file_bytes": (packed or path).stat().st_size,
        "seconds": round(training.seconds, 1),
    }
    run.log.write("result", **result)
    files = {"file": path, "packed": packed, "parts": parts}
    return {**result, **files, "weights": training.weights}
