"""Any network: every kind of layer, shared weights, weights left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import alq
from compare import follow
from reference import Reference

STRUCTURES = ["channelwise", "kernelwise", "pixelwise", "subchannelwise"]

# A layer, the shape of its input without the batch, and (output, input in its group) -> the kernel
# that connects them.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5), (4, 9)),
    "conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "conv2d oblong": (lambda: nn.Conv2d(3, 2, (2, 3)), (3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3)), (2, 3, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 5), (4, 5)),
    "transposed 1d grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 2, (2, 3), stride=2), (3, 4, 4)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(6, 9, 2, groups=3), (6, 3, 3)),
    "transposed 3d grouped": (lambda: nn.ConvTranspose3d(4, 4, 2, groups=2), (4, 2, 3, 2)),
}
CASES = [
    (kind, structure)
    for kind in LAYERS
    for structure in (STRUCTURES if kind != "linear" else STRUCTURES[3:])
]


def make(kind: str, **options) -> tuple[nn.Module, torch.Tensor, alq.MultiBitWeight]:
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    layer = make_layer().double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    (w,) = alq.quantize(layer, **options)
    return layer, x, w


@pytest.mark.parametrize(("kind", "structure"), CASES)
def test_groups_hold_the_weights_of_one_output(kind: str, structure: str) -> None:
    """A change of one group moves one output channel only, through the inputs it should see."""
    pieces = 3 if "depthwise" in kind else 2
    subc = pieces if structure == "subchannelwise" else None
    layer, x, w = make(kind, structure=structure, subc=subc)
    groups = w.grouping.to_groups(w.parameter.detach().clone())
    assert groups.shape == (w.G, w.n)
    assert torch.equal(w.grouping.to_weight(groups), w.parameter)
    outputs = layer(x).shape[1]
    per_output = w.G // outputs
    with torch.no_grad():
        before = layer(x)
        for g in range(w.G):
            changed = groups.clone()
            changed[g] += 1
            w.write(changed)
            moved = (layer(x) - before).abs().transpose(0, 1).flatten(1).amax(1) > 1e-9
            assert moved.nonzero().flatten().tolist() == [g // per_output]
    row = w.parameter.numel() // outputs
    positions = w.parameter[0, 0].numel()
    assert (per_output, w.n) == {
        "channelwise": (1, row),
        "kernelwise": (row // positions, positions),
        "pixelwise": (positions, row // positions),
        "subchannelwise": (pieces, row // pieces),
    }[structure]


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "linear"])
def test_a_kernel_is_one_input_and_a_pixel_is_one_position(kind: str) -> None:
    """Kernels are nowhere split, and a pixelwise group has one weight of each of its kernels."""
    layer, _, kernelwise = make(kind, structure="kernelwise")
    _, _, pixelwise = make(kind, structure="pixelwise")
    label = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    positions = label[0, 0].numel()
    for group in kernelwise.grouping.to_groups(label):
        assert torch.equal(group, torch.arange(positions) + group[0])
    for group in pixelwise.grouping.to_groups(label):
        assert len({int(x) % positions for x in group}) == 1
        assert len({int(x) // positions for x in group}) == pixelwise.n


@pytest.mark.parametrize(("kind", "structure"), CASES)
def test_steps_follow_the_plain_reference(kind: str, structure: str) -> None:
    """Real gradients of the layer, taken to the groups by the definition of each output."""
    layer, x, w = make(kind, structure=structure, max_bit=2)
    reference = Reference(w.B, w.alpha, w.mask, lr=0.02)
    optimizer = alq.ALQ([w], lr=0.02)
    for mode in ("basis", "coordinate", "basis", "ste", "coordinate"):
        layer.zero_grad()
        layer(x).sin().square().mean().backward()
        follow(optimizer, [reference], mode)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.encoder = nn.Conv1d(8, 6, 3)
        self.decoder = nn.ConvTranspose1d(6, 8, 3)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(8, 10)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens).transpose(1, 2)  # (batch, 8, length)
        return self.head(self.decoder(self.encoder(x).tanh()).transpose(1, 2))


def test_tied_weights_are_one_and_stay_one() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 10, (5, 7))
    apart = copy.deepcopy(model)
    apart.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    weights = alq.quantize(model, max_bit=3)
    assert [w.name for w in weights] == ["table.weight", "encoder.weight"]
    optimizer = alq.ALQ(weights, lr=0.01)
    for step in (optimizer.basis_step, optimizer.coordinate_step, optimizer.ste_step):
        apart.load_state_dict(model.state_dict())
        for network in (model, apart):
            network.zero_grad()
            network(tokens).logsumexp(-1).mean().backward()
        total = apart.encoder.weight.grad + apart.decoder.weight.grad
        torch.testing.assert_close(model.encoder.weight.grad, total)
        total = apart.table.weight.grad + apart.head.weight.grad
        torch.testing.assert_close(model.table.weight.grad, total)
        before = model.decoder.weight.detach().clone()
        step()
        assert model.decoder.weight is model.encoder.weight is weights[1].parameter
        assert not torch.equal(model.decoder.weight, before)
        assert torch.equal(model.decoder.weight, weights[1].w_hat())

    other = Tied()
    other.load_state_dict(model.state_dict())
    again = alq.restore(other, [w.state_dict() for w in weights])
    assert torch.equal(other(tokens), model(tokens))
    assert other.head.weight is again[0].parameter


def test_a_tied_weight_is_found_under_any_of_its_names() -> None:
    class Borrowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(4, 4)
            self.projection = layer.weight  # registered first, under another name
            self.layer = layer

    assert [w.name for w in alq.quantize(Borrowed())] == ["layer.weight"]
    with pytest.raises(ValueError, match="no weight to quantize"):
        alq.quantize(Borrowed(), skip="projection")


@pytest.mark.parametrize(
    "skip",
    [["decoder.weight"], "encoder.weight", lambda name, p: p.dim() == 3],
    ids=["names", "pattern", "function"],
)
def test_skip_leaves_weights_alone(skip) -> None:
    model = Tied()
    before = model.encoder.weight.detach().clone()
    weights = alq.quantize(model, skip=skip, max_bit=2)
    assert [w.name for w in weights] == ["table.weight"]
    assert torch.equal(model.encoder.weight, before)
    states = [w.state_dict() for w in weights]
    other = Tied()
    other.load_state_dict(model.state_dict())
    assert [w.name for w in alq.restore(other, states)] == ["table.weight"]
    assert torch.equal(other.encoder.weight, before)
    assert torch.equal(other.table.weight, weights[0].w_hat())


def test_what_cannot_be_quantized_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"3\.weight: has no shape yet"):
        alq.quantize(model)
    with pytest.raises(ValueError, match="skip: the model has no parameter"):
        alq.quantize(model, skip=["4.weight"])
    assert [w.name for w in alq.quantize(model, skip=["3.weight"])] == ["0.weight"]
    transposed = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2))
    with pytest.raises(ValueError, match=r"0\.weight: subc 4 does not divide its rows of 6"):
        alq.quantize(transposed, "subchannelwise", 4)


def test_a_saved_weight_knows_that_it_was_transposed() -> None:
    """Transposed layers of other groups can have weights of one shape."""
    grouped = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, groups=2))
    plain = nn.Sequential(nn.ConvTranspose1d(4, 2, 3))
    states = [w.state_dict() for w in alq.quantize(grouped)]
    with pytest.raises(ValueError, match=r"0\.weight: the saved weight has transposed 2"):
        alq.restore(plain, states)


def test_any_network_goes_through_the_packed_file(tmp_path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 10, (5, 7))

    def network() -> nn.Module:
        grouped = nn.ConvTranspose1d(10, 6, 3, groups=2)
        return nn.Sequential(Tied(), nn.Flatten(2), nn.Conv1d(7, 10, 3), grouped, nn.Linear(10, 2))

    model, other = network(), network()
    weights = alq.quantize(model, skip=["4.weight"])
    alq.save_packed(tmp_path / "small.alq", model, weights)
    again = alq.load_packed(tmp_path / "small.alq", other)
    assert [w.grouping for w in again] == [w.grouping for w in weights]
    assert other[0].head.weight is other[0].table.weight
    assert torch.equal(other(tokens), model(tokens))
