"""What the three stages share: a command's flags, files and log, what is read and saved."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..data.loaders import Split, memory_format
from ..errors import InputError
from ..files.checkpoint import load_checkpoint, load_model, save_checkpoint, tensors_of
from ..files.packed import save_packed
from ..files.paths import RunFiles, packed, part
from ..files.runlog import RunLog, plain_flags
from ..machine.interruption import Interruption
from ..machine.processes import check_batch_norm, is_main
from ..method.quantized_inputs import (
    act_bit,
    activations_in,
    quantize_activations,
    restore_activations,
)
from ..training.epoch import compute_in_bfloat16, score
from ..training.loop import Training, size_of
from ..training.progress import Progress
from ..training.schedule import alq_schedule, posttrain_schedule, pretrain_schedule
from .checks import check_data, check_dataset, counted_plan
from .recipe import Recipe
from .report import expectation

# Whose checkpoints serve where a stage's are asked for: post-training may go on from itself.
MADE_BY = {"PRETRAIN": {"pretrain"}, "ALQ": {"alq", "posttrain"}}


@dataclass(frozen=True)
class Run:
    """One command, and what the stages have in common.

    Attributes:
        recipe: what the script brings.
        args: the flags.
        files: the names of what it reads and writes.
        log: gets an event a line.
        interruption: whether the run is to stop.
        point: the resume point of the first stage that it runs, None to start it anew.
        progress: the bars.
    """

    recipe: Recipe
    args: Namespace
    files: RunFiles
    log: RunLog
    interruption: Interruption
    point: dict | None = None
    progress: Progress = field(default_factory=Progress)

    def new_network(self) -> nn.Module:
        """Return an untrained network on the device, in the layout that its pictures come in."""
        model = self.recipe.network()
        layout = memory_format(self.args)
        model = model.to(self.args.device, memory_format=layout)  # type: ignore[call-overload]
        if self.args.amp:
            compute_in_bfloat16(model, self.args.device)
        if self.args.compile:
            model.compile()
        return model

    def saved_network(self, state: dict, source: str) -> nn.Module:
        """Return the network of state dict `state` from file `source`, with its activations."""
        model = self.new_network()
        try:
            restore_activations(model, state)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        load_model(model, state, source)
        return model

    def add_activations(self, model: nn.Module, stage: str, source: str) -> None:
        """Quantize the activations that `stage` trains with, where `model` has float ones.

        Raises: InputError if it, which `source` is the name of, has some of other bits.
        """
        M, found = self.args.act_bit, activations_in(model).values()
        if other := {len(each.gamma) for each in found} - {M}:
            raise InputError(
                f"--act_bit {M}: {source} has activations of {min(other)} bit; give that, or "
                "another file"
            )
        begun = stage != "pretrain" or self.args.act_from == "pretrain"
        if M and not found and begun:
            quantize_activations(model, M)

    def require(self, path: Path, maker: str, flag: str) -> dict:
        """Return the checkpoint that stage `maker` saved at `path`, which `flag` names."""
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise InputError(f"--{flag} {path}: {what}; --{maker} makes it")
        content = load_checkpoint(path, self.recipe.net)
        check_dataset(self.recipe, content.get("dataset"), f"--{flag} {path}")
        if "target" in content:
            raise InputError(f"--{flag} {path}: is a resume point; give the checkpoint (.pth)")
        if lacking := sorted({"stage", "model"} - set(content)):
            raise InputError(f"--{flag} {path}: has no '{lacking[0]}'; make it again by --{maker}")
        if content["stage"] not in MADE_BY[maker]:
            raise InputError(
                f"--{flag} {path}: holds what --{content['stage'].upper()} saved; "
                f"give what --{maker} makes"
            )
        return content

    def load_data(self, model: nn.Module, val_indices: Tensor | None) -> tuple[Split, Tensor]:
        """Return loaders and the held-out images; InputError if `model` cannot train on them."""
        data, val_indices = self.recipe.load_data(self.args, val_indices)
        check_batch_norm(model, data.train.count, self.args.batch_size)
        check_data(self.args, self.recipe, data)
        return data, val_indices

    def announce(self, batches: int) -> None:
        """Print, once, the epochs of each stage, and what --ALQ will leave; known from the counts.

        `batches` are those of an epoch. A run that goes on has said it when it began.
        """
        args, stages, lines = self.args, self.progress.stages, []
        if stages:
            return
        if args.PRETRAIN:
            stages["pretrain"] = [] if getattr(args, "DOWNLOAD", False) else pretrain_schedule(args)
        if args.ALQ:
            layers, plan = counted_plan(args, self.recipe, batches)
            stages["alq"] = alq_schedule(args, plan.rounds)
            lines = [f"--ALQ, {expectation(plan, layers, self.recipe.published)}"]
        if args.POSTTRAIN:
            stages["posttrain"] = posttrain_schedule(args)
        if is_main() and not self.point:
            print(self.progress, *lines, sep="\n")

    def save(self, path: Path, training: Training, finished: bool, **more: object) -> None:
        """Save the network, its multi-bit weights and what the next stage needs to know.

        Until the stage is `finished`, `path` stays as it was: the part file beside it gets this.
        """
        flags = plain_flags(self.args)
        for flag in ("resume", "save_every", "tensorboard"):  # of which the result holds no trace
            del flags[flag]
        content = {
            "net": self.recipe.net,
            "dataset": self.recipe.dataset,
            "stage": training.stage,
            "finished": finished,
            "flags": flags,
            "model": plain_state(training.model),
            "weights": [weight.state_dict() for weight in training.weights],
        }
        save_checkpoint(path if finished else part(path), {**content, **more})
        if finished and is_main():
            part(path).unlink(missing_ok=True)

    def save_if_best(self, path: Path, training: Training, val: dict, **more: object) -> None:
        """Save where the means `val` on the validation images are the stage's best so far."""
        if score(val) > training.best:
            training.best = score(val)
            self.save(path, training, False, **more)

    def finish(self, training: Training, path: Path, **accuracies: float | None) -> dict:
        """Log and return the result; the last quantizing stage writes the packed file too."""
        small, parts = None, None
        if training.weights and (training.stage == "posttrain" or not self.args.POSTTRAIN):
            small = packed(path)
            how = self.args.floats, self.args.coded, self.recipe.dataset
            parts = save_packed(small, training.model, training.weights, *how)
        result = {
            "stage": training.stage,
            **accuracies,
            **size_of(training.weights),
            **({"act_bit": M} if (M := act_bit(training.model)) else {}),
            "file_bytes": (small or path).stat().st_size,
            "seconds": round(training.seconds, 1),
        }
        self.log.write("result", **result)
        files = {"file": path, "packed": small, "parts": parts}
        return {**result, **files, "weights": training.weights, "model": training.model}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU, contiguous."""
    return {k: v.detach().cpu().contiguous() for k, v in tensors_of(model).items()}
