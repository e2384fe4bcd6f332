"""Progress of long work: what is being done, how far it is, how long it will still take."""

import contextlib
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from uipe_core.errors import printable

FORMAT = "{desc:<34} {bar:20} {n_fmt:>4}/{total_fmt:<4} {elapsed} left {remaining}"


class Bars:
    """Progress bars of tqdm on standard error, or in the cell of a notebook; anywhere else a line when a bar is full.

    Args:
        quiet: Show nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._drawn = not quiet and (_is_terminal() or in_notebook())
        self._bars: dict[str, Any] = {}
        self._levels: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            for bar in self._bars.values():
                bar.close()

    def show(self, name: str, done: int, total: int) -> None:
        """Set a bar, which appears with its first call."""
        before = self._levels.get(name)
        self._levels[name] = (done, total)
        if self._drawn:
            with contextlib.suppress(OSError):
                self._draw(name, done, total)
        else:
            if before is None:
                self.say(f"{name} ...")
            if done >= total and (before is None or before[0] < before[1]):
                self.say(f"{name}: {total} of {total}")

    def _draw(self, name: str, done: int, total: int) -> None:
        from tqdm.auto import tqdm

        if name not in self._bars:
            tqdm.monitor_interval = 0  # no thread of its own
            self._bars[name] = tqdm(desc=printable(name), total=total, initial=done, bar_format=FORMAT, **_size())
        bar = self._bars[name]
        bar.total = total
        bar.update(done - bar.n)
        bar.refresh()

    @property
    def plain(self) -> bool:
        """Return True if there is something to write to, but no terminal and no notebook."""
        return not self._drawn and not self._quiet

    def under_way(self) -> dict[str, tuple[int, int]]:
        """Bars that are not full yet, as (done, total)."""
        return {name: (done, total) for name, (done, total) in list(self._levels.items()) if done < total}

    def show_all(self, board: Mapping[str, tuple[int, int]]) -> None:
        """Set several bars at once."""
        for name, (done, total) in board.items():
            self.show(name, done, total)

    def say(self, text: str) -> None:
        """A line above the bars; lost where standard error is closed, full, or a terminal that is gone: the work goes on."""
        if self._quiet:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._bars:
                from tqdm.auto import tqdm

                tqdm.write(printable(text), file=sys.stderr)
            else:
                print(printable(text), file=sys.stderr, flush=True)


def _size() -> dict[str, Any]:
    """Return how large a bar is: as wide as the terminal, or 80 columns where it does not know its own size."""
    with contextlib.suppress(OSError, ValueError):
        if not all(os.get_terminal_size(sys.stderr.fileno())):
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}


def _is_terminal() -> bool:
    with contextlib.suppress(AttributeError, ValueError):  # no standard error, or a closed one
        return sys.stderr.isatty()
    return False


def in_notebook() -> bool:
    """Return True in the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


class ProgressActor:
    """Where tasks note how far they are, and the driver reads it. Lives in this light module so that its actor starts fast."""

    def __init__(self) -> None:
        self._bars: dict[str, tuple[int, int]] = {}

    def note(self, name: str, done: int, total: int) -> None:
        """Set a bar."""
        self._bars[name] = (done, total)

    def read(self) -> dict[str, tuple[int, int]]:
        """All bars as (done, total)."""
        return self._bars
