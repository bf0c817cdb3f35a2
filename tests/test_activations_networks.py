"""Activations in binary bases within networks: where they stand, and what networks go through."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import alq
import lenet5
from alq.command.report import network_lines
from alq.errors import InputError
from alq.method.activations import BinaryActivation
from alq.method.quantized_inputs import activations_in, restore_activations


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 36, 10),
    )  # fmt: skip


def pictures(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6)


def with_activations(act_bit: int = 2) -> tuple[nn.Sequential, torch.Tensor]:
    """A network that has seen batches, in eval mode, and pictures."""
    model = small_network()
    alq.quantize_activations(model, act_bit)
    for _ in range(3):
        model(pictures())
    return model.eval(), pictures()


def inputs_of(model: nn.Module, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer with a weight is fed, after all its hooks."""
    found = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: found.__setitem__(name, inputs[0])
        )
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    ]
    model(*batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("act_bit", [1, 2, 8])
def test_every_layer_but_the_first_is_fed_levels(act_bit) -> None:
    model = small_network()
    names = [name for name, _ in model.named_parameters()]
    placed = alq.quantize_activations(model, act_bit)
    assert list(placed) == ["3", "6"] == list(activations_in(model))
    assert [name for name, _ in model.named_parameters()] == names
    fed = inputs_of(model.train(), pictures())
    for name, activation in placed.items():
        levels = set(activation.levels().tolist())
        near = {min(levels, key=lambda level: abs(level - x)) for x in fed[name].unique().tolist()}
        torch.testing.assert_close(fed[name].unique(), torch.tensor(sorted(near)))
    assert len(fed["0"].unique()) > 256


def test_a_layer_that_is_skipped_keeps_its_input() -> None:
    model = small_network()
    assert list(alq.quantize_activations(model, 2, skip=["6.weight"])) == ["3"]
    assert list(alq.quantize_activations(small_network(), 2, skip=lambda n, p: p.dim() < 4)) == [
        "3"
    ]
    assert list(alq.quantize_activations(small_network(), 2, first="3.weight")) == ["0", "6"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_bit": 0}, "act_bit 0: must be 1 to 8"),
        ({"act_bit": 9}, "act_bit 9: must be 1 to 8"),
        ({"act_bit": 2.0}, "act_bit 2.0: must be a whole number"),
        ({"act_bit": True}, "act_bit True: must be a whole number"),
        ({"act_bit": 2, "skip": ["7.weight"]}, "skip: the model has no parameter '7.weight'"),
        ({"act_bit": 2, "first": "3.bias"}, "first: the model has no layer with a weight '3.bias'"),
        ({"act_bit": 2, "skip": ["3.weight", "6.weight"]}, "act_bit 2: no quantized layer but"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(options, message) -> None:
    model = small_network()
    with pytest.raises(InputError, match=f"^{message}"):
        alq.quantize_activations(model, **options)
    assert not activations_in(model)


def test_a_second_time_is_refused() -> None:
    model, _ = with_activations()
    with pytest.raises(InputError, match=r"^act_bit 3: 3 has an input of 2 bit already"):
        alq.quantize_activations(model, 3)
    with pytest.raises(InputError, match="no quantized layer"):
        alq.quantize_activations(nn.ReLU(), 3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict"])
def test_a_copy_has_levels_of_its_own(how) -> None:
    model, x = with_activations()
    expected = model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = small_network().eval()
        restore_activations(twin, model.state_dict())
        twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    twin.train()(9 * x)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin.eval()(x), expected)


@pytest.mark.parametrize("seen", [False, True])
def test_traced_it_trains_as_it_does_eagerly(seen) -> None:
    """In one graph, once it has seen a batch."""
    model = small_network()
    alq.quantize_activations(model, 2)
    if seen:
        model(pictures())
    twin, batches = copy.deepcopy(model), [pictures() for _ in range(3)]
    compiled = torch.compile(model, fullgraph=seen, backend="aot_eager")
    for x in batches:
        for network in (compiled, twin):
            network.zero_grad()
            network(x).square().mean().backward()
        pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
        for (name, a), (_, b) in pairs:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    torch.testing.assert_close(compiled.eval()(x), twin.eval()(x))


def test_compiled_it_computes_as_it_does_eagerly(compiler) -> None:
    one, other = BinaryActivation(2, torch.empty(0)), BinaryActivation(2, torch.empty(0))
    x = torch.randn(40, 30).requires_grad_()
    one(x), other(x)
    results = []
    for activation in (torch.compile(one, fullgraph=True), other):
        y = activation(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x), *activation.buffers()))
    torch.testing.assert_close(*results)


def test_placed_in_a_network_that_ran_compiled_it_is_not_missed() -> None:
    model = small_network().eval()
    compiled, x = torch.compile(model, backend="eager"), pictures()
    before = compiled(x)
    alq.quantize_activations(compiled, 1)
    after = compiled(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x))


def test_autocast_computes_the_levels_in_float32() -> None:
    model, twin = small_network(), None
    alq.quantize_activations(model, 2)
    twin = copy.deepcopy(model)
    for _ in range(3):
        x = pictures(20)
        twin(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.sum().backward()
    for a, b in zip(activations_in(model).values(), activations_in(twin).values(), strict=True):
        assert a.gamma.dtype == torch.float32
        torch.testing.assert_close(a.gamma, b.gamma, rtol=0.1, atol=0)


@pytest.mark.parametrize("act_bit", [1, 2, 5])
def test_exported_it_computes_the_same(act_bit) -> None:
    model, x = with_activations(act_bit)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (x, pictures(9)):
        torch.testing.assert_close(program.module()(batch), model(batch))


def test_exporting_before_any_batch_is_refused() -> None:
    model = small_network().eval()
    alq.quantize_activations(model, 2)
    with pytest.raises(Exception, match="no batch has passed"):
        torch.export.export(model, (pictures(),))
    assert not activations_in(model)["3"].fitted


@pytest.mark.parametrize("act_bit", [2, 4])
def test_onnx_computes_the_same(act_bit, tmp_path) -> None:
    pytest.importorskip("onnxscript", reason="torch exports to ONNX by onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="what runs ONNX files")
    model, x = with_activations(act_bit)
    path = tmp_path / "network.onnx"
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, model(x).detach(), atol=1e-5)


class Attentive(nn.Module):
    """An embedding, attention, a GRU, and a last layer that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.last = nn.Linear(16, 30, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.last(self.gru(self.encoder(self.embedding(words)))[0])


def test_attention_recurrence_and_shared_weights() -> None:
    """The signed inputs of attention and a GRU have levels on both sides of 0."""
    model, words = Attentive(), torch.randint(30, (4, 7))
    placed = alq.quantize_activations(model, 4)
    expected = ["encoder.self_attn", "encoder.linear1", "encoder.linear2", "gru", "last"]
    assert list(placed) == expected
    model(words).sum().backward()
    model.eval()
    with torch.no_grad():  # which takes attention's fast path, where there is one
        fast = model(words)
    torch.testing.assert_close(fast, model(words))
    assert all(activation.fitted for activation in placed.values())
    for name in ("encoder.self_attn", "encoder.linear1", "gru"):
        assert placed[name].lowest < -0.5
    assert placed["encoder.linear2"].lowest == 0  # behind ReLU


def test_a_layer_that_is_fed_no_tensor_says_so() -> None:
    model = Attentive()
    alq.quantize_activations(model, 4)
    packed = nn.utils.rnn.pack_sequence([torch.rand(3, 16), torch.rand(2, 16)])
    with pytest.raises(InputError, match=r"^GRU: its first argument is no tensor"):
        model.gru(packed)


def test_nested_tensors_are_refused_with_the_way_out() -> None:
    """Which an encoder makes of its input in evaluation, if that is padded."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x, padding = torch.randn(4, 5, 8), torch.arange(5).expand(4, 5) > 2
    for nested in (True, False):
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        alq.quantize_activations(model, 2)
        model(x, src_key_padding_mask=padding)
        model.eval()
        with torch.no_grad():
            if nested:
                with pytest.raises(InputError, match=r"nested tensor, .*enable_nested_tensor=Fals"):
                    model(x, src_key_padding_mask=padding)
            else:
                assert model(x, src_key_padding_mask=padding).isfinite().all()


def test_a_layer_that_is_never_called_is_said_to_have_a_float_input(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 9))
    weights = alq.quantize(model, max_bit=1)
    alq.quantize_activations(model, 2)
    model[:3](torch.randn(8, 9))
    assert "activations: 2 bit into 1 layers, float into 0, 3" in network_lines(model, weights)
    alq.round_floats(model, weights, "6bit")
    alq.save_packed(tmp_path / "net.alq", model, weights, "6bit", coded=True)
    loaded = copy.deepcopy(model)
    alq.load_packed(tmp_path / "net.alq", loaded)
    assert not loaded[3].binary_input.fitted and loaded[2].binary_input.fitted


def test_a_layer_that_is_called_twice_has_one_set_of_levels() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(F.relu(self.second(F.relu(self.first(x)))))

    model = Twice()
    placed = alq.quantize_activations(model, 2)
    for _ in range(2):
        model(torch.randn(9, 6)).sum().backward()
    assert list(placed) == ["second"] and model.first.weight.grad.isfinite().all()


def test_the_published_networks() -> None:
    import resnet
    import vgg

    for network, count in ((lenet5.LeNet5, 3), (vgg.VGG, 8)):
        with torch.device("meta"):
            assert len(alq.quantize_activations(network(), 2)) == count
    for net, count in resnet.LAYERS.items():
        with torch.device("meta"):
            placed = alq.quantize_activations(resnet.recipe(net).network(), 2)
        assert len(placed) == count - 1
        assert "layer2.0.downsample.0" in placed and "fc" in placed and "conv1" not in placed


def test_it_waits_for_no_device() -> None:
    """Reading a value on the host would; a shadow device counts it."""
    from shadow_device import ShadowDevice, Stats

    with ShadowDevice("cuda") as device:
        x = torch.randn(40, 30).relu().to(device)
        found = BinaryActivation(2, torch.empty(0).to(device))
        found(x)
        Stats.syncs = Stats.ops = 0
        for _ in range(2):
            found(x)
        assert Stats.syncs == 0
        training = Stats.ops / 2
        found.eval()
        Stats.ops = 0
        found(x)
        assert Stats.syncs == 0
    assert training < 115 and Stats.ops < 40, (training, Stats.ops)


def test_attention_is_fed_levels_also_by_keyword() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    model = nn.ModuleList([nn.Linear(32, 32), attention])
    alq.quantize_activations(model, 1)
    seen = []
    attention.register_forward_pre_hook(
        lambda module, inputs, named: seen.append((*inputs, *named.values())), with_kwargs=True
    )
    q = torch.randn(4, 5, 32)
    k, v = q + 1, 2 * q
    attention(q, k, v)
    by_keyword, _ = attention.eval()(q, key=k, value=v)
    in_order, _ = attention(q, k, v)
    assert torch.equal(by_keyword, in_order)
    assert all(len(x.unique()) == 2 for fed in seen for x in fed)


def test_activation_checkpointing_changes_no_gradient() -> None:
    """It computes the forward pass again, in which the levels must not move again."""
    torch.manual_seed(0)
    models = [small_network()]
    alq.quantize_activations(models[0], 1)
    models[0](pictures())
    models.append(copy.deepcopy(models[0]))
    for _ in range(3):
        x = pictures()
        results = [
            models[0](x).square().mean(),
            checkpoint(models[1], x, use_reentrant=False).square().mean(),
        ]
        for model, result in zip(models, results, strict=True):
            model.zero_grad()
            result.backward()
        for a, b in zip(*(model.named_parameters() for model in models), strict=True):
            assert torch.equal(a[1].grad, b[1].grad), a[0]
        levels = [list(activations_in(model).values()) for model in models]
        for a, b in zip(*levels, strict=True):
            assert torch.equal(a.gamma, b.gamma)
