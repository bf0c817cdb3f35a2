"""The tables at the end of a run: which layer got how many bits, what it takes, how good it is."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..method.network import average_bitwidth, storage_bytes, uncompiled
from ..method.quantized_inputs import act_bit, activations_in
from ..method.weight import MultiBitWeight
from ..training.plan import expected_size
from ..training.pruning import PruneToFile, PruneToTarget, PruningPlan
from ..training.sizes import Layers, size_in

LAYER = "{:<28} {:<15} {:>7} {:>6} {:>9} {:>12}"
FAR = 0.15  # of the published storage: beyond that it is said which flag reaches it
NAMED = 4  # of what is not quantized, the largest
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
    plan: PruningPlan, layers: Layers, published: Mapping[str, float] | None = None
) -> str:
    """Return one line: what `plan` does and leaves of the sketched `layers`.

    Others name the flag that helps where rounding takes half of what a batch should remove, and
    where rounds end far from the published row.
    """
    if isinstance(plan, PruneToFile):
        return f"{plan}: about {format_bytes(1e3 * plan.value)} on disk"
    size = expected_size(plan, layers)
    about = "at most about" if plan.unit == "coordinates" else "about"
    lines = [f"{plan}: {about} {size['bitwidth']:.2f} bit ({format_bytes(size['storage_bytes'])})"]
    if isinstance(plan, PruneToTarget):
        return lines[0]
    left = plan.share_left(size_in("coordinates", layers))
    asked = (1 - plan.pr / plan.prune_batches) ** (plan.rounds * plan.prune_batches)
    if 1 - left < (1 - asked) / 2:
        lines.append(
            f"note: leaves {left:.1%} of the coordinates, not {asked:.1%}, as each batch's count "
            "is rounded down; take fewer batches (a larger --batch_size), or --target_bit"
        )
    if published and abs(size["storage_bytes"] / published["storage_bytes"] - 1) > FAR:
        lines.append(
            f"note: the published row has {published['bitwidth']:.2f} bit "
            f"({format_bytes(published['storage_bytes'])}), which "
            f"--target_bit {published['bitwidth']} reaches"
        )
    return "\n".join(lines)


def network_lines(model: nn.Module, weights: Sequence[MultiBitWeight]) -> str:
    """Return two lines: what weights and whole network take; the largest that is not quantized.

    A third follows where activations are quantized.
    """
    names: dict[Tensor, str] = {weight.parameter: "" for weight in weights}
    for name, value in uncompiled(model).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            names.setdefault(value, name)  # a tied one counts once
    rest = sorted(filter(names.get, names), key=lambda value: -value.nbytes)
    size, left = storage_bytes(weights), sum(value.nbytes for value in rest)
    bits = 8 * left + sum(weight.live_total * weight.n for weight in weights)
    mean = bits / sum(value.numel() for value in names)
    listed = ", ".join(names[value] for value in rest[:NAMED]) or "nothing"
    more = f" and {len(rest) - NAMED} more" if len(rest) > NAMED else ""
    return (
        f"{average_bitwidth(weights):.3f} bit a weight, {format_bytes(size)}; whole network "
        f"{mean:.3f} bit, {format_bytes(size + left)} (in full precision "
        f"{format_bytes(sum(value.nbytes for value in names))})\n"
        f"not quantized: {format_bytes(left)} in {listed}{more}{activations_line(model, weights)}"
    )


def activations_line(model: nn.Module, weights: Sequence[MultiBitWeight]) -> str:
    """Return a further line: the bits of activations, and what float ones are fed into."""
    fed = [name for name, activation in activations_in(model).items() if activation.fitted]
    if not fed:
        return ""
    layers = [weight.name.rpartition(".")[0] for weight in weights]
    floats = ", ".join(name for name in layers if name not in fed) or "none"
    return f"\nactivations: {act_bit(model)} bit into {len(fed)} layers, float into {floats}"


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
