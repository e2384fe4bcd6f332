"""What a study has used and whether it may go on, over several runs of it."""

import json

import pytest

from search.execution.budget import BudgetMonitor, Stop
from search.problem.trial import TrialSpec
from search.spec.runtime import BaseRunResources, Budget, Plateau, TrialResources

PLATEAU = Budget(plateau=Plateau(trials=5, gain=0.01))


def add(store, made_up_evidence, kind, **numbers):
    """A complete trial in the study, as the searcher would write it."""
    number, job = (
        store.ask_point(SPACE(store), {"base": "npo", "epoch": 1, "alpha": 0.0}, kind)
        if kind in ("alpha_zero", "search")
        else (store.ask_control(TrialSpec(kind)), TrialSpec(kind))
    )
    evidence = made_up_evidence(job, **numbers)
    assert store.complete(job, number, evidence) is None
    return job, evidence


def SPACE(store):

    return store.spec.search_space()


def test_hours_are_those_of_all_runs_and_outlive_them(new_store, tmp_path):
    store = new_store()
    guard = BudgetMonitor(store, Budget(), print)
    guard.held(1800.0, TrialResources(cpus=2, gpus=0.5))
    guard.held(3600.0, BaseRunResources(cpus=1, gpus=1, processes=4))
    guard.close()
    store.close()
    kept = json.loads((tmp_path / "out" / "study.json").read_text())["usage"]
    assert (kept["cpu_hours"], kept["gpu_hours"]) == (5.0, 4.25)
    assert kept["hours"] >= 0.0
    again = new_store()
    said = []
    guard = BudgetMonitor(again, Budget(gpu_hours=4.5), said.append)
    assert guard.stop() is None
    guard.held(3600.0, TrialResources(gpus=1))
    assert guard.stop() == Stop("gpu_hours", "it held GPUs for 5.25 GPU-hours of 4.5 (budget.gpu_hours)")
    assert guard.stop().scores_front is guard.stop().gave_up is False
    assert len(said) == 1


def test_without_gpus_their_budget_is_never_used_up(new_store):
    guard = BudgetMonitor(new_store(), Budget(gpu_hours=1e-9), print)
    guard.held(1e9, TrialResources())
    assert guard.stop() is None


def test_the_record_is_not_written_with_every_trial(new_store, monkeypatch):
    store = new_store()
    writes = []
    monkeypatch.setattr(store, "save_record", lambda: writes.append(1))
    guard = BudgetMonitor(store, PLATEAU, print)
    for _ in range(1000):
        guard.held(0.001, TrialResources())
        guard.stop()
    assert len(writes) <= 2
    guard.close()
    assert writes and store.record.usage["cpu_hours"] > 0


def test_failures_of_an_earlier_run_are_forgiven(new_store):
    store = new_store()
    guard = BudgetMonitor(store, Budget(failure_rate=0.5), print)
    for _ in range(9):
        guard.failed("no room")
    guard.failed("died", again=True)
    assert guard.stop() is None
    guard.failed("no room")
    assert guard.stop().gave_up
    assert BudgetMonitor(store, Budget(failure_rate=0.5), print).stop() is None


def test_growth_goes_on_where_the_last_run_left_it(new_store, made_up_evidence):
    store = new_store()
    said = []
    first = BudgetMonitor(store, PLATEAU, said.append)
    for kind, utility in (("initial", 0.4), ("alpha_zero", 0.5), *[("search", 0.5)] * 3):
        first.scored(*add(store, made_up_evidence, kind, model_utility=utility))
    assert first.stop() is None
    second = BudgetMonitor(store, PLATEAU, said.append)
    assert list(second._volumes) == pytest.approx(list(first._volumes))
    for _ in range(2):
        second.scored(*add(store, made_up_evidence, "search", model_utility=0.45))
    assert second.stop().budget == "plateau"
    # The next run stops where this one did, and more patience goes on.
    assert BudgetMonitor(store, PLATEAU, said.append).stop().scores_front
    assert BudgetMonitor(store, Budget(plateau=Plateau(trials=6)), said.append).stop() is None
    assert len(said) == 2


def test_a_noise_ceiling_that_comes_down_is_heeded(new_store, made_up_evidence):
    store = new_store(hypervolume={"forget_quality_cap": None})
    guard = BudgetMonitor(store, PLATEAU, print)
    guard.scored(*add(store, made_up_evidence, "search", log10_forget_quality=-0.6))
    before = guard._volumes[-1]
    guard.scored(*add(store, made_up_evidence, "other_retain", log10_forget_quality=-2.0))
    assert store.noise_ceiling(store.controls_frame()) == pytest.approx(0.01)
    corner = store.reference_point()["log10_forget_quality"]
    assert guard._volumes[-1] == pytest.approx(before * (-2.0 - corner) / (-0.6 - corner))
