"""The time of a network that computes from its bits, beside other ways to run it on a CPU.

    python benchmarks/inference.py --threads 1 --json FILE

All ways take turns in one process. LeNet5 is the published file. VGG and ResNet18 are untrained:
they have the published number of bits, each of the 6 a group has surviving by chance, and the norms
have the statistics of random pictures. "2-bit inputs" is the same network with activations in 2
binary bases, fitted to random pictures, which it computes by counting bits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.inference.layers import PackedLayer
from alq.method.network import average_bitwidth
from alq.method.weight import prune
from networks import NETWORKS
from timing import read_rows, settle, timing, write_figures

LENET5 = Path(__file__).resolve().parents[1] / "checkpoints" / "published" / "lenet5.alq"
BITS = {"lenet5": None, "vgg": 0.66, "resnet18": 2.0}  # None: those of the file
MAX_BIT = 6
ACT_BIT = 2
COLUMNS = (
    ("float32", "float32 ms"), ("from bits", "from bits ms"), ("int16", "int16 ms"),
    ("counted", "2-bit inputs ms"), ("decoded", "decoded ms"), ("compiled", "compiled ms"),
    ("bfloat16", "bfloat16 ms"), ("int8", "int8 ms"),
)  # fmt: skip


def quantized(name: str, act_bit: int = 0) -> tuple[nn.Module, list[alq.MultiBitWeight]]:
    """Return the network with as many bits as published, and inputs of `act_bit`; 0 for floats."""
    torch.manual_seed(0)
    flags = NETWORKS[name].default_flags()
    model = NETWORKS[name].recipe.network().eval()
    if BITS[name] is None:
        weights = alq.load_packed(LENET5, model)
    else:
        weights = alq.quantize(model, flags.structure, flags.subc, MAX_BIT)
        share = 1 - BITS[name] / average_bitwidth(weights)
        prune(weights, [(torch.rand(w.mask.shape) < share) & w.mask for w in weights])
    if act_bit:
        alq.quantize_activations(model, act_bit)
    for module in model.modules():  # without statistics the signal fades from layer to layer
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    model.train()(torch.randn(16, *NETWORKS[name].picture))
    return model.eval(), weights


def held(model: nn.Module, quantized: set[str]) -> int:
    """Return the bytes of the quantized weights, as bits or as floats."""
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    if layers:
        rows = [(x.signs, x.alpha, x.outputs, x.first) for x in layers]
        return sum(value.nbytes for row in rows for value in row)
    return sum(p.nbytes for name, p in model.named_parameters() if name in quantized)


def decoded_only(model: nn.Module) -> nn.Module:
    """Return the packed `model` as it is without numba's tables and dots."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.way = "decoded"
    return model


def check_layers(model: nn.Module, x: Tensor) -> None:
    """Raise AssertionError if a packed layer gives other numbers than when it is decoded.

    Layer by layer, as between layers rounding may decide on the level of an input.
    """

    def check(layer: PackedLayer, inputs: tuple[Tensor], y: Tensor) -> None:
        layer.way = "decoded"
        reference = layer.forward(*inputs)
        layer.way = None
        difference = (y - reference).norm() / reference.norm()
        assert difference < 1e-5, f"{layer.name}: {difference}"

    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()


def int8_session(model: nn.Module, x: Tensor) -> Callable[[], object] | None:
    """Return onnxruntime's int8 network, of scales per channel; None where it is not installed."""
    try:
        import onnxruntime as ort
        from onnxruntime import quantization as q
    except ImportError:
        return None

    class Samples(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": x.numpy()}]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        full, small = f"{folder}/full.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(model, (x,), full, input_names=["x"], dynamo=True, verbose=False)
        q.quantize_static(full, small, Samples(), per_channel=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(small, options)
    values = {"x": x.numpy()}
    return lambda: session.run(None, values)


def ways(
    name: str, model: nn.Module, weights: list[alq.MultiBitWeight], batch: int, args
) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    x = torch.randn(batch, *NETWORKS[name].picture)
    last = {"memory_format": torch.channels_last}
    x_last, model_last = x.to(**last), NETWORKS[name].recipe.network().eval()
    model_last.load_state_dict(model.state_dict())
    model_last = model_last.to(**last)
    bits, shorts = (alq.pack_for_inference(model, weights, k) for k in ("float32", "int16"))
    decoded = decoded_only(alq.pack_for_inference(model, weights))
    counted = alq.pack_for_inference(*quantized(name, ACT_BIT))
    check_layers(counted, x)
    difference = (bits(x) - model(x)).norm() / model(x).norm()
    assert difference < 1e-5, f"{name}: {difference}"
    found = {
        "contiguous": lambda: model(x),
        "channels_last": lambda: model_last(x_last),
        "from bits": lambda: bits(x),
        "int16": lambda: shorts(x),
        "counted": lambda: counted(x),
        "decoded": lambda: decoded(x),
    }
    if args.compile:
        compiled = torch.compile(model_last)
        found["compiled"] = lambda: compiled(x_last)
    half = NETWORKS[name].recipe.network().eval()
    half.load_state_dict(model.state_dict())
    half, x_half = half.to(torch.bfloat16, **last), x_last.bfloat16()
    found["bfloat16"] = lambda: half(x_half)
    if args.int8 and (session := int8_session(model, x)):
        found["int8"] = session
    return found


def figures(name: str, args: argparse.Namespace) -> list[dict]:
    """Return one row a batch size."""
    model, weights = quantized(name)
    names = {weight.name for weight in weights}
    packed = alq.pack_for_inference(model, weights)
    shorts, rows = alq.pack_for_inference(model, weights, "int16"), []
    for batch in args.batch:
        x = torch.randn(batch, *NETWORKS[name].picture)
        error = (shorts(x) - model(x)).norm() / model(x).norm()
        steps = ways(name, model, weights, batch, args)
        seconds = timing(args)(steps, args.repeats)
        ms = {way: 1e3 * value for way, value in seconds.items()}
        ms["float32"] = min(ms.pop("contiguous"), ms.pop("channels_last"))
        rows.append({
            "network": name, "bits": average_bitwidth(weights), "batch": batch,
            "threads": torch.get_num_threads(), "ms": ms, "int16_error": float(error),
            "float32_bytes": held(model, names), "packed_bytes": held(packed, names),
        })  # fmt: skip
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    heads = ["network", "bits", "batch", "threads", *(head for _, head in COLUMNS)]
    heads += ["float32 / bits", "float32 / int16", "float32 / 2-bit inputs", "int16 error"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        ms = row["ms"]
        cells = [row["network"], f"{row['bits']:.2f}", str(row["batch"]), str(row["threads"])]
        cells += [f"{ms[way]:.2f}" if way in ms else "" for way, _ in COLUMNS]
        ratios = ("from bits", "int16", "counted")
        cells += [f"{ms['float32'] / ms[way]:.2f}" if way in ms else "" for way in ratios]
        lines.append("| " + " | ".join([*cells, f"{row['int16_error']:.1e}"]) + " |")
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    """Return the flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--repeats", type=int, default=11, help="of which the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--int8", action="store_true", help="onnxruntime's int8, too")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="JSON", help="print the table of these, exit"
    )
    parser.set_defaults(device="cpu")
    return parser


def main() -> None:
    args = command_line().parse_args()
    if args.table:
        return print(table(read_rows(args.table)))
    settle(args)
    with torch.no_grad():
        rows = [row for name in args.network for row in figures(name, args)]
    print(table(rows))
    if args.json:
        write_figures(args.json, torch.device("cpu"), rows=rows)


if __name__ == "__main__":
    main()
