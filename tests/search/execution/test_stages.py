"""The time of a run goes to the stage in which it was spent."""

import time

import pytest

from search.execution.study_run import StageProgress
from search.problem.trial import TrialSpec
from search.report.progress import Bars

GIVEN, SEARCHED = TrialSpec("alpha_zero", "npo", 1, 0.0), TrialSpec("search", "npo", 1, 0.5)


class Store:
    def __init__(self):
        self.seconds = {}

    def add_seconds(self, stage, seconds):
        self.seconds[stage] = seconds


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are added to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_what_a_trial_did_not_take_is_training_while_base_runs_are_missing(clock):
    store = Store()
    progress = StageProgress(Bars(quiet=True), store, [GIVEN], 1)
    progress.trains = True
    clock[0] += 32
    progress.ended(GIVEN, None, False, 2.0)
    clock[0] += 5  # no base run is missing any more: a worker starts
    progress.ended(GIVEN, None, False, 1.0)
    progress.trains = True
    clock[0] += 1
    progress.ended(SEARCHED, None, False, 4.0)  # others ended while it ran
    progress.trains = True
    clock[0] += 3
    progress.ended(SEARCHED, "its worker died", True)
    clock[0] += 0.5
    progress.close()
    assert store.seconds == {"training": 30.0, "given": 7.0, "trials": 4.5}


def test_only_proposals_count_as_searched(clock, capsys):
    store, control = Store(), TrialSpec("matched_scale", "npo", 1, 0.5, of_trial=3)
    progress = StageProgress(Bars(), store, [GIVEN], 2)
    for job in (GIVEN, SEARCHED, SEARCHED):
        progress.ended(job, None, False, 1.0)
    progress.more([control])
    progress.ended(control, None, False, 1.0)
    said = capsys.readouterr().err
    assert "searching: (method, epoch, alpha): 2 of 2" in said and "scoring: given points, controls: 2 of 2" in said
