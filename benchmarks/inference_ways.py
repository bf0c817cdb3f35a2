"""Ways to run a network on a CPU, each from a file of its own: what `inference.py` compares.

A process that loads one way holds nothing of the others, so that its memory can be measured.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.inference.layers import PackedLayer
from alq.method.network import average_bitwidth
from alq.method.weight import prune
from networks import NETWORKS

BITS = {"lenet5": None, "vgg": 0.66, "resnet18": 2.0}  # None: there is a published file
FILES = {"lenet5": Path(__file__).resolve().parents[1] / "checkpoints/published/lenet5.alq"}
MAX_BIT = 6
ACT_BIT = 2
SAMPLES = 16  # random pictures, to which norms, levels and int8's ranges are fitted

# What computes, and what makes its input of pictures: of another type or layout.
Way = tuple[Callable[[Any], object], Callable[[Tensor], Any]]


def quantized(
    name: str, files: dict[str, Path], act_bit: int = 0
) -> tuple[nn.Module, list[alq.MultiBitWeight]]:
    """Return the network with its bits, and inputs of `act_bit`; 0 for floats.

    It is that of the file, if there is one. Otherwise it is untrained and has as many bits as
    published, each of MAX_BIT bases a group surviving by chance.
    """
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, x = network.recipe.network().eval(), torch.randn(SAMPLES, *network.picture)
    if name in files:
        weights = alq.load_packed(files[name], model)
    else:
        flags = network.default_flags()
        weights = alq.quantize(model, flags.structure, flags.subc, MAX_BIT)
        share = 1 - BITS[name] / average_bitwidth(weights)
        prune(weights, [(torch.rand(w.mask.shape) < share) & w.mask for w in weights])
        for module in model.modules():  # without statistics the signal fades from layer to layer
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = None
        model.train()(x)
        model.eval()
    if act_bit:
        alq.quantize_activations(model, act_bit)
        model(x)  # the levels fit themselves
    return model, weights


def prepare(name: str, files: dict[str, Path], folder: Path) -> None:
    """Write to `folder` what `WAYS` load of this network."""
    folder.mkdir(parents=True)
    model, weights = quantized(name, files)
    torch.save(model.state_dict(), folder / "float32.pt")
    alq.save_packed(folder / "bits.alq", model, weights)
    alq.save_packed(folder / "counted.alq", *quantized(name, files, ACT_BIT))
    x = torch.randn(SAMPLES, *NETWORKS[name].picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch means to remove
        write_torch_int8(model, x, folder / "int8.pt")
        write_onnx_int8(model, x, folder)


def write_torch_int8(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write torch's own int8 network; nothing where torch has lost it.

    torch 2.14 still has `torch.ao.quantization`, without any other package, and says that it will
    be removed in favour of torchao.
    """
    try:
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
    except ImportError:
        return
    kinds = get_default_qconfig_mapping(torch.backends.quantized.engine)
    observed = quantize_fx.prepare_fx(model, kinds, (x,))
    observed(x)
    torch.jit.save(torch.jit.trace(quantize_fx.convert_fx(observed), (x,)), path)


def write_onnx_int8(model: nn.Module, x: Tensor, folder: Path) -> None:
    """Write onnxruntime's int8 network, of scales per channel; nothing where it is not installed.

    Its inputs are uint8. With int8, onnxruntime's default, half of ResNet18's convolutions stay in
    float32, as its ReLUs cannot be left out, and the network takes 2.7 times as long.
    """
    try:
        from onnxruntime import quantization as q
    except ImportError:
        return

    class Samples(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": x.numpy()}]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    logging.disable()
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        model, (x,), folder / "full.onnx", input_names=["x"], dynamo=True, verbose=False,
        dynamic_shapes=any_batch,
    )  # fmt: skip
    q.quantize_static(
        folder / "full.onnx", folder / "int8.onnx", Samples(), per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------- loading


def empty(name: str) -> nn.Module:
    return NETWORKS[name].recipe.shapes().eval()


def floats(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, last: bool = True,
    compiled: bool = False,
) -> Way:  # fmt: skip
    """Load the network in float32 or bfloat16; `last` is PyTorch's layout channels_last."""
    model = empty(name)
    model.load_state_dict(torch.load(folder / "float32.pt"), assign=True)
    layout = torch.channels_last if last else torch.contiguous_format
    model = model.to(dtype, memory_format=layout)
    compute = torch.compile(model, dynamic=False) if compiled else model
    return compute, partial(Tensor.to, dtype=dtype, memory_format=layout)


def bits(
    folder: Path, name: str, file: str = "bits.alq", tables: str = "float32", way: str | None = None
) -> Way:
    """Load the network that computes from bits; `way` is that of all layers, None their own."""
    model = alq.load_for_inference(folder / file, empty(name), tables)
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.way = way
    return model, partial(Tensor.to, memory_format=torch.channels_last)


def levels(folder: Path, name: str) -> Way:
    """Load the network with inputs in binary bases, all of it in float32."""
    model = NETWORKS[name].recipe.network().eval()
    alq.load_packed(folder / "counted.alq", model)
    model = model.to(memory_format=torch.channels_last)
    return model, partial(Tensor.to, memory_format=torch.channels_last)


def as_it_is(x: Tensor) -> Tensor:
    return x


def torch_int8(folder: Path, name: str) -> Way:
    """Load torch's int8 network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch means to remove
        return torch.jit.load(folder / "int8.pt"), as_it_is


def onnx_int8(folder: Path, name: str) -> Way:
    """Load onnxruntime's int8 network."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning, and slow all that is timed after it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(folder / "int8.onnx", options)
    return partial(session.run, None), lambda x: {"x": x.numpy()}


# Name in the files of figures -> what loads it of (folder, network).
WAYS: dict[str, Callable[[Path, str], Way]] = {
    "contiguous": partial(floats, last=False),
    "channels_last": floats,
    "from bits": bits,
    "int16": partial(bits, tables="int16"),
    "counted": partial(bits, file="counted.alq"),
    "levels": levels,
    "decoded": partial(bits, way="decoded"),
    "compiled": partial(floats, compiled=True),
    "bfloat16": partial(floats, dtype=torch.bfloat16),
    "int8 torch": torch_int8,
    "int8 onnxruntime": onnx_int8,
}
NEEDED = {"int8 torch": "int8.pt", "int8 onnxruntime": "int8.onnx"}  # files that need not be there


def available(folder: Path, compiled: bool) -> list[str]:
    """Return the ways that `folder` has the files of."""
    lacking = {way for way, file in NEEDED.items() if not (folder / file).exists()}
    return [way for way in WAYS if way not in lacking and (compiled or way != "compiled")]
