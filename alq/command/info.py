"""What is in a packed file or a checkpoint, layer by layer: `python -m alq info FILE`."""

import math
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..files.bits import LayerBits
from ..files.checkpoint import load_checkpoint, weights_in
from ..files.disk import read_whole
from ..files.packed import read_bits, read_packed
from ..inference.plan import choose, held_layers
from ..method.quantized_inputs import PLACE, activation_bits
from ..method.structures import coordinate_bytes
from .plot import new_figure, save_figure
from .report import format_bytes, parts_line

POSITIONS = (1, 16, 128, 1024, 16384)  # that a plan is shown for
HEADINGS = ("layer", "shape", "structure", "groups", "n", "bits", "storage")
BAR = {"color": "0.75", "edgecolor": "black"}  # readable without colours


def inspect(path: str | Path) -> dict:
    """Return the layers and totals of a packed file or a checkpoint, as plain values.

    `dataset` is None where the file records none. Sizes are in bytes. `storage_bytes` is the
    quantized weights' alone, `compression` what they take in float32 over it, `file_compression`
    the same for the whole file; None where nothing is left to divide by, or nothing is quantized.
    """
    path = Path(path)
    packed = not read_whole(path).startswith(b"PK")  # a checkpoint is a zip archive
    if packed:
        content = read_packed(path)
        weights, rest, parts = content.weights, content.rest, content.sizes
        dataset = content.dataset
    else:
        found = load_checkpoint(path, net=None)
        if "weights" not in found:
            raise InputError(
                f"{path} is a resume point; give the checkpoint (.pth) or the .alq file"
            )
        weights, parts, dataset = weights_in(found, str(path)), None, found.get("dataset")
        names = {state["name"] for state in weights}
        rest = {k: v for k, v in found["model"].items() if k not in names}
    bits = activation_bits(rest)
    layers = [
        describe_layer(state) | {"act_bit": bits.get(state["name"].rpartition(".")[0], 0)}
        for state in weights
    ]
    rest_bytes = sum(value.numel() * value.element_size() for value in rest.values())
    return {
        "file": str(path),
        "kind": "packed file" if packed else "checkpoint",
        "dataset": dataset,
        "layers": layers,
        **totals(layers, rest_bytes, path.stat().st_size),
        "parts": parts,
    }


def describe_layer(state: Mapping) -> dict:
    """Return one layer's row; `groups_by_bits[b]` is the number of groups that have b bits."""
    bits = state["mask"].sum(1)  # (G,)
    G, I = state["mask"].shape
    n = math.prod(state["shape"]) // G
    live = int(bits.sum())
    return {
        "name": state["name"],
        "shape": list(state["shape"]),
        "structure": state["structure"],
        "subc": state["subc"],
        "groups": G,
        "n": n,
        "max_bit": I,
        "bitwidth": live / G,
        "groups_by_bits": bits.bincount(minlength=I + 1).tolist(),
        "storage_bytes": live * coordinate_bytes(n),
        "float32_bytes": 4 * G * n,
    }


def totals(layers: list[dict], rest_bytes: int, file_bytes: int) -> dict:
    """Return the network's row."""
    storage = sum(layer["storage_bytes"] for layer in layers)
    full = sum(layer["float32_bytes"] for layer in layers)
    bits = sum(layer["bitwidth"] * layer["float32_bytes"] for layer in layers)
    return {
        "weights": full // 4,
        "bitwidth": bits / full if full else None,
        "storage_bytes": storage,
        "float32_bytes": full,
        "compression": full / storage if storage else None,
        "rest_bytes": rest_bytes,
        "file_bytes": file_bytes,
        "file_compression": (full + rest_bytes) / file_bytes if layers else None,
    }


def info_text(info: Mapping) -> str:
    """Return the table that `python -m alq info` prints."""
    trained = f", trained on {info['dataset']}" if info["dataset"] else ""
    if not info["layers"]:
        values = format_bytes(info["rest_bytes"])
        return f"{info['file']}: {info['kind']} in full precision, {values} of values{trained}"
    most = max(layer["max_bit"] for layer in info["layers"])
    fed = [f"{M} bit" if (M := layer["act_bit"]) else "float" for layer in info["layers"]]
    rows = [(*HEADINGS, *(f"{bits} bit" for bits in range(most + 1)))]
    for layer in info["layers"]:
        shape, size = "x".join(map(str, layer["shape"])), format_bytes(layer["storage_bytes"])
        counts = layer["groups_by_bits"] + [""] * (most - layer["max_bit"])
        row = (layer["name"], shape, layer["structure"], layer["groups"], layer["n"])
        rows.append((*map(str, row), f"{layer['bitwidth']:.3f}", size, *map(str, counts)))

    def times(ratio: float | None) -> str:
        return "nothing left" if ratio is None else f"{ratio:.1f} times smaller"

    lines = [
        f"{info['file']}: {info['kind']}{trained}; the columns on the right count groups "
        "by bitwidth",
        *("", *align(rows), ""),
        f"quantized weights: {info['weights']}, {info['bitwidth']:.3f} bit on average, "
        f"{format_bytes(info['storage_bytes'])}; in float32 {format_bytes(info['float32_bytes'])} "
        f"({times(info['compression'])})",
        f"everything else: {format_bytes(info['rest_bytes'])}",
        f"file: {format_bytes(info['file_bytes'])}",
    ]
    if info["parts"]:
        lines[-1] += f" ({times(info['file_compression'])}): {parts_line(info['parts'])}"
    if any(layer["act_bit"] for layer in info["layers"]):
        lines.append(f"activations: into the layers, in their order, {', '.join(fed)}")
    return "\n".join(lines)


def plan_text(path: str | Path) -> str:
    """Return the table that `python -m alq info FILE --plan` prints."""
    layers, rest = read_bits(path)
    bits_of_inputs = activation_bits(rest)
    rows = [("layer", "shape", "bits", *(f"at {count}" for count in POSITIONS))]
    sizes = {layer.name: layer.grouping.numel for layer in layers if can_be_packed(layer)}
    held = held_layers(sizes)
    for layer in layers:
        R, shape = len(layer.alpha), layer.grouping.shape
        ways = ["float32"] * len(POSITIONS)
        if can_be_packed(layer):
            own = layer.name.rpartition(".")[0]
            planes = bits_of_inputs.get(own, 0)
            if planes:  # a lowest level that is not 0 is one more: `alq.inference.planes`
                planes += int(rest[f"{own}.{PLACE}.lowest".lstrip(".")] != 0)
            ways = [
                choose(layer.grouping, R, count, "float32", planes, layer.name in held)
                for count in POSITIONS
            ]
        bits = f"{R / layer.grouping.G:.3f}"
        rows.append((layer.name, "x".join(map(str, shape)), bits, *ways))
    return "\n".join(
        [
            f"{path}: how each layer computes from bits, by the number of output positions:",
            "the batch of a linear layer, batch x height x width of a convolution's output",
            *("", *align(rows)),
        ]
    )


def can_be_packed(layer: LayerBits) -> bool:
    """Return whether a layer may be one that computes from bits, by its shape."""
    return len(layer.grouping.shape) <= 4 and not layer.grouping.transposed


def align(rows: list[tuple[str, ...]], left: int = 3) -> list[str]:
    """Return lines of columns as wide as they need to be, all but the `left` first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (f"{{:{'<' if k < left else '>'}{width}}}" for k, width in enumerate(widths))
    line = "  ".join(cells)
    return [line.format(*row).rstrip() for row in rows]


def plot(info: Mapping, path: str | Path) -> None:
    """Draw the bitwidth of each layer and the histogram of the weights' bitwidths into `path`."""
    layers = info["layers"]
    height = max(3.2, 0.8 + 0.22 * len(layers))  # inches
    figure = new_figure("--plot", figsize=(9.5, height))
    if not layers:
        raise InputError(f"{info['file']} has no multi-bit weights to plot")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    names = [layer["name"].removesuffix(".weight") for layer in layers]
    bars = left.barh(range(len(layers)), [layer["bitwidth"] for layer in layers], **BAR)
    left.axvline(info["bitwidth"], color="black", linestyle="--", linewidth=1)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    left.bar_label(bars, fmt="%.2f", padding=4, fontsize=8, bbox=white)
    left.set_yticks(range(len(layers)), names, fontsize=8)
    left.invert_yaxis()  # the first layer on top
    left.margins(x=0.12)
    left.set_xlabel("average bitwidth (bits per weight)")
    left.set_title(f"layers; dashed: whole network, {info['bitwidth']:.2f}", fontsize=10)

    share = weights_by_bits(layers)
    right.bar_label(right.bar(range(len(share)), share, **BAR), fmt="%.1f", padding=2, fontsize=8)
    right.margins(y=0.1)
    right.set(xticks=range(len(share)), xlabel="bitwidth of the group (bits)")
    right.set_ylabel("share of the weights (%)")
    right.set_title("weights by bitwidth", fontsize=10)

    save_figure(figure, Path(path), "--plot")


def weights_by_bits(layers: list[dict]) -> list[float]:
    """Return the percentages of all weights that have 0, 1, 2, ... bits."""
    counts = [0] * max(len(layer["groups_by_bits"]) for layer in layers)
    for layer in layers:
        for bits, groups in enumerate(layer["groups_by_bits"]):
            counts[bits] += groups * layer["n"]
    return [100 * count / sum(counts) for count in counts]
