"""SIGTERM and Ctrl-C: the first one asks the run to stop after its step, the second stops it."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and has saved its resume point.

    Attributes:
        code: exit code, as shells report the signal: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by {signal.Signals(code - 128).name}")
        self.code = code


class Interruption:
    """Within `with`, notes the first of `signals`; the next one acts at once.

    Attributes:
        code: exit code of a run that is to stop, 0 as long as none is asked for.
    """

    def __init__(self, signals: Sequence[int] = SIGNALS) -> None:
        self.code, self.signals = 0, signals
        self._handlers: dict[int, Any] = {}  # those before, by signal

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # others have no signals
            self._handlers = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        self.__exit__()


@contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait for the end of `with`; a second one acts at once.

    Only where it would raise KeyboardInterrupt: handlers of one's own are left alone.
    """
    own = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    with Interruption(() if own else (signal.SIGINT,)) as interruption:
        yield
    if interruption.code:
        raise KeyboardInterrupt


def leave_signals_to_parent(worker: int) -> None:
    """Let a worker process ignore what stops a run: the main process decides, and needs it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
