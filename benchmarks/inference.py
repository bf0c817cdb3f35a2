"""Time and memory of a network that computes from its bits, beside other ways to run it on a CPU.

    python benchmarks/inference.py --threads 1 --compile --json FILE
    python benchmarks/inference.py --memory --json FILE

Times: all ways take turns in one process. Memory: each way of each network is a process of its own.
LeNet5 is the published file. VGG and ResNet18 are untrained: they have the published number of
bits, each of the 6 a group has surviving by chance, and the norms have the statistics of random
pictures; `--file vgg=FILE` takes a trained one. "2-bit inputs" is the same network with activations
in 2 binary bases, fitted to random pictures, which it computes by counting bits; PyTorch computes
it, too, in float32. Each way is given its pictures in the layout that it computes in. int8 is
torch's own (`torch.ao.quantization`, which torch 2.14 has without another package) and
onnxruntime's, each where it is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alq
from alq.command.arguments import OneLineParser
from alq.errors import InputError
from alq.inference.layers import PackedLayer
from alq.method.network import average_bitwidth
from inference_memory import WARM, of_process
from inference_tables import inference_tables, put_into
from inference_ways import BITS, FILES, NETWORKS, WAYS, available, prepare
from timing import read_rows, settle, timing, write_figures

LARGE = 64  # a batch from which a third of the repeats will do, and caches start empty anyway


def held(model: nn.Module, quantized: set[str]) -> int:
    """Return the bytes of the quantized weights, as bits, as floats, or the smallest as both."""
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    if layers:
        kept = [(x.signs, x.alpha, x.outputs, x.first, x.dense) for x in layers]
        return sum(value.nbytes for own in kept for value in own if value is not None)
    return sum(p.nbytes for name, p in model.named_parameters() if name in quantized)


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


def distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of a - b, relative to b's."""
    return float((a - b).norm() / b.norm())


def times(name: str, folder: Path, args: argparse.Namespace) -> list[dict]:
    """Return one row a batch size."""
    loaded = {way: WAYS[way](folder, name) for way in available(folder, args.compile)}
    model, packed, counted = (loaded[way][0] for way in ("contiguous", "from bits", "counted"))
    weights = alq.load_packed(folder / "bits.alq", NETWORKS[name].recipe.network())
    for network in (packed, counted):
        check_layers(network, torch.randn(2, *NETWORKS[name].picture))
    rows = []
    for batch in args.batch:
        x = torch.randn(batch, *NETWORKS[name].picture)
        y = model(x)
        found = distance(packed(x), y)  # an untrained network makes more of what rounds
        assert found < 1e-4, f"{name}: {found}"
        inputs = {way: feed(x) for way, (_, feed) in loaded.items()}
        steps = {
            way: lambda way=way: loaded[way][0](inputs[way])  # noqa: B023
            for way in loaded
        }
        repeats = args.repeats if batch < LARGE else max(2, args.repeats // 3)
        seconds = timing(args)(steps, repeats, twice=batch < LARGE)
        ms = {way: 1e3 * value for way, value in seconds.items()}
        ms["float32"] = min(ms["contiguous"], ms["channels_last"])
        rows.append({
            "network": name, "bits": average_bitwidth(weights), "batch": batch,
            "threads": torch.get_num_threads(), "ms": ms,
            "int16_error": distance(loaded["int16"][0](x), y),
            "float32_bytes": held(model, {weight.name for weight in weights}),
            "packed_bytes": held(packed, set()),
        })  # fmt: skip
        print(f"{name}, batch {batch}:", *(f"{way} {v:.2f}," for way, v in ms.items()), flush=True)
    return rows


def memory(name: str, folder: Path, args: argparse.Namespace) -> list[dict]:
    """Return one row a way."""
    rows = []
    for way in available(folder / name, compiled=False):  # the compiler takes more than any network
        found = of_process(folder, name, way, args.batch, torch.get_num_threads())
        rows.append({"network": name, "way": way, **found})
        print(name, rows[-1], flush=True)
    return rows


def named_file(text: str) -> tuple[str, Path]:
    """Return network and file of NETWORK=FILE."""
    name, _, file = text.partition("=")
    if name not in BITS or not file:
        raise argparse.ArgumentTypeError(f"'{text}' is not NETWORK=FILE, with {', '.join(BITS)}")
    return name, Path(file)


def command_line() -> argparse.ArgumentParser:
    """Return the flags of this script."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument(
        "--file", nargs="+", type=named_file, default=[], metavar="NETWORK=FILE",
        help="a packed file for the network, such as vgg=checkpoints/vgg_model_posttrained.alq",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=9,
        help=f"of which the median counts; a third of them for batches of {LARGE} and more",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--memory", action="store_true", help="memory, not times; Linux only")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="JSON", help="print the tables of these, exit"
    )
    parser.add_argument(
        "--into", type=Path, metavar="DOCUMENT", help="with --table: put them into it instead"
    )
    parser.set_defaults(device="cpu")
    return parser


def show(rows: list[dict], document: Path | None) -> None:
    """Print the tables, or put them into `document`."""
    tables = inference_tables(rows)
    if document:
        return put_into(document, tables)
    print("\n\n".join(f"{title}\n\n{own}" for title, own in tables.items()))


def measure(args: argparse.Namespace) -> list[dict]:
    """Return the rows of all networks."""
    files, rows = FILES | dict(args.file), []
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        if args.memory:
            prepare(WARM, files, folder / WARM)
            for way in ("from bits", "int16", "counted"):  # which compiles their kernels
                of_process(folder, WARM, way, [], torch.get_num_threads())
        for name in args.network:
            if not (folder / name).exists():
                prepare(name, files, folder / name)
            rows += memory(name, folder, args) if args.memory else times(name, folder / name, args)
    return rows


def main() -> None:
    parser = command_line()
    args = parser.parse_args()
    if args.table:
        return show(read_rows(args.table), args.into)
    settle(args)
    try:
        rows = measure(args)
    except InputError as error:
        parser.error(str(error))
    show(rows, None)
    if args.json:
        write_figures(args.json, torch.device("cpu"), rows=rows)


if __name__ == "__main__":
    main()
