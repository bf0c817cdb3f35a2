"""How small a file of LeNet5 can be, and what each flag of its recipe gains.

    python benchmarks/smallest.py run                      # what has no log yet: 3 seeds, all sizes
    python benchmarks/smallest.py run --kb 5 --seed 0      # a part
    python benchmarks/smallest.py run --arm no_shifts whole_rows --kb 5  # the recipe, changed
    python benchmarks/smallest.py table                    # what the logs say, in Markdown

A run has a log of its own, ARM_KBkb_seedN.jsonl. One whose log has its
result is not run again, one that was interrupted goes on. All of a seed start from one
full-precision network, which is trained on shifted pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lenet5
from published_runs import result_of
from tables import spread, table

LOGS = Path("checkpoints/smallest")
SEEDS, SIZES = (0, 1, 2), (2.5, 5.0, 10.0)
PRETRAIN = {
    "--augment": "2", "--epoch_pretrain": "30", "--lr_pretrain": "0.05",
    "--milestones_pretrain": "14 21 27",
}  # fmt: skip
RECIPE = {
    "--augment": "1", "--floats": "6bit", "--coded": "", "--fold": "", "--max_bit": "2",
    "--subc": "0 0 8 5",
}  # fmt: skip
QUANTIZE = {"--lr": "1e-3", "--pr": "0.97", "--epoch_basis": "2", "--epoch_coord": "1"}
POSTTRAIN = {
    "--lr": "3e-3", "--epoch_ste": "40", "--ld_ste": "0.91", "--epoch_post_coord": "4",
    "--ld_post_coord": "0.7",
}  # fmt: skip
# What each arm changes in the recipe; None leaves a flag out.
ARMS: dict[str, dict[str, str | None]] = {
    "recipe": {},
    "no_shifts": {"--augment": None},
    "whole_rows": {"--subc": None},
}
# Run, too, with a flag that gained nothing and is gone: 0.7 of the loss compared with the answers
# of the full-precision network, softened by 4.
MEASURED = (*ARMS, "distilled")


@dataclass(frozen=True)
class Cell:
    """One run: what of the recipe is changed, KB of the file, the seed."""

    arm: str
    kb: float
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.arm}_{self.kb:g}kb_seed{self.seed}"

    def commands(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield (name, last stage, flags of lenet5.py) of the full-precision run and of its own."""
        source, seed = f"source_seed{self.seed}", ["--seed", str(self.seed)]
        files = ["--model_ori", f"{source}_ori.pth", "--model"]
        full = ["--PRETRAIN", *flags_of(PRETRAIN), *seed, *files, f"{source}.pth"]
        yield source, "pretrain", full
        own = [*seed, *files, f"{self.name}.pth"]
        for stage, settings in (("alq", QUANTIZE), ("posttrain", POSTTRAIN)):
            flags = flags_of(RECIPE | {"--file_kb": f"{self.kb:g}"} | settings | ARMS[self.arm])
            yield self.name, stage, [f"--{stage.upper()}", *flags, *own]


def flags_of(settings: dict[str, str | None]) -> list[str]:
    """Return settings as a command has them."""
    return [
        part
        for flag, value in settings.items()
        if value is not None
        for part in (flag, *value.split())
    ]


def run(cells: Iterator[Cell], args: argparse.Namespace) -> None:
    """Run what has no result yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name, stage, flags in chain.from_iterable(cell.commands() for cell in cells):
        if result_of(args.out / f"{name}.jsonl", stage) is None:
            print(name, file=sys.stderr, flush=True)
            in_folder = [str(args.out / part) if part.endswith(".pth") else part for part in flags]
            more = ["--data", str(args.data), "--resume"]
            more += ["--threads", str(args.threads)] if args.threads else []
            lenet5.main([*in_folder, *more])


def results(
    folder: Path, names: Sequence[str] = MEASURED, sizes: Sequence[float] = SIZES
) -> Iterator[tuple[str, float, list[dict]]]:
    """Yield (arm, KB asked for, the results of its seeds) of what has been run."""
    for arm, kb in product(names, sizes):
        logs = (folder / f"{Cell(arm, kb, seed).name}.jsonl" for seed in SEEDS)
        found = [result for log in logs if (result := result_of(log, "posttrain"))]
        if found:
            yield arm, kb, found


def results_table(folder: Path, *which: Sequence) -> str:
    """Show each arm's files and test accuracy in percent, mean and deviation over the seeds.

    `which` are names and sizes as in `results`.
    """
    head = ["run", "KB asked for", "largest file, bytes", "test %", "full precision %", "seeds"]
    rows = []
    for arm, kb, found in results(folder, *which):
        top1, full = ([result[key] for result in found] for key in ("top1", "top1_fp"))
        largest = max(result["file_bytes"] for result in found)
        rows.append([arm, f"{kb:g}", str(largest), spread(top1), spread(full), str(len(found))])
    return table(head, rows) if rows else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=["recipe"])
    parser.add_argument("--kb", nargs="+", type=float, default=SIZES)
    parser.add_argument("--seed", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--out", type=Path, default=LOGS, help="folder of logs and networks")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.what == "table":
        print(results_table(args.out))
    else:
        run((Cell(arm, kb, seed) for seed, arm, kb in product(args.seed, args.arm, args.kb)), args)


if __name__ == "__main__":
    main()
