"""The table at the end of a run."""

from __future__ import annotations


def print_report(recipe, results: list[dict]) -> None:
    """Per layer and in total: bitwidth, storage, accuracy, beside the published row."""
    for result in results:
        print(result)
