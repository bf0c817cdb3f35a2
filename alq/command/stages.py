"""The three stages of the paper. Each starts from files, so each works in its own process."""

from collections.abc import Iterable
from itertools import chain, islice

import torch
from torch import Tensor, nn

from ..extras.compiled import quantizer_class
from ..extras.constant_units import fold_constant_units
from ..extras.unit_sources import unit_sources
from ..files.checkpoint import load_checkpoint, load_model, weights_in
from ..files.floats import round_floats
from ..files.paths import part
from ..machine.processes import gather_from_all
from ..method.network import quantize, restore
from ..method.weight import MultiBitWeight
from ..training.calibration import calibrate
from ..training.epoch import evaluate
from ..training.loop import Training, quantized_training, rate_start, size_of, train
from ..training.plan import expected_size, pruning_plan
from ..training.schedule import Epoch, alq_schedule, posttrain_schedule, pretrain_schedule
from .checks import check_same_layers, file_size
from .flags import grouping_options
from .resume import ResumePoints
from .shared import Run

PICTURES = 8  # that constant units are found on


def pretrain(run: Run) -> dict:
    """Train or fetch the full-precision network; its best epoch on validation -> --model_ori."""
    args, target = run.args, run.files.model_ori
    torch.manual_seed(args.seed)
    model = run.new_network()
    data, val_indices = run.load_data(model, None)
    run.announce(len(data.train))
    fetched = run.recipe.fetch(args)
    if fetched is None:
        epochs = pretrain_schedule(args)
    else:
        load_model(model, fetched, f"--model_ori_urls {args.model_ori_urls}")
        epochs = []
    run.add_activations(model, "pretrain", "")
    optimizer = run.recipe.pretrain_optimizer(model.parameters(), args)
    training = Training("pretrain", model, [optimizer], {"pretrain": optimizer.step})
    points = ResumePoints(run, training)
    if not points.restore():
        calibrate(training, data.train)

    def keep_best(epoch: Epoch, val: dict) -> None:
        run.save_if_best(target, training, val, val_indices=val_indices)

    saves = keep_best, points.save_if_due
    train(training, epochs, data.train, data.val, run.log.write, *saves, run.progress)
    if epochs:
        load_model(model, load_checkpoint(part(target), run.recipe.net)["model"], "--model_ori")
    top1 = evaluate(model, data.test)["accuracy"]
    run.save(target, training, True, val_indices=val_indices, top1_fp=top1)
    return run.finish(training, target, top1_fp=top1, top1=None)


def alq(run: Run) -> dict:
    """Sketch --model_ori, then rounds of basis, coordinate and pruning epochs -> --model."""
    args, target = run.args, run.files.model
    source = run.require(run.files.model_ori, "PRETRAIN", "model_ori")
    model = run.saved_network(source["model"], f"--model_ori {args.model_ori}")
    run.add_activations(model, "alq", f"--model_ori {args.model_ori}")
    data, val_indices = run.load_data(model, source.get("val_indices"))
    run.announce(len(data.train))
    weights = quantize(model, **grouping_options(args))
    file = file_size(args, model, weights)
    if file is not None:
        call: tuple[list, dict] = [same_pictures(data.val).to(args.device)], {}
        file = file.knowing(unit_sources(model, weights, call))
    plan = pruning_plan(args, weights, len(data.train), file=file)
    optimizer = quantizer_class(args.compile)
    training = quantized_training("alq", model, weights, args, plan=plan, optimizer=optimizer)
    points, epochs = ResumePoints(run, training), alq_schedule(args, plan.rounds)
    top1_fp = source.get("top1_fp")
    kept = {"val_indices": val_indices, "top1_fp": top1_fp, "sources": points.sources}
    if not points.restore():
        calibrate(training, data.train)
        size = expected_size(plan, weights)
        run.log.write("plan", plan=str(plan), rounds=plan.rounds, expected=size)
        run.save(target, training, False, **kept)

    def save_round(epoch: Epoch, val: dict) -> None:
        finished = training.epochs_done == len(epochs)
        if finished or epochs[training.epochs_done].round != epoch.round:
            top1 = evaluate(model, data.test)["accuracy"]
            run.log.write("round", round=epoch.round, top1=top1, **size_of(weights))
            run.save(target, training, finished, **kept)

    saves = save_round, points.save_if_due
    train(training, epochs, data.train, data.val, run.log.write, *saves, run.progress)
    if not args.POSTTRAIN:
        shrink(run, model, weights, data.val)
    top1 = evaluate(model, data.test)["accuracy"]
    return run.finish(training, target, top1_fp=top1_fp, top1=top1)


def posttrain(run: Run) -> dict:
    """Train --model by STE epochs, then coordinate epochs; save the best by validation accuracy.

    The network as --ALQ left it competes, too: it is kept if no epoch is better.
    """
    args, target = run.args, run.files.posttrained
    source = run.require(run.files.model, "ALQ", "model")
    states = weights_in(source, f"--model {args.model}")
    check_same_layers(args, run.recipe, states, source.get("val_indices", ()))
    model = run.saved_network(source["model"], f"--model {args.model}")
    run.add_activations(model, "posttrain", f"--model {args.model}")
    data, val_indices = run.load_data(model, source.get("val_indices"))
    run.announce(len(data.train))
    weights, optimizer = restore(model, states), quantizer_class(args.compile)
    training = quantized_training("posttrain", model, weights, args, optimizer=optimizer)
    points = ResumePoints(run, training)
    top1_fp = source.get("top1_fp")
    kept = {"val_indices": val_indices, "top1_fp": top1_fp, "sources": points.sources}
    if not points.restore():
        calibrate(training, data.train)
        rate_start(training, data.val, run.log.write)
        run.save(target, training, False, **kept)

    def keep_best(epoch: Epoch, val: dict) -> None:
        run.save_if_best(target, training, val, **kept)

    epochs = posttrain_schedule(args)
    saves = keep_best, points.save_if_due
    train(training, epochs, data.train, data.val, run.log.write, *saves, run.progress)
    best = load_checkpoint(part(target), run.recipe.net)
    load_model(model, best["model"], str(target))
    training.weights = restore(model, best["weights"])
    shrink(run, model, training.weights, data.val)
    run.save(target, training, True, **kept)
    top1 = evaluate(model, data.test)["accuracy"]
    return run.finish(training, target, top1_fp=top1_fp, top1=top1)


def shrink(run: Run, model: nn.Module, weights: list[MultiBitWeight], batches: Iterable) -> None:
    """Make the quantized network what the packed file will hold of it."""
    if run.args.fold:
        fold_constant_units(model, weights, same_pictures(batches).to(run.args.device))
    round_floats(model, weights, run.args.floats)


def same_pictures(batches: Iterable) -> Tensor:
    """Return the first pictures of `batches` that any process has, the same in all processes.

    So each finds the same units to be constant. A process may have no share of so few pictures.
    """
    own = [x[:PICTURES].cpu() for x, _ in islice(batches, 1)]
    return next(chain(*gather_from_all(own)))
