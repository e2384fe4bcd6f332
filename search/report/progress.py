"""Progress of long work on a terminal: what is being done, how far it is, how long it will still take."""

import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from uipe_core.errors import printable


class Bars:
    """Progress bars on standard error; on anything but a terminal, a line when a bar is full.

    Args:
        quiet: Show nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._levels: dict[str, tuple[int, int]] = {}
        self._full: set[str] = set()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()

    def show(self, name: str, done: int, total: int) -> None:
        """Set a bar, which appears with its first call."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
            if not self.console.is_terminal:
                self.say(f"{name} ...")
        self._levels[name] = (done, total)
        with contextlib.suppress(OSError):
            self._progress.update(self._tasks[name], completed=done, total=total)
        if done >= total and name not in self._full:
            self._full.add(name)
            if not self.console.is_terminal:
                self.say(f"{name}: {total} of {total}")

    @property
    def plain(self) -> bool:
        """Return True if there is something to write to, but no terminal."""
        return not self.console.is_terminal and not self.console.quiet

    def under_way(self) -> dict[str, tuple[int, int]]:
        """Bars that are not full yet, as (done, total)."""
        return {name: (done, total) for name, (done, total) in list(self._levels.items()) if done < total}

    def show_all(self, board: Mapping[str, tuple[int, int]]) -> None:
        """Set several bars at once."""
        for name, (done, total) in board.items():
            self.show(name, done, total)

    def say(self, text: str) -> None:
        """A line above the bars; lost where standard error is closed, full, or a terminal that is gone: the work goes on."""
        with contextlib.suppress(OSError):
            self.console.print(printable(text), highlight=False, markup=False)


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
