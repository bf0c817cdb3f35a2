"""What callers of the library get wrong: it works, or one line says what, where, what to do."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import alq
import lenet5
from alq.command.resume import plain_state
from alq.errors import InputError, NotFinite

pytestmark = pytest.mark.filterwarnings("ignore:.*more than the .* of float32")
ROUND = {"R": 1, "epoch_basis": 1, "epoch_coord": 0, "epoch_ste": 1, "epoch_post_coord": 1}
SHORT = alq.Schedule(**ROUND, pr=0.5)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 10, 6, generator=generator)
    return list(zip(x, (x[..., 0] > 0).long(), strict=True))


def fit(model: nn.Module, weights: list, **changed: object) -> dict:
    options = {"train_loader": batches(), "val_loader": batches(2), "schedule": SHORT}
    return alq.fit(model, weights, **{**options, "progress": False, **changed})


# ---------------------------------------------------------------------------- another model's


def test_weights_of_another_model_are_refused() -> None:
    model = small()
    weights = alq.quantize(model)
    with pytest.raises(InputError, match=r"^0\.weight: is not this model's; give"):
        fit(copy.deepcopy(model), weights)
    loaded = copy.deepcopy((model, weights))[0].state_dict()
    model.load_state_dict(loaded, assign=True)
    with pytest.raises(InputError, match=r"^0\.weight: is not this model's; give"):
        fit(model, weights)
    model, weights = copy.deepcopy((small(), alq.quantize(small())))
    with pytest.raises(InputError, match=r"not all are multi-bit weights"):
        fit(model, model.parameters())
    both = small()
    both, weights = copy.deepcopy((both, alq.quantize(both)))
    assert fit(both, weights)["bitwidth"] > 0
    other = small()
    inside = nn.Sequential(other)  # its parameters have other names, but are these
    assert fit(inside, alq.quantize(other))["bitwidth"] > 0


def test_a_model_that_was_loaded_after_quantizing_is_refused() -> None:
    model, before = small(), small().state_dict()
    weights = alq.quantize(model, max_bit=1)
    model.load_state_dict(before)
    with pytest.raises(InputError, match=r"^0\.weight: the parameter does not hold w_hat"):
        fit(model, weights)
    for weight in weights:
        weight.write()
    fit(model, weights)


def test_a_missing_gradient_has_a_reason() -> None:
    model = small()
    weights = alq.quantize(model)
    optimizer = alq.ALQ(weights)
    with pytest.raises(InputError, match=r"0\.weight: no gradient; nor has any other; call backw"):
        optimizer.basis_step()
    copy.deepcopy(model)(torch.ones(3, 6)).sum().backward()
    with pytest.raises(InputError, match="on this model and not on a copy"):
        optimizer.basis_step()
    model[3](torch.ones(3, 16)).sum().backward()
    with pytest.raises(InputError, match=r"0\.weight: no gradient; no batch has reached it; .* sk"):
        optimizer.basis_step()
    model[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"0\.weight: no gradient; its requires_grad is False; se"):
        optimizer.basis_step()
    with pytest.raises(InputError, match=r"0\.weight: no gradient; its requires_grad is False; se"):
        fit(model, weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", ["basis_step", "ste_step", "coordinate_step", "prune_step"])
def test_a_gradient_that_is_no_number_shows_in_the_weights(step: str, bad: float) -> None:
    """As with any optimizer. The search for levels would make weights that look like others."""
    model = small()
    weights = alq.quantize(model, max_bit=2)
    optimizer = alq.ALQ(weights)
    shares = [0.5, 0.5] if step == "prune_step" else []
    for number in (1.0, 1e30, bad):
        good = number in (1.0, 1e30)
        for weight in weights:
            weight.parameter.grad = torch.randn_like(weight.parameter)
        weights[1].parameter.grad[1, 5] = number
        getattr(optimizer, step)(*shares)
        assert weights[1].parameter.isfinite().all() == good


def test_files_and_weights_of_other_names_are_told(tmp_path) -> None:
    inside = small()
    weights = alq.quantize(inside)
    with pytest.raises(InputError, match=r"^0\.weight: is 1\.0\.weight in this model; give the"):
        alq.save_packed(tmp_path / "net.alq", nn.Sequential(nn.Linear(6, 6), inside), weights)
    alq.save_packed(tmp_path / "net.alq", inside, weights)


# ---------------------------------------------------------------------------- numbers that are none


class Spoiled:
    """A loss that is no number in one training batch, and notes the network at each evaluation."""

    def __init__(self, bad: int) -> None:
        self.bad, self.trained, self.seen = bad, 0, []

    def __call__(self, model: nn.Module, batch: tuple) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if not torch.is_grad_enabled():
            self.seen.append(copy.deepcopy(model.state_dict()))
            return loss
        self.trained += 1
        return loss * torch.nan if self.trained == self.bad else loss


@pytest.mark.parametrize(
    ("bad", "message", "place"),
    [
        (1, "alq 1/2 basis, batch 1: the loss is not finite; .* before the first epoch", None),
        (7, "alq 2/2 prune, batch 3: the loss is not finite; .* after epoch 1 of alq", 0),
        (9, "posttrain 1/2 ste, batch 1: the loss is not finite; .* after epoch 2 of alq", 1),
        (14, "posttrain 2/2 coordinate, batch 2: .* are as they were after epoch . of", None),
    ],
)
def test_fit_goes_back_to_the_last_good_epoch(bad, message, place) -> None:
    model = small()
    weights = alq.quantize(model, max_bit=2)
    start, loss = copy.deepcopy(model.state_dict()), Spoiled(bad)
    with pytest.raises(NotFinite, match=message):
        fit(model, weights, loss=loss, val_loader=batches(1))
    good = start if bad == 1 else loss.seen[place or 0]
    now = model.state_dict()
    assert all(value.isfinite().all() for value in now.values())
    if bad != 14:  # whichever was the best
        assert all(torch.equal(value, good[name]) for name, value in now.items())
    for weight in weights:
        assert torch.equal(weight.parameter, weight.w_hat())
    assert not model.training
    if bad == 1:  # it was found before any step
        assert loss.trained == 1
    loss.bad = 0
    assert fit(model, weights, loss=loss)["bitwidth"] > 0


def test_an_interrupted_fit_goes_back_too() -> None:
    model = small()
    weights, loss = alq.quantize(model, max_bit=2), Spoiled(0)

    def interrupted(model: nn.Module, batch: tuple) -> Tensor:
        if loss.trained == 6:
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(model, weights, loss=interrupted, val_loader=batches(1))
    assert all(torch.equal(x, loss.seen[0][name]) for name, x in model.state_dict().items())


# ---------------------------------------------------------------------------- the log

EVENT = '{"event": "start", "x": 1, "time": "2026-01-01T00:00:00+0000"}\n'
FOREIGN = ["notes", "notes\n", "\n", '{"a": 1}\n', EVENT + "notes\n", '{"event": "a"}\n', "PK\0\1"]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_is_no_log_is_neither_cut_nor_added_to(content, tmp_path, capsys) -> None:
    log = tmp_path / "m.jsonl"
    log.write_text(content)
    model = small()
    with pytest.raises(InputError, match=r"m\.jsonl is no log of ALQ, .*; name another"):
        fit(model, alq.quantize(model), log=log)
    with pytest.raises(SystemExit) as stopped:
        lenet5.main(f"--PRETRAIN --model {tmp_path}/m.pth --model_ori {tmp_path}/o.pth".split())
    assert stopped.value.code == 2
    assert "m.jsonl is no log of ALQ" in capsys.readouterr().err
    assert log.read_text() == content and list(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize("content", ["", EVENT, EVENT + '{"event": "ep', '{"event": "st'])
def test_a_log_is_added_to_and_a_torn_line_is_cut(content, tmp_path) -> None:
    log = tmp_path / "m.jsonl"
    log.write_text(content)
    model = small()
    fit(model, alq.quantize(model), log=log)
    whole = content[: content.rfind("\n") + 1]
    assert log.read_text().startswith(whole + '{"event": "plan"')
    fit(model, alq.quantize(model), log=log)  # what was written is a log


# ---------------------------------------------------------------------------- losses and batches


def mean(model: nn.Module, batch: tuple) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def correct(model: nn.Module, batch: tuple) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: mean(model, batch).reshape(1),
        lambda model, batch: mean(model, batch).reshape(1, 1),
        lambda model, batch: (mean(model, batch), correct(model, batch), torch.tensor(10)),
        lambda model, batch: (mean(model, batch), correct(model, batch).numpy(), np.int64(10)),
        lambda model, batch: [mean(model, batch), correct(model, batch).item(), np.float32(10)],
        lambda model, batch: (mean(model, batch), correct(model, batch)[None], torch.tensor([10])),
    ],
)
def test_numbers_in_any_form(loss: Callable, tmp_path) -> None:
    def plain(model: nn.Module, batch: tuple) -> tuple:
        return mean(model, batch), correct(model, batch), 10

    counts = isinstance(loss(small(), batches(1)[0]), tuple | list)
    results = []
    for function in (loss, plain if counts else mean):
        model = small()
        weights = alq.quantize(model, max_bit=2)
        results.append(fit(model, weights, loss=function, log=tmp_path / "log.jsonl"))
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], rel=1e-5)
    assert type(results[0]["val_loss"]) is float


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), "mean"),
        (lambda model, batch: mean(model, batch).item(), "a tensor of one number"),
        (lambda model, batch: (mean(model, batch), correct(model, batch)), "must return the mean"),
        (lambda model, batch: (mean(model, batch), batch[1] > 0, 10), "number of correct answers"),
        (lambda model, batch: mean(model, batch).detach(), "that depends on what is trained; or"),
        (lambda model, batch: {"loss": mean(model, batch)}, "must return the mean loss, a tensor"),
        (lambda model, batch: (mean(model, batch), None, None), "must return the mean loss"),
        (lambda model, batch: None, "must return the mean loss"),
        (lambda model, batch: (mean(model, batch), None, 0), "no samples were counted"),
    ],
)
def test_a_loss_that_is_none(loss: Callable, message: str) -> None:
    model = small()
    with pytest.raises(InputError, match=message):
        fit(model, alq.quantize(model), loss=loss)


def test_what_has_no_label_is_not_counted() -> None:
    """Torch's cross entropy leaves out -100; accuracy and mean loss are of the others."""
    model = small()
    weights = alq.quantize(model)
    x, y = batches(1)[0]
    some = torch.where(torch.arange(10) < 3, y, -100)
    loaders = [(x, some), (x, y)], [(x, some), (x, y)]
    result = fit(model, weights, train_loader=loaders[0], val_loader=loaders[1])
    with torch.no_grad():
        logits = model(torch.cat([x[:3], x]))
    labels = torch.cat([y[:3], y])
    right = (logits.argmax(1) == labels).sum().item()
    assert result["val_accuracy"] == pytest.approx(100 * right / 13)
    assert result["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


class Encoding(UserDict):
    """A batch as tokenizers give it: like a dict, but none, and it moves itself."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: {"epoch": torch.tensor(3), "x": x, "y": y},
        lambda x, y: {"about": {"file": "a"}, "x": x, "y": y},
        lambda x, y: Encoding(x=x, y=y),
    ],
    ids=["a number first", "no tensor first", "no dict"],
)
def test_a_batch_counts_for_its_samples(form: Callable) -> None:
    model = small()
    weights = alq.quantize(model)
    (x, y), (rest, labels) = batches(2)
    val = [form(x, y), form(rest[:2], labels[:2])]
    loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])  # noqa: E731
    result = fit(model, weights, train_loader=val, val_loader=val, loss=loss)
    with torch.no_grad():
        all_of_them = F.cross_entropy(model(torch.cat([x, rest[:2]])), torch.cat([y, labels[:2]]))
    assert result["val_loss"] == pytest.approx(all_of_them.item(), rel=1e-5)


@pytest.mark.parametrize("which", ["train_loader", "val_loader"])
def test_a_batch_without_samples_is_refused(which: str) -> None:
    model = small()
    loader = [*batches(2), (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))]
    with pytest.raises(InputError, match="a loader gave a batch of no samples; let it leave such"):
        fit(model, alq.quantize(model), **{which: loader})


class Stream(IterableDataset):
    def __iter__(self) -> Iterator:
        return iter([(torch.zeros(6), 0)] * 8)


class Once(list):
    """Has a length, and gives its batches once."""

    def __iter__(self) -> Iterator:
        while self:
            yield self.pop()


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Stream(), 4),
        lambda: (batch for batch in batches()),
        lambda: iter(DataLoader([(torch.zeros(6), 0)] * 8, 4)),
        lambda: zip(torch.zeros(3, 4, 6), torch.zeros(3, 4).long(), strict=True),
        lambda: [],
        lambda: None,
    ],
)
@pytest.mark.parametrize("which", ["train_loader", "val_loader"])
def test_loaders_that_cannot_serve_are_refused_before_training(loader, which) -> None:
    model = small()
    weights = alq.quantize(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=rf"^{which}: needs a length, .* give them anew each time"):
        fit(model, weights, **{which: loader()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loader_that_is_used_up_is_said() -> None:
    model = small()
    with pytest.raises(InputError, match="no samples were counted: loaders must give batches anew"):
        fit(model, alq.quantize(model), val_loader=Once(batches(2)))


# ---------------------------------------------------------------------------- states of modules


class Counting(nn.Linear):
    """Counts its batches, in a state of its own that is no buffer."""

    batches, as_tensor = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(x)

    def get_extra_state(self) -> object:
        return torch.tensor(self.batches) if self.as_tensor else {"batches": self.batches}

    def set_extra_state(self, state: object) -> None:
        self.batches = int(state if self.as_tensor else state["batches"])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_states_that_are_no_buffers(as_tensor: bool, tmp_path) -> None:
    model = nn.Sequential(Counting(6, 2))
    model[0].as_tensor = as_tensor
    weights, loss = alq.quantize(model), Spoiled(7)
    with pytest.raises(NotFinite):
        fit(model, weights, loss=loss)
    assert model[0].batches == 4  # as after the first epoch
    if as_tensor:
        alq.save_packed(tmp_path / "net.alq", model, weights)
        assert int(plain_state(model)["0._extra_state"]) == 4
    else:
        with pytest.raises(InputError, match=r"^0\._extra_state: is no tensor, and the files hold"):
            alq.save_packed(tmp_path / "net.alq", model, weights)
        with pytest.raises(InputError, match=r"^0\._extra_state: is no tensor, and the files hold"):
            plain_state(model)


# ---------------------------------------------------------------------------- numbers of a schedule


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("R", (2.5, 0, -1, "x", None, True, float("nan"))),
        ("epoch_prune", (0, 1.0)),
        ("epoch_basis", (-1, 1.5, "3")),
        ("epoch_coord", (-1, None)),
        ("epoch_ste", (-1, 2.0)),
        ("epoch_post_coord", (-1,)),
        ("lr", ("x", 0, -1, float("nan"), float("inf"), None, [1e-3], 1e-3 + 0j)),
        ("ld_basis", (0, 1.5, "x")),
        ("ld_coord", (-0.5, float("nan"))),
        ("ld_ste", (2,)),
        ("ld_post_coord", (0,)),
        ("wd", (-1, float("nan"), "x")),
        ("pr", (1.1, 0, float("nan"), None)),
        ("top_k", (2, 0, "x")),
        ("lr_post_coord", (0, "x", float("inf"))),
        ("seed", (-1, 0.5, "x")),
        ("target_bit", (-1, float("nan"), "x")),
        ("target_kb", (-1, float("inf"))),
    ],
)
def test_a_schedule_names_the_number_that_is_wrong(name: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(InputError, match=rf"^{name} .*: (must be|is a share)") as refused:
            alq.Schedule(**{name: value})
        assert "\n" not in str(refused.value) and refused.value.argument == name


def test_numbers_of_other_libraries_are_numbers() -> None:
    schedule = alq.Schedule(R=np.int64(2), lr=np.float32(0.1), pr=1, seed=np.int32(3), wd=0)
    assert schedule.R == 2 and schedule.pr == 1
    model = small()
    with pytest.raises(InputError, match=r"^schedule: is a dict, no alq\.Schedule"):
        fit(model, alq.quantize(model), schedule={"R": 2})


# ---------------------------------------------------------------------------- the optimizer


def test_schedulers_of_torch_know_the_steps() -> None:
    model = small()
    optimizer = alq.ALQ(alq.quantize(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (optimizer.coordinate_step, optimizer.basis_step):
            model(torch.ones(3, 6)).square().sum().backward()
            step()
            scheduler.step()
    assert optimizer.amsgrad.lr == pytest.approx(0.025)
    optimizer = alq.ALQ(alq.quantize(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):  # where it is true
        scheduler.step()


@pytest.mark.parametrize("nothing", [[], (), iter([])])
def test_a_quantizer_of_nothing_is_refused(nothing) -> None:
    with pytest.raises(InputError, match=r"^weights: none given; pass what alq\.quantize"):
        alq.ALQ(nothing)
    with pytest.raises(InputError, match=r"^weights: not all are multi-bit weights; pass"):
        alq.ALQ(small().parameters())
