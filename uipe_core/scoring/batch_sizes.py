"""How many rows go through a model at once: as many as were asked for or found to fit, halved whenever memory runs out."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from uipe_core.models.memory import give_back, ran_out

T = TypeVar("T")

USUAL, MOST = 32, 1024
"""Rows that a search for the best number starts from, and beyond which it does not look."""

GAIN = 0.9
"""Twice as many rows must take less than this share of the time per row to be worth their memory."""

SHARE = 0.25
"""Of the memory that is available, what a batch on the CPU may take, as reckoned."""


class BatchSize:
    """A number of rows that shrinks as memory runs out.

    Attributes:
        rows: Most rows at once.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def through(
        self,
        items: Sequence[T],
        work: Callable[[list[T]], None],
        *,
        cut: Callable[[Sequence[T], int], Iterator[list[T]]],
        rows_of: Callable[[list[T]], int] = len,
    ) -> None:
        """Does some work on all items, batch by batch; a batch that finds too little memory comes again in halves.

        Args:
            items: What is to be worked on.
            work: Does so with one batch, and does no harm if it is done again after it was broken off.
            cut: Cuts items into batches of at most so many rows, in order.
            rows_of: Rows of a batch.

        Raises:
            Exception: Whatever `work` raises; of errors that mean too little memory only those of a single row.
        """
        before = self.rows
        waiting = deque(cut(items, before))
        while waiting:
            batch = waiting[0]
            try:
                work(batch)
            except Exception as error:
                if not ran_out(error):
                    raise
                if rows_of(batch) <= 1:
                    self.rows = before  # what has no room for a row tells nothing of how many others may be read at once
                    raise
            else:
                waiting.popleft()
                continue
            # Not in the handler: the error's traceback refers to everything that took the memory.
            give_back()
            self.rows = max(1, rows_of(batch) // 2)
            waiting = deque(cut([item for batch in waiting for item in batch], self.rows))


def slices(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Items in batches of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def found_rows(model: Any, device: torch.device, tokens: int, predicted: int, read: Callable[[int], None]) -> int:
    """How many rows are best read at once.

    On a GPU by trying: twice as many for as long as that is faster per row and memory suffices. On the CPU more rows are no
    faster than `USUAL`, so these are taken, or as many as the memory that is available now holds by a generous reckoning.

    Args:
        model: What reads.
        device: Where it does.
        tokens: Of the longest row.
        predicted: For how many of them logits are computed.
        read: Reads so many of the longest rows.
    """
    if device.type != "cuda":
        free = available_memory()
        return USUAL if free is None else max(1, min(USUAL, int(SHARE * free / row_bytes(model, tokens, predicted))))
    rows = USUAL
    while (seconds := _seconds(read, rows, device)) is None:
        give_back()
        if rows == 1:
            return rows  # who reads a row will be told that it is too long
        rows //= 2
    while USUAL <= rows <= MOST // 2:
        more = _seconds(read, 2 * rows, device)
        if more is None:
            give_back()
        if more is None or more > 2 * GAIN * seconds:
            break
        rows, seconds = 2 * rows, more
    return rows


def row_bytes(model: Any, tokens: int, predicted: int) -> int:
    """About how much memory one row takes while it is read: logits as they are and twice in fp32, and one layer at work."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    size = model.dtype.itemsize
    return predicted * config.vocab_size * (size + 8) + tokens * (8 * config.hidden_size + 3 * inner + tokens) * size


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _seconds(read: Callable[[int], None], rows: int, device: torch.device) -> float | None:
    """Seconds that reading so many rows takes; None where there is too little memory for it."""
    try:
        read(rows)  # the first time may compile and allocate
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        read(rows)
        torch.cuda.synchronize(device)
    except Exception as error:
        if not ran_out(error):
            raise
        return None
    return time.perf_counter() - started
