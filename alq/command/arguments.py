"""How a command line is read: the parser that refuses in one line, and the types of the flags."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..machine.processes import first_to_say


class OneLineParser(argparse.ArgumentParser):
    """Refuses bad input with one line on stderr and exit code 2. Flags are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.quit(2, f"error: {message} (-h explains every flag)")

    def quit(self, code: int, message: str) -> NoReturn:
        """Exit after one line on stderr."""
        line = f"{self.prog}: {' '.join(message.split())}"
        if first_to_say(line):
            sys.stdout.flush()  # in one file, what was said before stands before
            print(line, file=sys.stderr, flush=True)
        raise SystemExit(code)


def read_ahead(flag: str, options: dict, argv: Sequence[str] | None) -> Any:
    """Return the value of the flag that the defaults of others depend on."""
    parser = OneLineParser(add_help=False)
    parser.add_argument(f"--{flag}", **options)
    return getattr(parser.parse_known_args(argv)[0], flag)


def bounded(
    number: type, low: float, high: float = float("inf"), open_low: bool = False
) -> Callable[[str], float]:
    """Return an argparse type: a `number` in [low, high], or (low, high] when `open_low`."""

    def parse(text: str) -> float:
        value = number(text)
        if not (low < value if open_low else low <= value) or value > high or value == float("inf"):
            limits = f"{'above' if open_low else 'at least'} {low}"
            limits += f" and at most {high}" if high != float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {limits}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[number]  # as argparse's messages say
    return parse


def file(text: str) -> Path:
    """Return the file's name that `text` is; an argparse type."""
    path = Path(text)
    if not path.name or path.name == ".." or "\0" in text or len(os.fsencode(path.name)) > 200:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no name for a file; give one of 1 to 200 bytes, such as run/model.pth"
        )
    return path


def device(text: str) -> torch.device:
    """Return the device of that name, which is there; an argparse type."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found).tolist()  # the device "meta" holds no values
    except Exception as error:  # each kind of device has its own way to say no
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot be used here ({reason}); give cpu, or a device that is there"
        ) from error
    return found


count = bounded(int, 0, 10**9)
positive = bounded(int, 1, 10**9)
some_epochs = bounded(int, 0, 10**5)
epochs = bounded(int, 1, 10**5)
bits = bounded(int, 1, 8)
bits_or_none = bounded(int, 0, 8)
seed = bounded(int, 0, 10**12)  # times a million, with the epoch's number, it fits 64 bits
threads = bounded(int, 1, 4096)
rate = bounded(float, 0, open_low=True)
factor = share = bounded(float, 0, 1, open_low=True)
at_least_0 = bounded(float, 0)
