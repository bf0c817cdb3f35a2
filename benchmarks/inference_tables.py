"""The tables of docs/inference.md, from what `inference.py` wrote with --json."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tables import table

# Name of a way in the files -> its head in the tables.
HEADS = {
    "float32": "float32", "channels_last": "float32", "from bits": "from bits", "int16": "int16",
    "counted": "2-bit inputs", "levels": "2-bit inputs, float32", "bfloat16": "bfloat16",
    "int8 torch": "int8, torch", "int8 onnxruntime": "int8, onnxruntime",
    "decoded": "decoded", "compiled": "compiled",
}  # fmt: skip
TIMED = ("float32", "from bits", "int16", "counted", "bfloat16", "int8 torch", "int8 onnxruntime")
COMPARED = (*TIMED[1:], "levels", "decoded", "compiled")
HELD = ("channels_last", *TIMED[1:])


def found_in(dicts: Sequence[dict], ways: Sequence[str]) -> list[str]:
    """Return those of `ways` that were measured at all."""
    return [way for way in ways if any(way in found for found in dicts)]


def per_way(
    rows: Sequence[dict], ways: Sequence[str], unit: str, cell: Callable[[dict, str], str]
) -> str:
    """Show one line a row: network, batch, then `cell` of each way."""
    ways = found_in([row["ms"] for row in rows], ways)
    heads = ["network", "batch", *(f"{HEADS[way]}{unit}" for way in ways)]
    lines = [
        [row["network"], str(row["batch"]), *(cell(row["ms"], way) for way in ways)] for row in rows
    ]
    return table(heads, lines)


def times_table(rows: Sequence[dict]) -> str:
    """Show the milliseconds of a batch."""
    return per_way(
        rows, TIMED, " ms", lambda ms, way: f"{ms[way]:.2f}" if way in ms else "not measured"
    )


def speed_table(rows: Sequence[dict]) -> str:
    """Show how many times faster than float32 each way is."""
    return per_way(
        rows, COMPARED, "",
        lambda ms, way: f"{ms['float32'] / ms[way]:.2f}" if way in ms else "not measured",
    )  # fmt: skip


def size_table(rows: Sequence[dict]) -> str:
    """Show the bytes of the quantized weights, and what int16 does to the logits."""
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        full, small = own[0]["float32_bytes"], own[0]["packed_bytes"]
        error = max(row["int16_error"] for row in own)
        sizes = [f"{full / 1e6:.2f}", f"{small / 1e6:.3f}", f"{full / small:.0f}"]
        lines.append([name, f"{own[0]['bits']:.2f}", *sizes, f"{error:.1e}"])
    heads = ["network", "bits a weight", "float32 MB", "as bits MB", "times smaller", "int16 error"]
    return table(heads, lines)


def memory_table(rows: Sequence[dict]) -> str:
    """Show the megabytes of a process by way: what is loaded once, then of each network."""
    ways = found_in([{row["way"]: None} for row in rows], HELD)
    found = {(row["network"], row["way"]): row for row in rows}
    names = dict.fromkeys(row["network"] for row in rows)

    def line(name: str, when: str, value: Callable[[dict], float]) -> list[str]:
        return [name, when, *(f"{value(found[name, way]) / 1e6:.1f}" for way in ways)]

    lines = []
    for name in names:
        lines.append(line(name, "loaded", lambda row: row["loaded"]))
        for batch in found[name, ways[0]]["peaks"]:
            lines.append(line(name, f"batch {batch}", lambda row, b=batch: row["peaks"][b]))
    first = line(next(iter(names)), "once", lambda row: row["libraries"])
    heads = ["network", "when", *(f"{HEADS[way]} MB" for way in ways)]
    return table(heads, [["libraries", *first[1:]], *lines])


def inference_tables(rows: Sequence[dict]) -> dict[str, str]:
    """Return titles and tables of all rows: those with times, and those with memory."""
    timed = [row for row in rows if "ms" in row]
    weighed = [row for row in rows if "peaks" in row]
    found = {}
    for threads in sorted({row["threads"] for row in timed}):
        own = [row for row in timed if row["threads"] == threads]
        many = f"{threads} thread{'s' * (threads > 1)}"
        found[f"times, {many}"] = times_table(own)
        found[f"speed, {many}"] = speed_table(own)
    if timed:
        found["weights"] = size_table(timed)
    if weighed:
        found["memory"] = memory_table(weighed)
    return found


def put_into(document: Path, tables: dict[str, str]) -> None:
    """Put each table behind the comment with its title in `document`, in place of what is there."""
    text = document.read_text()
    for title, own in tables.items():
        pattern = rf"(<!-- table: {re.escape(title)} -->\n)(?:\|.*\n)*"
        text, count = re.subn(pattern, lambda match, own=own: f"{match[1]}{own}\n", text)
        if not count:
            print(f"{document} has no comment <!-- table: {title} -->")
    document.write_text(text)
