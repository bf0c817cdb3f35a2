"""Tools beside the scripts.

`python -m alq info FILE` looks into a packed file or a checkpoint;
`python -m alq table` prints the README's tables of results from the logs of published runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .command.arguments import OneLineParser
from .command.info import info_text, inspect, plot
from .command.results import recipe_table, results_table
from .errors import InputError

PUBLISHED_RUNS = Path("checkpoints/published")


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m alq", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="bits and bytes, layer by layer")
    info.add_argument("file", type=Path, metavar="FILE", help="packed file or checkpoint")
    info.add_argument("--json", action="store_true", help="print JSON, for programs")
    info.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the bitwidths into this file (matplotlib)"
    )
    table = commands.add_parser("table", help="the results table, from logs")
    table.add_argument(
        "folder", type=Path, nargs="?", default=PUBLISHED_RUNS, metavar="FOLDER",
        help="where the logs (*.jsonl) lie",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.command == "table":
        print(results_table(args.folder.glob("*.jsonl")))
        print("", recipe_table(args.folder / "ablations"), sep="\n")
        return
    try:
        found = inspect(args.file)
        if args.plot:
            plot(found, args.plot)
        print(json.dumps(found, indent=1) if args.json else info_text(found))
    except InputError as error:
        info.error(str(error))
    except BrokenPipeError:  # the reader, for instance `head`, has seen enough
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
