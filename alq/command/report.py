"""The tables at the end of a run: which layer got how many bits, what it takes, how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..method.network import average_bitwidth, storage_bytes
from ..method.weight import MultiBitWeight
from ..training.pruning import PruneToTarget, PruningPlan

LAYER = "{:<28} {:<15} {:>7} {:>6} {:>9} {:>12}"
FAR = 0.15  # of the published storage: beyond that it is said which flag reaches it
SUMMARY = "{:<24} {:>9} {:>12} {:>9} {:>9}"


def format_bytes(count: float | None) -> str:
    """Return bytes in KB or MB of 1e3 and 1e6, as the paper counts them."""
    if count is None:
        return "-"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"


def parts_line(parts: Mapping[str, int]) -> str:
    """Return one line: the bytes of a packed file, part by part."""
    listed = " + ".join(f"{name} {size}" for name, size in parts.items())
    return f"{sum(parts.values())} bytes = {listed}"


def expectation(plan: PruningPlan, size: Mapping[str, float]) -> str:
    """Return one line: what `plan` does and leaves, `size` being its `expected_size`."""
    about = "about" if isinstance(plan, PruneToTarget) else "at most about"
    return f"{plan}: {about} {size['bitwidth']:.2f} bit ({format_bytes(size['storage_bytes'])})"


def published_target(
    plan: PruningPlan, size: Mapping[str, float], published: Mapping[str, float] | None
) -> str | None:
    """Return one line with the flag that reaches the published row, if the rounds end far from it.

    `size` is the plan's `expected_size`. None where they end near it, or at a target, or where no
    row was published.
    """
    if published is None or isinstance(plan, PruneToTarget):
        return None
    off = abs(size["storage_bytes"] / published["storage_bytes"] - 1)
    if off <= FAR:
        return None
    return (
        f"note: the published row has {published['bitwidth']:.2f} bit "
        f"({format_bytes(published['storage_bytes'])}), which "
        f"--target_bit {published['bitwidth']} reaches"
    )


def layer_table(weights: Sequence[MultiBitWeight]) -> str:
    """Return one line per layer and their total."""
    lines = [LAYER.format("layer", "structure", "groups", "n", "bits", "storage")]
    for w in weights:
        size = format_bytes(w.storage_bytes)
        lines.append(LAYER.format(w.name, w.structure, w.G, w.n, f"{w.bitwidth:.3f}", size))
    groups, bits = sum(w.G for w in weights), f"{average_bitwidth(weights):.3f}"
    lines.append(LAYER.format("total", "", groups, "", bits, format_bytes(storage_bytes(weights))))
    return "\n".join(lines)


def summary_table(result: Mapping, published: Mapping[str, float] | None, weights: int) -> str:
    """Return full precision, this run and the published row, if there is one."""

    def row(
        name: str, bits: float | None, size: float | None, file: float | None, top1: float | None
    ) -> str:
        cells = (
            "-" if bits is None else f"{bits:.2f}",
            format_bytes(size),
            format_bytes(file),
            "-" if top1 is None else f"{top1:.2f}",
        )
        return SUMMARY.format(name, *cells)

    lines = [
        SUMMARY.format("", "bits", "storage", "file", "top-1 %"),
        row("full precision", 32, 4 * weights, None, result["top1_fp"]),
        row(
            f"after {result['stage']}",
            *(result[key] for key in ("bitwidth", "storage_bytes", "file_bytes", "top1")),
        ),
    ]
    if published is not None:
        paper = (published["bitwidth"], published["storage_bytes"], None, published["top1"])
        lines.append(row("published (paper)", *paper))
    return "\n".join(lines)
