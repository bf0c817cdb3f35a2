"""The tables of the evidence, in Markdown, from the published logs of the ablations."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from alq.files.history import History, read_events
from networks import NETWORKS
from published_runs import read_run
from tables import table

# Claim -> the logs that are compared in it, and what documents and figures call them.
COMPARED = {
    "adaptive": {
        "adaptive_across_layers": "across all layers",
        "adaptive_within_layers": "within each layer",
        "adaptive_uniform": "same bitwidth everywhere",
    },
    "smooth": {
        "adaptive_across_layers": "a little at every batch",
        "smooth_one_cut": "one cut a round",
    },
    "defects": {
        "adaptive_across_layers": "without defects",
        "defects_lost_flips": "sign flips lost",
        "defects_wrong_ranking": "ranked by wrong values",
    },
}
LOSS_AWARE = {
    "reconstruction": "STE, reconstruction error",
    "ste": "STE, loss-aware step",
    "alq": "ALQ, basis and coordinate steps",
}
DEFAULT_RUN = "lenet5_seed0.jsonl"
BUDGET = 6.0  # bits a weight, coordinates included, in `structures_table`


def events(log: Path, *kinds: str) -> list[dict]:
    """Return the events of a log that are of these kinds."""
    return [event for event in read_events(log) if event["event"] in kinds]


def quantized_epochs(log: Path) -> list[dict]:
    """Return the epochs of a log after its network was sketched."""
    return [epoch for epoch in events(log, "epoch") if epoch["bitwidths"]]


def layers_table(logs: Path) -> str:
    """Show the average bitwidth of each layer after each round of the default run."""
    columns = History(logs / DEFAULT_RUN).bits_by_layer()
    rows = [
        [name.removesuffix(".weight"), *(f"{bits[name]:.2f}" for bits in columns.values())]
        for name in columns["sketch"]
    ]
    rounds = (f"round {k}" for k in range(1, len(columns)))
    return table(["bits of layer", "sketch", *rounds], rows)


def loss_aware_table(logs: Path) -> str:
    """Show the training loss on the way and the accuracy at the end, at 1 and 2 bits."""
    shown = (1, 4, 6)
    rows = []
    for bits in (1, 2):
        for arm, title in LOSS_AWARE.items():
            log = logs / "ablations" / f"loss_aware_{bits}bit_{arm}.jsonl"
            epochs = events(log, "epoch")
            (result,) = events(log, "result")
            losses = (f"{epochs[k - 1]['loss']:.3f}" for k in shown)
            accuracies = (f"{result[key]:.2f}" for key in ("val_accuracy", "top1"))
            rows.append([str(bits), title, *losses, *accuracies])
    losses = (f"loss, epoch {k}" for k in shown)
    return table(["bits", "steps", *losses, "validation %", "test %"], rows)


def compared_table(logs: Path, arms: dict[str, str]) -> str:
    """Show bits and test accuracy of each arm after each round: as pruned, and trained again."""
    rows = []
    for log, title in arms.items():
        points = events(logs / "ablations" / f"{log}.jsonl", "point")
        pruned = [k for k, point in enumerate(points) if point["after"] == "prune"]
        for number, k in enumerate(pruned, 1):
            cut, again = points[k], points[k + 1]
            accuracies = (f"{point['top1']:.2f}" for point in (cut, again))
            rows.append([title, str(number), f"{cut['bitwidth']:.3f}", *accuracies])
    heads = ["test %, right after pruning", "test %, after 3 more epochs"]
    return table(["pruning", "round", "bits", *heads], rows)


def structures_table(logs: Path) -> str:
    """Show the most bases of each structure that fit into BUDGET bits a weight, and their error."""
    sketches = events(logs / "ablations" / "structures_sketch.jsonl", "sketch")
    rows = []
    for (layer, structure, n), group in groupby(
        sketches, lambda sketch: (sketch["layer"], sketch["structure"], sketch["n"])
    ):
        fitting = {bits_a_weight(s): s for s in group if bits_a_weight(s) <= BUDGET}
        if layer in ("conv2.weight", "fc1.weight"):
            bits = max(fitting)
            cells = [str(fitting[bits]["max_bit"]), f"{bits:.2f}", f"{fitting[bits]['error']:.4f}"]
            rows.append([layer.removesuffix(".weight"), structure, str(n), *cells])
    return table(["layer", "groups", "n", "bases", "bits a weight", "relative error"], rows)


def bits_a_weight(sketch: dict) -> float:
    """Return the storage of a sketch, coordinates included."""
    return 32 * sketch["storage_bytes"] / sketch["float32_bytes"]


def size_table(logs: Path) -> str:
    """Show bits, bytes on disk and test accuracy of the short runs."""
    ends = [events(log, "result")[-1] for log in (logs / "ablations").glob("size_*.jsonl")]
    ends.sort(key=lambda end: -end["bitwidth"])
    rows = [[f"{e['bitwidth']:.3f}", str(e["file_bytes"]), f"{e['top1']:.2f}"] for e in ends]
    return table(["bits", "file, bytes", "test %"], rows)


def checks_table(logs: Path) -> str:
    """Show the runs of whole networks on small sets, in three stages each."""
    rows = []
    for log in sorted((logs / "path_checks").glob("*_three_digits.jsonl")):
        run = read_run(log)
        (sketched, *_), final = quantized_epochs(log), run.final
        bits = (f"{bits:.2f}" for bits in (sketched["bitwidth"], final["bitwidth"]))
        rows.append([NETWORKS[run.net].title, *bits])
        rows[-1] += [f"{final['top1_fp']:.1f}", f"{final['top1']:.1f}"]
    heads = ["bits, sketched", "bits, pruned", "full precision %", "quantized %"]
    return table(["network", *heads], rows)


def evidence_tables(logs: Path) -> dict[str, str]:
    """Return the table of each claim."""
    return {
        "layers": layers_table(logs),
        "loss_aware": loss_aware_table(logs),
        **{claim: compared_table(logs, arms) for claim, arms in COMPARED.items()},
        "structures": structures_table(logs),
        "size": size_table(logs),
        "path_checks": checks_table(logs),
    }
