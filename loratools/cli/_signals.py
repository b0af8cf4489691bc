"""Signals that end a run become exceptions, so that half an output is removed on the way out."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 5.0  # seconds in which a second signal does not stop the cleaning up; who insists after that gets out at once


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP exit with 128 + their number, as shells say it.

    A signal that was ignored when the run began (nohup) stays so. After a stop they are ignored: the process is ending, and an
    impatient second Ctrl-C should not change the code it ends with.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in ENDING if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)}
    stopped: list[float] = []

    def stop(number: int, _: FrameType | None) -> None:
        if stopped and time.monotonic() - stopped[-1] < PATIENCE:
            return
        stopped.append(time.monotonic())
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            # ignored rather than handled: Python lets go of handlers while it shuts down, and of this not
            signal.signal(number, signal.SIG_IGN if stopped else handler)
