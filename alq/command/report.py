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


def expectation(
    plan: PruningPlan, size: Mapping[str, float], published: Mapping[str, float] | None = None
) -> str:
    """Return one line: what `plan` does and leaves, `size` being its `expected_size`.

    Where rounds end far from the published row, a second one names the flag that reaches it.
    """
    about = "about" if isinstance(plan, PruneToTarget) else "at most about"
    line = f"{plan}: {about} {size['bitwidth']:.2f} bit ({format_bytes(size['storage_bytes'])})"
    if published is None or isinstance(plan, PruneToTarget):
        return line
    if abs(size["storage_bytes"] / published["storage_bytes"] - 1) <= FAR:
        return line
    return (
        f"{line}\nnote: the published row has {published['bitwidth']:.2f} bit "
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
    full = {"bitwidth": 32, "storage_bytes": 4 * weights, "top1": result["top1_fp"]}
    rows = {"full precision": full, f"after {result['stage']}": result}
    if published is not None:
        rows["published (paper)"] = published
    lines = [SUMMARY.format("", "bits", "storage", "file", "top-1 %")]
    for name, row in rows.items():
        bits, top1 = ("-" if row[k] is None else f"{row[k]:.2f}" for k in ("bitwidth", "top1"))
        size, file = (format_bytes(row.get(k)) for k in ("storage_bytes", "file_bytes"))
        lines.append(SUMMARY.format(name, bits, size, file, top1))
    return "\n".join(lines)
