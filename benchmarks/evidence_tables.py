"""The tables of the evidence, in Markdown, from the published logs of the ablations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean

import smallest
import sweep_report
from alq.command.report import format_bytes
from alq.data.mnist import SETS
from alq.files.history import History, read_events
from networks import NETWORKS
from published_runs import read_run
from short_runs import seeds_of
from tables import spread, table

# Claim -> the runs that are compared in it, and what documents and figures call them.
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
    "ridge": {
        "adaptive_across_layers": "relative ridge",
        "ridge_published": "published ridge",
    },
}
DEFAULT_RUN, WIDE_RUN = "lenet5_seed0.jsonl", "wide/vgg_fashion_10000.jsonl"
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


def runs_of(logs: Path, arms: list[str]) -> Iterator[tuple[str, dict[str, list[list[dict]]]]]:
    """Yield the data sets on which all arms were run, with the events of each arm's seeds."""
    for dataset in SETS:
        found = {arm: list(seeds_of(logs / "ablations", f"{dataset}_{arm}")) for arm in arms}
        if all(found.values()):
            yield dataset, found


def rounds_of(seeds: list[list[dict]], after: str) -> list[list[dict]]:
    """Return for each pruning round the seeds' points right after pruning, or "coordinate" epochs.

    The latter are those that follow the round's pruning.
    """
    found = []
    for events in seeds:
        points = [event for event in events if event["event"] == "point"]
        pruned = [k for k, point in enumerate(points) if point["after"] == "prune"]
        found.append([points[k + (after == "coordinate")] for k in pruned])
    return [list(points) for points in zip(*found, strict=True)]


def compared_table(logs: Path, arms: dict[str, str]) -> str:
    """Show bits and test accuracy of each arm after each round: as pruned, and trained again."""
    rows = []
    for dataset, found in runs_of(logs, list(arms)):
        for arm, seeds in found.items():
            pairs = zip(
                *(rounds_of(seeds, after) for after in ("prune", "coordinate")), strict=True
            )
            for number, (cut, again) in enumerate(pairs, 1):
                bits = mean(point["bitwidth"] for point in cut)
                cells = [spread([point["top1"] for point in points]) for points in (cut, again)]
                first = [SETS[dataset].title, arms[arm], str(number)]
                rows.append([*first, f"{bits:.3f}", *cells, str(len(seeds))])
    heads = ["test %, right after pruning", "test %, after 3 more epochs"]
    return table(["data", "pruning", "round", "bits", *heads, "seeds"], rows) if rows else ""


def structures_table(logs: Path) -> str:
    """Show the most bases of each structure that fit into BUDGET bits a weight, and their error."""
    rows = []
    for dataset, found in runs_of(logs, ["structures_sketch"]):
        seeds = found["structures_sketch"]
        for layer in ("conv2.weight", "fc1.weight"):
            for (structure, _, n), points in sketches(seeds, layer):
                fitting = [point for point in points if bits_a_weight(point[0]) <= BUDGET]
                most = fitting[-1]
                cells = [str(most[0]["max_bit"]), f"{bits_a_weight(most[0]):.2f}"]
                errors = spread([sketch["error"] for sketch in most], 4)
                first = [SETS[dataset].title, layer.removesuffix(".weight"), structure, str(n)]
                rows.append([*first, *cells, errors, str(len(seeds))])
    heads = ["data", "layer", "groups", "n", "bases", "bits a weight", "relative error", "seeds"]
    return table(heads, rows) if rows else ""


def sketches(seeds: list[list[dict]], layer: str) -> Iterator[tuple[tuple, list[tuple]]]:
    """Yield each way to group a layer, with its sketches, bits rising: one of each seed."""
    columns = [[e for e in events if e.get("layer") == layer] for events in seeds]
    points = zip(*columns, strict=True)
    for way, group in groupby(points, lambda p: (p[0]["structure"], p[0]["subc"], p[0]["n"])):
        yield way, list(group)


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
    for log in sorted((logs / "path_checks").glob("*_three_digits*.jsonl")):
        run = read_run(log)
        (sketched, *_), final = quantized_epochs(log), run.final
        bits = (f"{bits:.2f}" for bits in (sketched["bitwidth"], final["bitwidth"]))
        M = final.get("act_bit")
        rows.append([NETWORKS[run.net].title, f"{M} bit" if M else "float", *bits])
        rows[-1] += [f"{final['top1_fp']:.1f}", f"{final['top1']:.1f}"]
    heads = ["bits, sketched", "bits, pruned", "full precision %", "quantized %"]
    return table(["network", "activations", *heads], rows)


def wide_table(logs: Path) -> str:
    """Show the runs of wide networks on real pictures, each log named NETWORK_fashion_IMAGES."""
    rows = []
    for log in sorted((logs / "wide").glob("*_fashion_*.jsonl")):
        run, images = read_run(log), log.stem.split("_")[-1]
        (sketched, *_), final = quantized_epochs(log), run.final
        bits = (f"{bits:.2f}" for bits in (sketched["bitwidth"], final["bitwidth"]))
        sizes = (format_bytes(final[key]) for key in ("storage_bytes", "file_bytes"))
        rows.append([NETWORKS[run.net].title, images, *bits, *sizes])
        rows[-1] += [f"{final['top1_fp']:.2f}", f"{final['top1']:.2f}"]
    heads = ["network", "training images", "bits, sketched", "bits, pruned"]
    heads += ["weights", "file", "full precision %", "quantized %"]
    return table(heads, rows) if rows else ""


def evidence_tables(logs: Path) -> dict[str, str]:
    """Return the table of each claim that there are logs of."""
    found = {
        "layers": layers_table(logs),
        "sweep_rates": sweep_report.rates_table(logs / "sweep"),
        "sweep_best": sweep_report.best_table(logs / "sweep"),
        "sweep_coordinate": sweep_report.coordinate_table(logs / "sweep"),
        **{claim: compared_table(logs, arms) for claim, arms in COMPARED.items()},
        "structures": structures_table(logs),
        "size": size_table(logs),
        "smallest": smallest.results_table(logs / "smallest", ["recipe"]),
        "extras": smallest.results_table(logs / "smallest", smallest.MEASURED, [5.0]),
        "path_checks": checks_table(logs),
        "wide": wide_table(logs),
    }
    return {claim: rows for claim, rows in found.items() if rows}


def write_into(document: Path, tables: dict[str, str]) -> None:
    """Put the tables in the places that the document marks for them, `<!-- table: NAME -->`.

    What stands between that mark and the next `<!-- end -->` is replaced.
    """

    def replaced(match: re.Match) -> str:
        return f"{match[1]}\n\n{tables.get(match[2], 'Not run yet.')}\n\n{match[3]}"

    marked = r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)"
    document.write_text(re.sub(marked, replaced, document.read_text(), flags=re.DOTALL))
