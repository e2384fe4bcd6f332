"""Tell experiment trackers of a study while it runs; a tracker that fails is left out, and the study goes on."""

import json
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna.trial import TrialState

from search.problem.trial import TrialSpec
from search.publishing.trackers import TRACKERS, Entry, Study, Tracker
from search.results.study_result import StudyResult
from search.spec.errors import without_password
from search.spec.runtime import Tracking
from search.store.study_store import StudyStore
from search.store.trials import is_interrupted
from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import read_json, write_atomic

TRACKED = "tracking.json"
"""File of a study's folder: the run of each tracker, and the trials it knows, with which a resumed study goes on there."""

WAIT_SECONDS = 120.0
"""How long the end of a study waits for its trackers."""


class StudyTracking:
    """Hand what happens to the trackers of a study, which work in a thread of their own: a slow server holds nothing up.

    Args:
        store: The open study.
        say: Prints a line.
    """

    def __init__(self, store: StudyStore, say: Callable[[str], None]) -> None:
        section = store.spec.tracking or Tracking()
        self._store, self._say = store, say
        self._chosen = {name: given for name in TRACKERS if (given := getattr(section, name)) is not None}
        self._trackers: dict[str, Tracker] = {}
        self._file = store.out / TRACKED
        self._known: dict[str, Any] = {}
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def __enter__(self) -> "StudyTracking":
        if self._chosen:
            study = Study.of(self._store)
            self._known = _read(self._file)
            self._thread.start()
            self._tasks.put(lambda: self._begin(study))
            self._catch_up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._chosen:
            return
        ended = "finished" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self._tasks.put(lambda: self._each(lambda tracker: tracker.close(ended)))
        self._tasks.put(None)
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            slow = ", ".join(self._chosen)
            self._say(f"tracking: {slow} did not take everything within {WAIT_SECONDS:.0f} s; the same command sends the rest")

    def ended(self, job: TrialSpec, number: int, state: str, evidence: Mapping[str, Any]) -> None:
        """Note the end of a trial: ``complete``, ``pruned`` or ``failed``."""
        if self._chosen:
            entry = Entry.of(job.is_control, number, state, {"kind": job.kind, **evidence})
            self._tasks.put(lambda: self._log(entry))

    def finish(self, result: StudyResult) -> None:
        """Hand over what is there at the end: trials missed, the front as a table, summary numbers, the report."""
        if not self._chosen:
            return
        self._catch_up()
        front = result.rows(result.front)
        numbers = {f"hypervolume/{name}": value for name, value in result.hypervolume.items()}
        numbers |= {f"gain/{name}": value for name, value in result.gain.items()}
        numbers |= {f"trials/{name}": float(count) for name, count in self._store.counts().items()}
        known = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._tasks.put(lambda: self._each(lambda tracker: tracker.finish(front, known, result.report_path)))

    def _catch_up(self) -> None:
        for entry in _entries(self._store):
            self._tasks.put(lambda entry=entry: self._log(entry))  # type: ignore[misc]

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _begin(self, study: Study) -> None:
        for name, section in self._chosen.items():
            place = section.model_dump_json()
            known = self._known.get(name, {})
            known = known if known.get("place") == place else {}  # another server or project has no such run

            def begin(name: str = name, section: Any = section, known: Any = known, place: str = place) -> None:
                tracker = TRACKERS[name](section, study, known.get("run"))
                self._trackers[name] = tracker
                self._known[name] = {"place": place, "run": tracker.run, "trials": known.get("trials", [])}
                self._save()

            self._guarded(name, begin)

    def _log(self, entry: Entry) -> None:
        for name, tracker in list(self._trackers.items()):
            known = self._known[name]["trials"]
            if entry.name in known:
                continue

            def log(tracker: Tracker = tracker, known: list[str] = known) -> None:
                tracker.log(entry)
                known.append(entry.name)
                self._save()

            self._guarded(name, log)

    def _each(self, task: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: task(tracker))  # type: ignore[misc]

    def _guarded(self, name: str, task: Callable[[], None]) -> None:
        """Do something with a tracker; the first time that it fails is the last."""
        try:
            task()
        except Exception as error:  # of the network, the server, or the library
            self._trackers.pop(name, None)
            said = first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            self._say(f"tracking.{name}: {without_password(said)}; the study goes on without it")

    def _save(self) -> None:
        write_atomic(self._file, json.dumps(self._known).encode(), flush=False)


def _read(file: Path) -> dict[str, Any]:
    """Return what earlier runs noted; nothing where the file is missing or is not theirs."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {name: each for name, each in known if isinstance(each, dict) and isinstance(each.get("trials"), list)}


def _entries(store: StudyStore) -> Iterator[Entry]:
    """Yield every trial of the study that has ended by itself."""
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    objectives = [objective.name for objective in store.objectives]
    for control in (False, True):
        for trial in store.trials(tuple(states), controls=control):
            if not is_interrupted(trial):
                values = dict(zip(objectives, trial.values or (), strict=False))
                yield Entry.of(control, trial.number, states[trial.state], {**values, **trial.user_attrs})
