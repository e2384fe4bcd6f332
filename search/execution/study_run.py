"""How far the trials of a run are, and which stage their time belongs to."""

import time
from collections import Counter
from collections.abc import Iterable

from search.problem.trial import TrialSpec
from search.report.progress import Bars
from search.store.study_store import StudyStore


class StageProgress:
    """Shows the progress of trials and books their time to the stage they belong to."""

    def __init__(self, bars: Bars, store: StudyStore, jobs: Iterable[TrialSpec], proposals: int) -> None:
        self._bars, self._store = bars, store
        self._totals = Counter({"baselines": 0, "trials": proposals}) + Counter(_stage(job) for job in jobs)
        self._done: Counter[str] = Counter()
        self._seconds = {"baselines": 0.0, "trials": 0.0}
        self._stage = "baselines"
        self.begin()
        for stage in ("baselines", "trials"):
            self._show(stage)

    def begin(self) -> None:
        """Time counts from now."""
        self._since = time.perf_counter()

    def more(self, jobs: list[TrialSpec]) -> list[TrialSpec]:
        """Announces what is scored besides, once everything else has ended."""
        self._totals["trials"] += len(jobs)
        self._show("trials")
        return jobs

    def ended(self, job: TrialSpec, reason: str | None, again: bool) -> None:
        """Counts a job, unless it is run again; since trials overlap, the time since the last one ended goes to its stage."""
        self._stage = _stage(job)
        self._done[self._stage] += not again
        if reason is not None:
            where = " ".join(str(part) for part in (job.kind, job.base, job.epoch, job.alpha) if part is not None)
            self._bars.say(f"failed: {where}: {reason}{'; it is run again' if again else ''}")
        self._show(self._stage)
        self._count()

    def close(self) -> None:
        """Books the time, also of a run that was interrupted."""
        self._count()
        for stage, seconds in self._seconds.items():
            self._store.add_seconds(stage, seconds)

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stage] += now - self._since
        self._since = now

    def _show(self, stage: str) -> None:
        names = {"baselines": "scoring: alpha = 0 and controls", "trials": "searching: (method, epoch, alpha)"}
        if self._totals[stage]:
            self._bars.show(names[stage], self._done[stage], self._totals[stage])


def _stage(job: TrialSpec) -> str:
    return "trials" if job.kind in ("search", "dial") or job.of_trial is not None else "baselines"
