"""The searcher between Ray Tune and the study: which job comes when, and how each ends."""

import json
import pickle

import pytest
from optuna.trial import TrialState
from sqlalchemy import event

from search.evaluator import Job
from search.ray_searcher import StudySearcher
from search.samplers import make_sampler
from search.space import Point, distributions
from search.spec import parse_study

GIVEN = [Point("npo", 1, 0.0), Point("npo", 2, 0.0)]
CONTROLS = [Job("initial"), Job("next_epoch", "npo", 3, 0.0)]
MIRROR = Job("random_direction", "npo", 1, 0.5, of_trial=3)


class Harness:
    """A searcher on a real study, and the ends it reported."""

    def __init__(self, store, controls=(), given=(), proposals=0, mirrors=list):
        self.store = store
        self.ends = []
        store.use_sampler(make_sampler("random", 0))
        space = distributions(parse_study(store.record["spec"]))
        ended = lambda job, reason: self.ends.append((job, reason))  # noqa: E731
        self.searcher = StudySearcher(store, space, controls, given, proposals, mirrors, ended)
        self.asked = 0

    def next(self):
        self.asked += 1
        found = self.searcher.suggest(str(self.asked))
        return Job(**found["job"]) if isinstance(found, dict) else found

    def finish(self, name, evidence):
        self.searcher.on_trial_complete(str(name), {"evidence": json.dumps(evidence)})


@pytest.fixture
def harness(new_store):
    store = new_store()
    return lambda **arguments: Harness(store, **arguments)


def test_order_is_controls_given_points_proposals_and_then_mirrors(harness, made_up_evidence):
    study = harness(controls=CONTROLS, given=GIVEN, proposals=2, mirrors=lambda: [MIRROR])
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
    assert jobs[:2] == CONTROLS
    assert [Point(job.base, job.epoch, job.alpha) for job in jobs[2:4]] == GIVEN
    assert jobs[-1] == MIRROR
    assert study.next() == StudySearcher.FINISHED
    assert [reason for _, reason in study.ends] == [None] * 7
    assert study.store.counts()["complete"] == 4
    assert len(study.store.controls_frame()) == 3


def test_mirrors_wait_for_the_end_of_everything_else(harness, made_up_evidence):
    calls = []
    study = harness(given=GIVEN, mirrors=lambda: calls.append(1) or [MIRROR])
    first, second = study.next(), study.next()
    assert study.next() is None
    study.finish(2, made_up_evidence(second))
    assert study.next() is None
    assert calls == []
    study.finish(1, made_up_evidence(first))
    assert study.next() == MIRROR
    assert study.next() == StudySearcher.FINISHED or study.next() is None
    assert calls == [1]


def test_nothing_to_do_is_finished_at_once(harness):
    assert harness().next() == StudySearcher.FINISHED


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        (None, True, "died or was killed"),
        (None, False, "died or was killed"),
        ({"reason": "RuntimeError: no memory"}, False, "RuntimeError: no memory"),
        ({"evidence": json.dumps({"model_utility": 0.5})}, False, "not finite"),
        ({"evidence": '{"log10_forget_quality": NaN, "model_utility": 0.5}'}, False, "not finite"),
    ],
)
def test_a_job_without_full_evidence_ends_failed_with_a_reason(harness, result, error, said):
    study = harness(proposals=1)
    job = study.next()
    study.searcher.on_trial_complete("1", result, error)
    assert study.store.counts() == {"complete": 0, "pruned": 0, "failed": 1, "running": 0}
    assert said in study.store.failures()[0]["reason"]
    assert study.ends[0][0] == job and said in study.ends[0][1]


def test_failed_proposals_count_so_that_a_study_ends(harness):
    study = harness(proposals=3)
    for number in range(1, 4):
        assert study.next().kind == "search"
        study.searcher.on_trial_complete(str(number), None, True)
    assert study.next() == StudySearcher.FINISHED
    assert study.store.counts()["failed"] == 3


def test_a_failed_control_ends_in_the_controls_study(harness):
    study = harness(controls=CONTROLS[:1])
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
