"""Requests to end (Ctrl-C, SIGTERM) that wait until something that must not be cut in two is done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """Holds back signals while its body runs; the last one that came is sent again afterwards.

    Signals are only heard by the main thread: in any other nothing is done, and nothing needs to be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for each in SIGNALS:
            before[each] = signal.signal(each, lambda number, _: came.append(number))
        yield
    finally:
        for each, handler in before.items():
            # A handler that was not installed from Python cannot be put back by it either.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[-1])
