"""Hold back or ignore requests to end this process while something must be done as a whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REQUESTS_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Requests to end."""


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer signals while the body runs; the last one that came is sent again afterwards.

    Only the main thread receives signals, so in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for each in REQUESTS_TO_END:
            before[each] = signal.signal(each, lambda number, _: came.append(number))
        yield
    finally:
        for each, handler in before.items():
            # A handler that was not installed from Python cannot be put back by it either.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[-1])


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore requests to end while the body puts things in order: the run ends already, and is not to stop half way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not SIG_IGN: processes that the body starts would inherit it.
    before = {each: signal.signal(each, lambda number, frame: None) for each in REQUESTS_TO_END}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
