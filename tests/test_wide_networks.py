"""`benchmarks/wide_networks.py`: the pictures it makes, and that its flags are the scripts' own."""

from __future__ import annotations

import math

import pytest
import torch

import wide_networks
from alq.data import mnist


@pytest.mark.parametrize("side", [32, 64])
def test_the_pictures_are_the_old_ones_in_black_margins_magnified(side: int) -> None:
    images = torch.randint(1, 256, (3, 1, 28, 28), dtype=torch.uint8)
    found, labels = wide_networks.pictures((images, torch.arange(3)), side)
    assert found.shape == (3, 3, side, side)
    assert labels.tolist() == [0, 1, 2]
    times = side // 32
    for channel in range(3):
        for row, column in [(0, 0), (27, 5), (13, 27)]:
            top, left = ((place + 2) * times for place in (row, column))
            patch = found[:, channel, top : top + times, left : left + times]
            assert (patch == images[:, 0, row, column].view(3, 1, 1)).all()
    assert (found[:, :, : 2 * times] == 0).all()
    assert (found > 0).sum() == 3 * 3 * 784 * times**2


def test_means_and_deviations_are_those_of_padded_pictures() -> None:
    kind, share = mnist.SETS["fashion_mnist"], 784 / 1024
    (mean,), (std,) = kind.mean, kind.std
    padded = mean * share
    assert wide_networks.KIND.mean == pytest.approx([padded] * 3, abs=1e-4)
    deviation = math.sqrt((std**2 + mean**2) * share - padded**2)
    assert wide_networks.KIND.std == pytest.approx([deviation] * 3, abs=1e-4)


@pytest.mark.parametrize("net", list(wide_networks.OWN))
def test_the_flags_are_the_scripts_own_and_the_network_has_ten_classes(net: str) -> None:
    recipe, parser = wide_networks.recipe(net, 100)
    args = parser.parse_args([*wide_networks.SHORT, *wide_networks.OWN[net]])
    assert args.target_bit and args.resume
    assert str(args.data) == "data"  # not where resnet.py looks for ILSVRC12
    with torch.device("meta"):
        network = recipe.network()
    assert [m.out_features for m in network.modules() if hasattr(m, "out_features")][-1] == 10
