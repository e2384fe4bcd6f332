"""How far a study is: read from its folder, also while its driver runs; and the lines by which a driver tells it from afar."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState

from search.results.study_result import StudyResult
from search.samplers.registry import SAMPLERS
from search.store.folder import is_running
from search.store.mirror import is_url, is_worked_on, readable_folder
from search.store.study_store import StudyStore
from search.store.trials import is_interrupted
from uipe_core.errors import UserError
from uipe_core.storage.files import parse_json

PREFIX = "uipe-status: "
"""Begins every line of a log that is a status, in JSON."""
RECENT = 20
"""Trials whose durations the expected end is reckoned from."""
SHORTEST, LONGEST, SHARE = 10.0, 120.0, 0.02
"""Seconds between two status lines: a share of the time so far, within limits; and the share of it that they may cost."""


def read_status(out: Path | str) -> dict[str, Any]:
    """The status of a study's folder, or of the one at a URL.

    Raises:
        UserError: If it holds no study.
    """
    folder = readable_folder(out)
    at_work = is_worked_on(str(out)) if is_url(out) else is_running(folder)
    return {**status_of(StudyStore.open(folder), "running" if at_work else None), "out": str(out)}


def status_of(
    store: StudyStore, state: str | None = None, progress: dict[str, tuple[int, int]] | None = None
) -> dict[str, Any]:
    """The status of an open study, ready for JSON.

    Args:
        store: The study.
        state: ``running``, or another word of the caller's; None tells ``finished`` from ``unfinished``.
        progress: Work under way: (done, total) by name.

    Returns:
        ``study``, ``out``, ``state``; ``trials``: ``done``, ``total``, ``running``, ``failed``, ``interrupted`` (by the end of
        a run: run again by the next) and ``pruned`` (among those done), of points at alpha = 0 and search trials without
        controls; ``front`` (points) and ``hypervolume`` (``now``, ``given``), None before the first trial; ``gpu_hours`` and
        ``hours`` of all runs together; ``expected_end`` (ISO 8601 with offset, None where nothing tells); ``progress``;
        ``updated``.
    """
    trials = list(store.trials(names=("kind", "reason")))
    states = [trial.state for trial in trials]
    spec = store.spec
    proposed = len(spec.grid_points()) if SAMPLERS[spec.search.sampler].fixed_points else spec.search.trials
    asked = {"alpha_zero": sum(spec.base_epochs().values()), "search": proposed}
    done = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    kinds = [trial.user_attrs.get("kind") for trial in done]
    missing = sum(max(0, wanted - kinds.count(kind)) for kind, wanted in asked.items())
    running = states.count(TrialState.RUNNING)
    interrupted = sum(map(is_interrupted, trials))
    now = datetime.now()
    left = _seconds_left(done, missing, running) if state == "running" else None
    usage = store.record.usage or {}
    return {
        "study": store.record.name,
        "out": str(store.out),
        "state": state or ("unfinished" if missing else "finished"),
        "trials": {
            "done": len(done),
            "total": max(len(done), sum(asked.values())),
            "running": running,
            "failed": states.count(TrialState.FAIL) - interrupted,
            "interrupted": interrupted,
            "pruned": states.count(TrialState.PRUNED),
        },
        **_front(store),
        "gpu_hours": round(float(usage.get("gpu_hours", 0.0)), 4),
        "hours": round(float(usage.get("hours", sum(store.record.seconds.values()) / 3600)), 4),
        "expected_end": None if left is None else (now + timedelta(seconds=left)).astimezone().isoformat(timespec="seconds"),
        "progress": {} if progress is None else {name: list(level) for name, level in progress.items()},
        "updated": now.astimezone().isoformat(timespec="seconds"),
    }


def _seconds_left(done: list[FrozenTrial], missing: int, running: int) -> float | None:
    """Return what the missing trials will take at the pace of the latest: so many at once, each as long as they took."""
    ended = [trial for trial in done if trial.duration is not None and trial.datetime_complete is not None]
    latest = sorted(ended, key=lambda trial: trial.datetime_complete or datetime.min)[-RECENT:]
    if not latest or not running:
        return None
    mean = sum(trial.duration.total_seconds() for trial in latest if trial.duration is not None) / len(latest)
    return mean * missing / running


def _front(store: StudyStore) -> dict[str, Any]:
    try:
        result = StudyResult.of(store)
        volumes = {name: result.hypervolume[key] for name, key in (("now", "front"), ("given", "alpha_zero"))}
    except UserError:
        return {"front": None, "hypervolume": None}
    known = {name: value if math.isfinite(value) else None for name, value in volumes.items()}
    return {"front": len(result.front), "hypervolume": known}


class StatusLines:
    """Report the status of a study in its log while a block runs, for `uipe status` of a job: lines for programs.

    A thread of its own reads the storage, so that a long training or trial does not silence it.

    Args:
        store: The study.
        progress: Work under way: (done, total) by name.
        wanted: Whether lines are to be written. They are for the log of a cluster job, not for a terminal.
    """

    def __init__(self, store: StudyStore, progress: Callable[[], dict[str, tuple[int, int]]], wanted: bool) -> None:
        self._store, self._progress, self._wanted = store, progress, wanted
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="status lines", daemon=True)

    def __enter__(self) -> Self:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._wanted:
            self._thread.join()
            _write(lambda: status_of(self._store, None if kind is None else "unfinished"))

    def _tell(self) -> None:
        began = time.monotonic()
        while True:
            started = time.monotonic()
            _write(lambda: status_of(self._store, "running", self._progress()))
            ended = time.monotonic()
            pause = min(max(SHORTEST, SHARE * (ended - began)), LONGEST)
            if self._over.wait(max(pause, (ended - started) / SHARE)):
                return


def _write(status: Callable[[], dict[str, Any]]) -> None:
    try:
        line = PREFIX + json.dumps(status(), separators=(",", ":")) + "\n"
    except Exception:
        return  # a storage that is away for a moment: the study itself deals with that, and the next line will tell
    with contextlib.suppress(OSError):
        sys.stderr.write(line)
        sys.stderr.flush()


def last_status(log: str) -> dict[str, Any] | None:
    """Return the latest status in a driver's log; None where there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith(PREFIX):
            try:
                status = parse_json(line.removeprefix(PREFIX))
            except ValueError:
                continue  # the end of a log that is being written
            return status if isinstance(status, dict) else None
    return None


def is_noise(line: str) -> bool:
    """Return True for a line of a driver's log that `uipe logs` leaves out: a status, or the state dump of a raylet."""
    return line.startswith(PREFIX) or "[state-dump]" in line


def without_status(log: str) -> str:
    """A log as people read it."""
    return "".join(line for line in log.splitlines(keepends=True) if not is_noise(line))
