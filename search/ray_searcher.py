"""Ray Tune's side of the search: a Searcher that hands out jobs and writes their ends into the study.

Not `ray.tune.search.optuna.OptunaSearch`: with several objectives it leaves trials RUNNING for ever on a missing or NaN metric
and writes no attributes. This one gets every job from the study and tells it how each ended.
"""

import base64
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from ray.tune.search import Searcher

from search.evaluator import Job
from search.space import Point
from search.study_store import StudyStore


class StudySearcher(Searcher):
    """Hands out, in this order: controls, points at alpha = 0, what the sampler proposes, mirrors of the front.

    Args:
        store: The open study; this object is its only writer while Tune runs.
        space: The search space.
        controls: Controls still to be scored.
        given: Points at alpha = 0 still to be scored.
        proposals: How many points the sampler may still propose. Failed ones count, so that a study whose every trial fails
            comes to an end; the same command tries again.
        mirrors: Called when everything else has ended: what of the front is still to be scored otherwise.
        finished: Called with each ended job and the reason of its failure, or None.
    """

    def __init__(
        self,
        store: StudyStore,
        space: dict[str, BaseDistribution],
        controls: Iterable[Job],
        given: Iterable[Point],
        proposals: int,
        mirrors: Callable[[], list[Job]],
        finished: Callable[[Job, str | None], None],
    ) -> None:
        super().__init__()
        self._store = store
        self._space = space
        self._controls = deque(controls)
        self._given = deque(given)
        self._proposals = proposals
        self._mirrors: Callable[[], list[Job]] | None = mirrors
        self._finished = finished
        self._running: dict[str, tuple[int, Job]] = {}
        self.error: Exception | None = None
        """What the study's storage or folder raised; the search has then stopped, and its caller raises it."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next job as a Tune configuration; None while the end of running jobs must be awaited."""
        if self.error is not None:
            return self.FINISHED
        try:
            return self._next(trial_id)
        except Exception as error:
            self.error = error
            return self.FINISHED

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Ends the trial in the study: complete with its evidence, or failed with its reason."""
        try:
            self._end(trial_id, result, error)
        except Exception as problem:
            self.error = self.error or problem

    def _next(self, trial_id: str) -> dict[str, Any] | str | None:
        if not (self._controls or self._given or self._proposals):
            if self._running:
                return None
            if self._mirrors is not None:
                self._controls.extend(self._mirrors())
                self._mirrors = None
        if self._controls:
            job = self._controls.popleft()
            number = self._store.ask_control()
        elif self._given:
            number, job = self._store.ask_point(self._space, self._given.popleft().params)
        elif self._proposals:
            self._proposals -= 1
            number, job = self._store.ask_point(self._space)
        else:
            return self.FINISHED
        self._running[trial_id] = (number, job)
        return {"job": asdict(job)}

    def _end(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        number, job = self._running.pop(trial_id)
        reason = None
        if error or result is None:
            reason = "the worker died or was killed"
        elif result.get("reason"):
            reason = str(result["reason"])
        if reason is None and result is not None:
            items = base64.b64decode(result["items"]) if "items" in result else None
            reason = self._store.complete(job, number, json.loads(result["evidence"]), items)
        else:
            self._store.fail(job, number, reason or "unknown")
        self._finished(job, reason)

    def save(self, checkpoint_path: str) -> None:
        """Writes a note in place of a state: the study itself is the state, and the same command resumes it."""
        Path(checkpoint_path).write_text("The state of the search is its Optuna study.\n")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher beside its results; an open database cannot and need not travel."""
        return {}
