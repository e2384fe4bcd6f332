"""Choose batch sizes: given or searched for, halved when memory runs out."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from uipe_core.models.memory import free_memory, is_out_of_memory

T = TypeVar("T")

USUAL, MOST = 32, 1024
"""Rows where the search for the best size starts and ends."""

GAIN = 0.9
"""A double batch must take less than this share of the time per row."""

SHARE = 0.25
"""Share of available memory that a batch on the CPU may take, by estimate."""


class BatchSize:
    """A batch size that shrinks when memory runs out.

    Attributes:
        rows: Most rows at once.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def run(
        self,
        items: Sequence[T],
        work: Callable[[list[T]], None],
        *,
        split: Callable[[Sequence[T], int], Iterator[list[T]]],
        count_rows: Callable[[list[T]], int] = len,
    ) -> None:
        """Process all items batch by batch; a batch that runs out of memory is repeated in halves.

        Args:
            items: What to process.
            work: Processes one batch; may be repeated after it failed midway.
            split: Splits items into batches of at most so many rows, in order.
            count_rows: Rows of a batch.

        Raises:
            Exception: Any error of `work`; out-of-memory errors only of a single row.
        """
        before = self.rows
        waiting = deque(split(items, before))
        while waiting:
            batch = waiting[0]
            try:
                work(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if count_rows(batch) <= 1:
                    self.rows = before  # one row too long says nothing about the others
                    raise
            else:
                waiting.popleft()
                continue
            # Outside the handler, because the traceback keeps the batch's tensors alive.
            free_memory()
            self.rows = max(1, count_rows(batch) // 2)
            waiting = deque(split([item for batch in waiting for item in batch], self.rows))


def slices(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Yield items in batches of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def find_batch_size(model: Any, device: torch.device, tokens: int, predicted: int, read: Callable[[int], None]) -> int:
    """Return the fastest number of rows per batch.

    On a GPU by trials: doubled while that is faster per row and fits. On the CPU more rows than `USUAL` are no faster, so
    these, or as many as fit into the available memory by a generous estimate.

    Args:
        model: The model.
        device: Its device.
        tokens: Tokens of the longest row.
        predicted: For how many of them logits are computed.
        read: Runs a forward pass over so many of the longest rows.
    """
    if device.type != "cuda":
        free = available_memory()
        return USUAL if free is None else max(1, min(USUAL, int(SHARE * free / row_bytes(model, tokens, predicted))))
    rows = USUAL
    while (seconds := _seconds(read, rows, device)) is None:
        free_memory()
        if rows == 1:
            return rows  # the row itself will raise
        rows //= 2
    while USUAL <= rows <= MOST // 2:
        more = _seconds(read, 2 * rows, device)
        if more is None:
            free_memory()
        if more is None or more > 2 * GAIN * seconds:
            break
        rows, seconds = 2 * rows, more
    return rows


def row_bytes(model: Any, tokens: int, predicted: int) -> int:
    """Estimate the memory of one row in a forward pass: logits, twice more in fp32, and one layer."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    size = model.dtype.itemsize
    return predicted * config.vocab_size * (size + 8) + tokens * (8 * config.hidden_size + 3 * inner + tokens) * size


def available_memory() -> int | None:
    """Return the bytes of memory available without swapping; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _seconds(read: Callable[[int], None], rows: int, device: torch.device) -> float | None:
    """Return the seconds of a forward pass over so many rows; None if memory runs out."""
    try:
        read(rows)  # the first time may compile and allocate
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        read(rows)
        torch.cuda.synchronize(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return time.perf_counter() - started
