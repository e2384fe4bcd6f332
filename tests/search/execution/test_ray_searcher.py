"""The searcher between Ray Tune and the study: which job comes when, and how each ends."""

import math
import pickle
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from sqlalchemy import event

from search.evaluation.metrics import TrialMetrics
from search.execution.base_runs import BaseRuns
from search.execution.budget import BudgetMonitor
from search.execution.capacity import ClusterCapacity
from search.execution.tune import IDLE_SECONDS, TIMES_AGAIN, StudySearcher, run_trials
from search.execution.worker_pool import DIED, WorkerPoolMonitor, worker_failure
from search.problem.trial import TrialSpec
from search.samplers.registry import SAMPLERS
from search.spec.runtime import Budget, Plateau
from search.spec.study import parse_study
from uipe_core.errors import UserError

GIVEN = [TrialSpec("alpha_zero", "npo", 1, 0.0), TrialSpec("alpha_zero", "npo", 2, 0.0)]
CONTROLS = [TrialSpec("initial"), TrialSpec("next_epoch", "npo", 3, 0.0)]
WITH_TRIAL = TrialSpec("random_direction", "npo", 1, 0.5, of_trial=3)


THERE = {"grad_diff": ("aa",), "npo": ("bb",)}
"""Base runs of the tiny study, and made-up entries of the delta store."""


class Harness:
    """A searcher on a real study, and the ends it reported."""

    def __init__(self, store, jobs=(), proposals=0, mirrors=list, slots=99, there=THERE, coming=(), budget=None):
        self.store = store
        self.ends, self.said, self.tracked = [], [], []
        self.runs = BaseRuns(ClusterCapacity(slots, 1, slots), dict(there), training=set(coming))
        self.polls = 0
        store.use_sampler(SAMPLERS["random"].make(0))
        self.space = parse_study(store.record.spec).search_space()
        ended = lambda *end: self.ends.append(end)  # noqa: E731
        self.guard = guard = BudgetMonitor(store, budget or store.spec.budget, self.said.append)
        rounds = (mirrors() for _ in range(1))
        self.searcher = StudySearcher(
            store, self.space, jobs, proposals, self.runs, self.poll, rounds, ended, WorkerPoolMonitor(None), guard, self.track
        )
        self.asked = 0

    def poll(self):
        self.polls += 1

    def track(self, job, number, state, evidence):
        self.tracked.append((job.kind, number, state, evidence.get("model_utility"), evidence.get("reason")))

    def next(self):
        self.asked += 1
        found = self.searcher.suggest(str(self.asked))
        return TrialSpec.from_text(found["job"]) if isinstance(found, dict) else found

    def finish(self, name, evidence):
        self.searcher.on_trial_complete(str(name), {"metrics": TrialMetrics("tofu", evidence).as_text()})

    def kill(self, name):
        self.searcher.on_trial_complete(str(name), None, True)


@pytest.fixture
def harness(new_store):
    store = new_store()
    return lambda **arguments: Harness(store, **arguments)


def test_order_is_controls_given_points_proposals_and_then_mirrors(harness, made_up_evidence):
    study = harness(jobs=CONTROLS + GIVEN, proposals=2, mirrors=lambda: [WITH_TRIAL])
    jobs = []
    for number in range(1, 8):
        jobs.append(study.next())
        study.finish(number, made_up_evidence(jobs[-1]))
    assert [job.kind for job in jobs] == [
        "initial",
        "next_epoch",
        "alpha_zero",
        "alpha_zero",
        "search",
        "search",
        "random_direction",
    ]
    assert jobs[:4] == CONTROLS + GIVEN
    assert jobs[-1] == WITH_TRIAL
    assert study.next() == StudySearcher.FINISHED
    assert [(reason, again) for _, reason, again in study.ends] == [(None, False)] * 7
    assert study.store.counts()["complete"] == 4
    assert len(study.store.controls_frame()) == 3


def test_mirrors_wait_for_the_end_of_everything_else(harness, made_up_evidence):
    calls = []
    study = harness(jobs=GIVEN, mirrors=lambda: calls.append(1) or [WITH_TRIAL])
    first, second = study.next(), study.next()
    assert study.next() is None
    study.finish(2, made_up_evidence(second))
    assert study.next() is None
    assert calls == []
    study.finish(1, made_up_evidence(first))
    assert study.next() == WITH_TRIAL
    assert study.next() == StudySearcher.FINISHED or study.next() is None
    assert calls == [1]


def test_every_end_is_told_to_trackers(harness, made_up_evidence):
    study = harness(jobs=[*CONTROLS, *GIVEN])
    jobs = [study.next() for _ in range(3)]
    study.finish(1, made_up_evidence(jobs[0], model_utility=0.75))
    study.finish(3, made_up_evidence(jobs[2], model_utility=float("nan")))
    study.kill(2)
    known = [(kind, number, state) for kind, number, state, _, _ in study.tracked]
    assert known == [("initial", 0, "complete"), ("alpha_zero", 0, "failed"), ("next_epoch", 1, "failed")]
    assert study.tracked[0][3] == 0.75 and study.tracked[2][4]


def test_nothing_to_do_is_finished_at_once(harness):
    assert harness().next() == StudySearcher.FINISHED


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        (None, True, "died or was killed"),
        (None, False, "died or was killed"),
        ({"reason": "RuntimeError: no memory"}, False, "RuntimeError: no memory"),
        ({"metrics": TrialMetrics("tofu", {"model_utility": 0.5}).as_text()}, False, "not finite"),
        (
            {"metrics": TrialMetrics("tofu", {"log10_forget_quality": math.nan, "model_utility": 0.5}).as_text()},
            False,
            "not finite",
        ),
    ],
)
def test_a_job_without_full_evidence_ends_failed_with_a_reason(harness, result, error, said):
    study = harness(proposals=1)
    job = study.next()
    study.searcher.on_trial_complete("1", result, error)
    assert study.store.counts() == {"complete": 0, "pruned": 0, "failed": 1, "interrupted": 0, "running": 0}
    assert said in study.store.failures()[0]["reason"]
    assert study.ends[0][0] == job and said in study.ends[0][1]


def test_failed_proposals_count_so_that_a_study_ends(harness):
    study = harness(proposals=3)
    for number in range(1, 4):
        assert study.next().kind == "search"
        study.searcher.on_trial_complete(str(number), {"reason": "no memory"})
    assert study.next() == StudySearcher.FINISHED
    assert study.store.counts()["failed"] == 3


def test_a_failed_control_ends_in_the_controls_study(harness):
    study = harness(jobs=CONTROLS[:1])
    study.next()
    study.searcher.on_trial_complete("1", None, True)
    assert study.store.controls.trials[0].state == TrialState.FAIL
    assert study.store.study.trials == []


def test_evidence_that_cannot_be_read_stops_the_search_with_its_error(harness):
    study = harness(proposals=2)
    study.next()
    study.searcher.on_trial_complete("1", {})
    assert isinstance(study.searcher.error, KeyError) or study.store.counts()["failed"] == 1


def test_a_full_disk_stops_the_search_and_keeps_its_error(harness, made_up_evidence):
    study = harness(proposals=500)
    engine = study.store.storage.engine

    @event.listens_for(engine, "connect")
    def _no_more_room(connection, _):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    engine.dispose()
    for number in range(1, 500):
        job = study.next()
        if job == StudySearcher.FINISHED:
            break
        study.finish(number, made_up_evidence(job, note="x" * 2000))
    assert job == StudySearcher.FINISHED
    assert "full" in str(study.searcher.error.__cause__)


def test_tune_can_pickle_it_beside_its_results(harness, tmp_path):
    searcher = harness(proposals=1).searcher
    assert pickle.dumps(searcher)
    searcher.save(str(tmp_path / "note"))
    searcher.restore(str(tmp_path / "note"))


def test_a_job_travels_with_the_entries_of_its_base_run(harness):
    study = harness(jobs=[*CONTROLS, *GIVEN[:1]], proposals=1)
    jobs = [study.next() for _ in range(4)]
    assert [job.delta for job in jobs] == [(), THERE["npo"], THERE["npo"], THERE[jobs[3].base]]


def test_jobs_wait_for_their_base_run_and_for_nothing_else(harness):
    late = TrialSpec("alpha_zero", "grad_diff", 1, 0.0)
    study = harness(jobs=[late, *GIVEN], there={"npo": ("bb",)}, coming=["grad_diff"])
    assert [study.next(), study.next()] == GIVEN
    assert study.next() is None
    study.runs.publish("grad_diff", SimpleNamespace(keys=("cc",)))
    assert (study.next(), study.polls) == (late, 4)


def test_while_base_runs_are_missing_only_those_that_are_there_are_proposed_up_to_their_share(harness):
    study = harness(proposals=5, there={"npo": ("bb",)}, coming=["grad_diff"])
    first = [study.next() for _ in range(2)]
    assert [(job.kind, job.base) for job in first] == [("search", "npo")] * 2
    assert len({(job.epoch, job.alpha) for job in first}) == 2
    # Five trials on two base runs: two for the first before the other is there.
    assert study.next() is None
    assert study.searcher.has_work() is False
    study.runs.publish("grad_diff", SimpleNamespace(keys=("cc",)))
    rest = [study.next() for _ in range(3)]
    assert all(job.kind == "search" for job in rest)
    assert study.next() is None
    assert {trial.user_attrs.get("kind", "search") for trial in study.store.study.trials} == {"search"}


def test_what_was_searched_before_counts_for_the_share(harness, made_up_evidence):
    before = harness(proposals=2, there={"npo": ("bb",)}, coming=["grad_diff"])
    for number in (1, 2):
        before.finish(number, made_up_evidence(before.next()))
    again = harness(proposals=3, there={"npo": ("bb",)}, coming=["grad_diff"])
    assert again.next() is None


def test_without_a_base_run_that_failed_the_others_are_searched_evenly(harness, made_up_evidence):
    lost = [TrialSpec("next_epoch", "npo", 3, 0.0), *GIVEN]
    scores_front = []
    study = harness(jobs=lost, proposals=4, there={"grad_diff": ("aa",)}, mirrors=lambda: scores_front.append(1) or [])
    study.runs.fail("npo", "the loss is not finite")
    for number in range(1, 5):
        job = study.next()
        assert (job.kind, job.base) == ("search", "grad_diff")
        study.finish(number, made_up_evidence(job))
    assert study.next() == StudySearcher.FINISHED and study.searcher.done
    assert scores_front == [1]
    reason = "base run npo failed: the loss is not finite"
    assert study.ends[:3] == [(job, reason, False) for job in lost]
    assert [failure["reason"] for failure in study.store.failures()] == [reason] * 2
    assert [trial.user_attrs["reason"] for trial in study.store.controls.trials] == [reason]
    assert study.store.counts() == {"complete": 4, "pruned": 0, "failed": 2, "interrupted": 0, "running": 0}


def test_a_job_whose_worker_died_is_run_again_as_it_was_and_not_for_ever(harness, made_up_evidence):
    study = harness(proposals=1)
    jobs = []
    for number in range(1, TIMES_AGAIN + 2):
        jobs.append(study.next())
        study.kill(number)
    assert study.next() == StudySearcher.FINISHED
    assert len({(job.kind, job.base, job.epoch, job.alpha, job.delta) for job in jobs}) == 1
    assert jobs[0].kind == "search"
    assert [again for *_, again in study.ends] == [True] * TIMES_AGAIN + [False]
    assert [failure["reason"] for failure in study.store.failures()] == [DIED] * (TIMES_AGAIN + 1)
    params = [trial.params for trial in study.store.study.trials]
    assert params == [params[0]] * (TIMES_AGAIN + 1)


def test_a_job_run_again_comes_before_all_others_and_completes(harness, made_up_evidence):
    study = harness(jobs=[*CONTROLS[1:], *GIVEN], proposals=1)
    control, given = study.next(), study.next()
    study.kill(1)
    study.kill(2)
    assert {study.next(), study.next()} == {control, given}
    study.finish(3, made_up_evidence(given))
    study.finish(4, made_up_evidence(control))
    assert [study.next(), study.next().kind] == [GIVEN[1], "search"]
    assert list(study.store.trials_frame()["kind"]) == ["alpha_zero"]


def test_no_more_trials_at_once_than_base_runs_leave_room_for(harness, made_up_evidence):
    study = harness(jobs=[*CONTROLS, *GIVEN], slots=3, coming=["x", "y", "z"])
    job = study.next()
    assert study.next() is None
    study.runs.publish("x", SimpleNamespace(keys=("x",)))
    study.runs.publish("y", SimpleNamespace(keys=("y",)))
    assert study.next() is not None and study.next() is None
    study.runs.publish("z", SimpleNamespace(keys=("z",)))
    assert study.next() is not None and study.next() is None
    study.finish(1, made_up_evidence(job))
    assert study.next() is not None


def test_idle_workers_give_their_room_back(harness, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("search.execution.tune.time.monotonic", lambda: clock[0])
    study = harness(jobs=GIVEN, there={}, coming=["npo"])
    # Workers stay warm for a while, if no base run needs their room.
    assert study.next() is None
    clock[0] += IDLE_SECONDS / 2
    assert study.next() is None
    clock[0] += IDLE_SECONDS
    assert study.next() == StudySearcher.FINISHED
    assert not study.searcher.done
    study.runs.waiting.append("grad_diff")
    assert study.next() == StudySearcher.FINISHED
    study.runs.waiting.clear()
    study.runs.publish("npo", SimpleNamespace(keys=("bb",)))
    assert study.searcher.has_work()
    assert study.next() == GIVEN[0]


def test_tune_is_begun_anew_after_so_many_trials(harness, monkeypatch, made_up_evidence):
    monkeypatch.setattr("search.execution.tune.TRIALS_A_PART", 3)
    study = harness(proposals=4)
    jobs = [study.next() for _ in range(3)]
    for number, job in enumerate(jobs[:2], start=1):
        study.finish(number, made_up_evidence(job))
    assert study.next() is None  # what is at work is waited for before the part ends
    study.finish(3, made_up_evidence(jobs[2]))
    assert study.next() == StudySearcher.FINISHED
    assert not study.searcher.done and study.searcher.has_work()
    job = study.next()
    study.finish(study.asked, made_up_evidence(job))
    assert study.next() == StudySearcher.FINISHED
    assert study.searcher.done
    assert study.store.counts() == {"complete": 4, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}


def test_a_grid_is_handed_out_once_each_and_less_of_it_without_a_base_run(new_store):
    store = new_store(search={"sampler": "grid", "trials": 12})
    points = [TrialSpec("search", **point.params) for point in store.spec.grid_points()]
    study = Harness(store, jobs=points, there={"npo": ("bb",)})
    study.runs.fail("grad_diff", "no memory")
    jobs = [study.next() for _ in range(6)]
    assert jobs == [job for job in points if job.base == "npo"]
    assert study.next() is None
    assert study.store.failures() == []


def test_a_trial_may_end_before_its_worker_is_let_go(harness, made_up_evidence):
    study = harness(proposals=2, slots=1)
    job = study.next()
    study.searcher.on_trial_result("1", {"metrics": TrialMetrics("tofu", made_up_evidence(job)).as_text()})
    assert study.store.counts()["complete"] == 1
    study.searcher.on_trial_result("1", {})
    # Its room is taken as long as its worker is held.
    assert study.searcher.suggest("2") is None
    assert study.store.counts()["running"] == 0
    study.searcher.on_trial_complete("1", {})
    assert study.store.counts() == {"complete": 1, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert len(study.ends) == 1
    assert isinstance(study.searcher.suggest("3"), dict)


def test_hours_that_are_over_end_all_but_what_is_at_work(harness):
    study = harness(jobs=CONTROLS + GIVEN, proposals=5, mirrors=lambda: [WITH_TRIAL], budget=Budget(hours=1e-12))
    study.runs.waiting.append("late")
    assert study.next() == StudySearcher.FINISHED
    assert study.searcher.done
    assert study.runs.waiting == []
    assert study.store.study.trials == study.store.controls.trials == []
    assert "budget.hours" in study.said[0] and len(study.said) == 1


def test_a_plateau_ends_the_search_and_the_front_is_still_mirrored(harness, made_up_evidence):
    budget = Budget(plateau=Plateau(trials=5, gain=0.01))
    study = harness(jobs=GIVEN[:1], proposals=50, mirrors=lambda: [WITH_TRIAL], budget=budget)
    kinds = []
    for number in range(1, 100):
        job = study.next()
        if job == StudySearcher.FINISHED:
            break
        kinds.append(job.kind)
        # The hypervolume grows up to the third search trial.
        study.finish(number, made_up_evidence(job, model_utility=0.5 + 0.1 * min(3, kinds.count("search"))))
    assert kinds == ["alpha_zero", *["search"] * 8, "random_direction"]
    assert "grew by 0.00% over the last 5 trials" in study.said[0]


def test_no_plateau_before_all_base_runs_are_there(harness, made_up_evidence):
    budget = Budget(plateau=Plateau(trials=5, gain=0.01))
    grid = [TrialSpec("search", "npo", 1, 0.1 * step) for step in range(1, 20)]
    study = harness(jobs=[*grid, CONTROLS[0]], there={"npo": ("bb",)}, coming=["grad_diff"], budget=budget)
    for number in range(1, 9):
        study.finish(number, made_up_evidence(study.next()))
    assert study.said == []
    study.runs.publish("grad_diff", SimpleNamespace(keys=("aa",)))
    # Points of the grid are given up, the control is not.
    assert study.next() == CONTROLS[0]
    assert "budget.plateau" in study.said[0]


def test_failures_end_the_study_with_their_reasons(harness):
    study = harness(proposals=50)
    for number in range(1, 100):
        if study.next() == StudySearcher.FINISHED:
            break
        study.searcher.on_trial_complete(str(number), {"reason": "RuntimeError: no memory" if number % 3 else "worse"})
    assert study.store.counts()["failed"] == 10
    assert study.said == [
        "no more trials are started: 10 of the last 10 trials failed (budget.failure_rate: 0.5): "
        "7 x RuntimeError: no memory; 3 x worse"
    ]


def test_a_trial_beyond_its_time_is_not_run_again(harness, monkeypatch):
    study = harness(proposals=1)
    study.next()
    monkeypatch.setattr(WorkerPoolMonitor, "death", lambda self, trial_id: worker_failure("", 61.0, 1.0))
    study.kill(1)
    assert study.ends[0][1:] == ("ran past its time limit of 1 minutes (budget.trial_minutes)", False)
    assert study.next() == StudySearcher.FINISHED


def without_memory(self, trial_id):
    return worker_failure("the node running low on memory. Memory was 9.0GB used / 9.1GB limit", 3.0, None)


def test_a_machine_without_memory_ends_the_run_with_what_to_lower(harness, monkeypatch):
    study = harness(proposals=50)
    monkeypatch.setattr(WorkerPoolMonitor, "death", without_memory)
    deaths = 0
    while study.next() != StudySearcher.FINISHED:
        deaths += 1
        study.kill(deaths)
    assert deaths == 2 * (1 + TIMES_AGAIN)
    assert study.store.counts() == {"complete": 0, "pruned": 0, "failed": deaths, "interrupted": 0, "running": 0}
    (said,) = study.said
    assert "2 trials in a row found no memory" in said and "9.0GB of 9.1GB in use" in said
    assert "lower resources.max_concurrent, scoring.batch_size" in said
    assert study.guard.stop().gave_up


def test_one_trial_without_memory_ends_no_run(harness, monkeypatch, made_up_evidence):
    study = harness(proposals=3)
    monkeypatch.setattr(WorkerPoolMonitor, "death", without_memory)
    number = 0
    for job_dies in (True, False, True):
        for _ in range(1 + TIMES_AGAIN if job_dies else 1):
            number += 1
            job = study.next()
            study.kill(number) if job_dies else study.finish(number, made_up_evidence(job))
    assert study.next() == StudySearcher.FINISHED
    assert study.guard.stop() is None
    assert study.store.counts()["complete"] == 1


def test_whatever_tune_raises_is_told_in_a_sentence(harness, monkeypatch, tmp_path):
    from ray import tune

    study = harness(proposals=3)
    study.next()

    def fit(self):
        raise tune.TuneError("Traceback (most recent call last):\n  File ...\nValueError: no such event")

    monkeypatch.setattr(tune.Tuner, "fit", fit)
    trainable = type("Nothing", (tune.Trainable,), {})
    arguments = (trainable, study.searcher, WorkerPoolMonitor(None), 1, tmp_path / "ray", "tune-1")
    with pytest.raises(UserError, match=r"ended the search \(ValueError: no such event; .*the same command goes on"):
        run_trials(*arguments)
    assert "most recent call" in (tmp_path / "errors" / "tune-1.txt").read_text()
    # An error of the searcher's own is its caller's to raise, whatever Tune made of it.
    study.searcher.error = OSError("disk full")
    run_trials(*arguments)
