"""Tools beside the scripts.

`python -m alq info FILE` looks into a packed file or a checkpoint;
`python -m alq plot LOG...` draws a run, or compares several, from their logs, also while they run;
`python -m alq table` prints the tables of results from the logs of published runs. It needs the
checkout, for the logs, the scripts and `benchmarks/` are no part of the package.
"""

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .command.arguments import OneLineParser
from .command.info import info_text, inspect, plan_text, plot
from .command.operations import operations, operations_text
from .command.plot import plot_logs
from .errors import InputError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"  # of the checkout


def show_info(args: Namespace) -> None:
    """Print, and draw where asked to, the bits and bytes of a file."""
    if args.plan and (args.json or args.plot or args.ops):
        raise InputError("--plan: is a table of its own; give it without --json, --plot and --ops")
    if args.plan:
        return print(plan_text(args.file))
    found = inspect(args.file)
    if args.plot:
        plot(found, args.plot)
    text = info_text(found)
    if args.ops:
        networks = from_checkout("networks").NETWORKS.values()
        models = ((each.recipe.shapes(), each.picture) for each in networks)
        found["operations"] = operations(found["layers"], models)
        text = operations_text(found["operations"])
    print(json.dumps(found, indent=1) if args.json else text)


def show_plot(args: Namespace) -> None:
    """Draw the runs of some logs, and print the picture's name."""
    print(plot_logs(args.logs, args.output))


def show_tables(args: Namespace) -> None:
    """Print the tables of a folder of logs, by the checkout's `benchmarks/tables.py`."""
    from_checkout("tables").print_tables(args.folder)


def from_checkout(name: str) -> ModuleType:
    """Return a module of the checkout's `benchmarks/`."""
    if not (BENCHMARKS / f"{name}.py").is_file():
        raise InputError(
            f"needs the checkout of the project: {BENCHMARKS} and the logs of the published runs "
            "are not part of an installed package"
        )
    sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m alq", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="bits and bytes, layer by layer")
    info.set_defaults(show=show_info, parser=info)
    info.add_argument("file", type=Path, metavar="FILE", help="packed file or checkpoint")
    info.add_argument("--json", action="store_true", help="print JSON, for programs")
    info.add_argument(
        "--plan", action="store_true",
        help="how each layer of a packed file computes from its bits (docs/inference.md)",
    )  # fmt: skip
    info.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the bitwidths into this file (matplotlib)"
    )
    info.add_argument(
        "--ops", action="store_true",
        help="count a sample's operations and bytes, layer by layer (needs the checkout)",
    )  # fmt: skip
    drawing = commands.add_parser("plot", help="a picture of a run, or of several (matplotlib)")
    drawing.set_defaults(show=show_plot, parser=drawing)
    drawing.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="of a run (.jsonl)")
    drawing.add_argument(
        "-o", "--output", type=Path, metavar="PNG",
        help="the picture, .png, .svg or .pdf (default: beside the log; of several compared.png)",
    )  # fmt: skip
    table = commands.add_parser("table", help="the tables of results, from logs")
    table.set_defaults(show=show_tables, parser=table)
    table.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER",
        help="where the logs (*.jsonl) lie (default: the checkout's checkpoints/published)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        args.show(args)
    except InputError as error:
        args.parser.error(str(error))
    except BrokenPipeError:  # the reader, for instance `head`, has seen enough
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
