"""Trials that are not scored to their end: the bounds, the fronts without them, and what the study keeps of them."""

import json
import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from search.evaluation.evaluator import Evaluator
from search.evaluation.metrics import TrialMetrics
from search.evaluation.pruning import MOST, Rivals, bounds, dominating_rival, prunes
from search.execution.base_runs import BaseRuns
from search.execution.budget import BudgetMonitor
from search.execution.capacity import ClusterCapacity
from search.execution.study_run import _done_jobs
from search.execution.tune import StudySearcher
from search.execution.worker_pool import WorkerPoolMonitor
from search.execution.workers import pack_arrays
from search.problem.objectives import FORGET_QUALITY, MODEL_UTILITY, RELATED_FORGET_QUALITY, composites
from search.problem.pareto import hypervolume, non_dominated
from search.problem.space import Point
from search.problem.trial import TrialSpec, identity
from search.report.html import write_report
from search.results.status import status_of
from search.results.study_result import StudyResult
from search.samplers.registry import SAMPLERS
from search.spec.runtime import Budget, Plateau
from search.store.checks import item_scores
from uipe_core.metrics.collapse import collapse_reason
from uipe_core.metrics.composites import composite, composite_bound
from uipe_core.metrics.definitions import DEFINITIONS
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate
from uipe_core.scoring.scorer import LOSS_STAGES

TWO = (FORGET_QUALITY.name, MODEL_UTILITY.name)
THREE = (*TWO, RELATED_FORGET_QUALITY.name)
BY_NAME = {each.name: each for each in (FORGET_QUALITY, MODEL_UTILITY, RELATED_FORGET_QUALITY)}
ITEMS, CHOICES = 3, 2
# Few different losses, so that numbers tie; some beyond what exp can hold, some of a collapsed model.
LOSSES = np.array([0.0, 1e-3, 0.3, 1.0, 3.0, 25.0, 60.0, 800.0])
STAGES = {**LOSS_STAGES, "others": ("related",)}


def random_report(draw):
    """Scores of a made-up model, from healthy to collapsed."""
    counts = np.ones(ITEMS, dtype=np.int64)

    def scores():
        worst = draw.integers(2, len(LOSSES) + 1)
        losses = [draw.choice(LOSSES[:worst], shape) for shape in (ITEMS, ITEMS, (ITEMS, CHOICES))]
        rouge = draw.choice([0.0, 0.5, 1.0], ITEMS)
        one = SetScores(losses[0], counts, losses[1], counts, losses[2], np.ones((ITEMS, CHOICES), dtype=np.int64))
        known = draw.choice([0.0, 0.5, 1.0], (2, ITEMS))
        one = replace(one, exact_memorization=known.max(axis=0), extraction_strength=known.min(axis=0))
        return replace(one, rouge_l_recall=rouge, rouge_1_recall=rouge, item_hash="same")

    return ScoreReport({name: scores() for names in STAGES.values() for name in names})


def in_part(report):
    """The report after each stage of losses."""
    known = {}
    for stage, names in STAGES.items():
        known |= {name: replace(report.sets[name], rouge_l_recall=None, rouge_1_recall=None) for name in names}
        yield stage, ScoreReport(dict(known))


def objectives_of(report, reference, definition, names):
    metrics = evaluate(report, reference, definition)
    known = {
        FORGET_QUALITY.name: metrics.forget_quality.log10_p,
        MODEL_UTILITY.name: metrics.model_utility,
        RELATED_FORGET_QUALITY.name: metrics.related["related"].log10_p,
    }
    return {name: known[name] for name in names}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(DEFINITIONS)))
def test_no_objective_is_ever_above_its_bound(seed, definition):
    draw = np.random.default_rng(seed)
    reference, report = random_report(draw), random_report(draw)
    values = objectives_of(report, reference, definition, THREE)
    before = dict.fromkeys(THREE, np.inf)
    for _, part in in_part(report):
        bound = bounds(part, reference, definition, BY_NAME.values())
        assert all(values[name] <= bound[name] <= before[name] * (1 + 1e-8 * np.sign(before[name])) for name in THREE)
        before = bound
    assert bound[FORGET_QUALITY.name] == values[FORGET_QUALITY.name]
    assert bound[RELATED_FORGET_QUALITY.name] == values[RELATED_FORGET_QUALITY.name]
    assert values[MODEL_UTILITY.name] == pytest.approx(composite_bound(report, MODEL_UTILITY.components, definition), rel=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(DEFINITIONS)))
def test_no_composite_is_ever_above_its_bound(seed, definition):
    draw = np.random.default_rng(seed)
    report = random_report(draw)
    known = composites(report.sets)
    assert {"model_utility", "memorization_score", "retain_utility"} <= {each.name for each in known}
    values = {each.name: composite(report, each.components, definition) for each in known}
    before = dict.fromkeys(values, np.inf)
    for _, part in in_part(report):
        bound = bounds(part, None, definition, known)
        assert all(values[name] <= bound[name] <= before[name] * (1 + 1e-8) for name in values)
        before = bound


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_nothing_but_what_is_unknown_counts_as_the_best_it_can_be(definition):
    assert composite_bound(ScoreReport({}), MODEL_UTILITY.components, definition) == 1.0
    ones = np.ones(ITEMS)
    perfect = SetScores(0 * ones, ones, 0 * ones, ones, 800.0 * np.ones((ITEMS, CHOICES)), np.ones((ITEMS, CHOICES)))
    broken = replace(perfect, answer_loss=np.full(ITEMS, np.log(2.0)))
    assert composite_bound(ScoreReport({"retain": perfect}), MODEL_UTILITY.components, definition) == pytest.approx(
        1.0, abs=1e-9
    )
    assert composite_bound(ScoreReport({"retain": broken}), MODEL_UTILITY.components, definition) == pytest.approx(
        9 / (8 + 2), abs=1e-8
    )


def fronts(rows, names):
    """The fronts that results are read from, by the numbers of their trials, with their hypervolumes."""
    found = []
    for chosen in (rows, [row for row in rows if row["collapsed"] is None], [row for row in rows if row["alpha"] >= 0]):
        points = np.array([[row[name] for name in names] for row in chosen]).reshape(-1, len(names))
        front = [row["trial"] for row, on_front in zip(chosen, non_dominated(points), strict=True) if on_front]
        found.append((front, hypervolume(points, np.full(len(names), -300.0)) if len(points) else 0.0))
    return found


def searched(seed, trials, at_once, definition, names):
    """A search of made-up models with and without pruning: rows of the trials that are complete in either."""
    draw = np.random.default_rng(seed)
    reference, rivals = random_report(draw), Rivals(names)
    everything, complete, handed_out = [], [], []
    for number in range(trials):
        report = random_report(draw)
        values = objectives_of(report, reference, definition, names)
        alpha = float(draw.choice([-0.5, 0.0, 0.5]))
        row = {"trial": number, "alpha": alpha, "collapsed": collapse_reason(report), **values}
        everything.append(row)
        # A trial knows the rivals of the moment at which it was handed out, when some were still at work.
        handed_out.append((row, report, rivals.of(alpha) if alpha else ()))
        if len(handed_out) == at_once or number == trials - 1:
            for row, report, known in handed_out:
                for stage, part in in_part(report):
                    if dominating_rival(stage, bounds(part, reference, definition, map(BY_NAME.get, names)), known) is not None:
                        break
                else:
                    complete.append(row)
                    rivals.add(row["trial"], row)
            handed_out = []
    return everything, complete


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 4), st.sampled_from(sorted(DEFINITIONS)), st.booleans())
def test_the_fronts_with_pruning_are_those_without(seed, trials, at_once, definition, third):
    names = THREE if third else TWO
    everything, complete = searched(seed, trials, at_once, definition, names)
    for (front, volume), (same, same_volume) in zip(fronts(everything, names), fronts(complete, names), strict=True):
        assert front == same
        assert volume == pytest.approx(same_volume, rel=1e-12)


def test_searches_of_made_up_models_do_prune():
    pruned = 0
    for seed in range(5):
        everything, complete = searched(seed, 40, 2, "tofu", TWO)
        pruned += len(everything) - len(complete)
    assert pruned > 40


def evidence_of(trial, quality, utility, alpha=-0.5, collapsed=None):
    return trial, {TWO[0]: quality, TWO[1]: utility, "alpha": alpha, "collapsed": collapsed}


def test_a_rival_must_be_on_every_front_that_the_trial_may_be_on():
    rivals = Rivals(TWO)
    rivals.add(*evidence_of(1, -1.0, 0.9, collapsed="mean loss of 30 nats per token on retain (limit 20)"))
    assert rivals.of(-0.5) == rivals.of(0.5) == ()
    rivals.add(*evidence_of(2, -2.0, 0.6, alpha=-0.5))
    assert [rival["trial"] for rival in rivals.of(-0.5)] == [2]
    assert rivals.of(0.0) == rivals.of(0.5) == ()
    rivals.add(*evidence_of(3, -3.0, 0.5, alpha=0.5))
    assert [rival["trial"] for rival in rivals.of(-0.5)] == [2]
    assert [rival["trial"] for rival in rivals.of(0.5)] == [3]
    rivals.add(*evidence_of(4, -2.0, 0.7, alpha=0.0, collapsed=float("nan")))
    assert [rival["trial"] for rival in rivals.of(-0.5)] == [rival["trial"] for rival in rivals.of(0.5)] == [4]


@given(st.lists(st.tuples(st.integers(-4, 0), st.integers(0, 4), st.booleans()), max_size=30))
def test_rivals_are_the_fronts_by_brute_force(points):
    rivals = Rivals(TWO)
    for number, (quality, utility, walked_on) in enumerate(points):
        rivals.add(*evidence_of(number, quality, utility, alpha=0.5 if walked_on else -0.5))

    def dominated(own, there):
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for _, other in there)

    def front(there):
        return {number for number, own in there if not dominated(own, there)}

    everything = [(number, point[:2]) for number, point in enumerate(points)]
    assert {rival["trial"] for rival in rivals.of(-0.5)} == front(everything)
    assert {rival["trial"] for rival in rivals.of(0.0)} == front([each for each in everything if points[each[0]][2]])


def test_of_a_large_front_some_travel_its_ends_among_them():
    rivals = Rivals(TWO)
    for number in range(1000):
        rivals.add(*evidence_of(number, -number / 100, number / 1000))
    some = [rival["trial"] for rival in rivals.of(-0.5)]
    assert len(set(some)) == MOST
    assert (some[0], some[-1]) == (999, 0)
    gaps = {earlier - later for earlier, later in pairwise(some)}
    assert gaps <= {10, 11}


def test_a_job_travels_as_text():
    job = TrialSpec("search", "npo", 2, 0.1 + 0.2, delta=("a", "b"), rivals=(rival(-1.0, 0.1 + 0.7),))
    again = TrialSpec.from_text(job.as_text())
    assert again == job
    assert (again.alpha, again.delta, again.rivals) == (job.alpha, job.delta, job.rivals)
    assert TrialSpec.from_text(TrialSpec("initial", model="initial").as_text()) == TrialSpec("initial", model="initial")


def test_equal_numbers_dominate_nothing():
    rivals = Rivals(TWO)
    rivals.add(*evidence_of(1, -1.0, 0.5))
    rivals.add(*evidence_of(2, -1.0, 0.5))
    known = rivals.of(-0.5)
    assert len(known) == 2
    assert dominating_rival("retain", dict(zip(TWO, (-1.0, 0.5), strict=True)), known) is None
    assert dominating_rival("retain", dict(zip(TWO, (-9.0, math.inf), strict=True)), known) is None
    found = dominating_rival("retain", dict(zip(TWO, (-1.0, 0.4), strict=True)), known)
    assert found == {
        "stage": "retain",
        "bound": {TWO[0]: -1.0, TWO[1]: 0.4},
        "trial": 1,
        "values": {TWO[0]: -1.0, TWO[1]: 0.5},
    }


# What a worker returns.


@pytest.fixture(scope="module")
def evaluator(study_context):
    return Evaluator(study_context)


def rival(quality, utility):
    return {"trial": 7, "values": {TWO[0]: quality, TWO[1]: utility}}


def evaluated(evaluator, job):
    """What a trial carries, and the scores behind it."""
    metrics, report = evaluator.evaluate(job)
    return {**identity(job, {"grad_diff": "grad_diff", "npo": "npo"}), **metrics.as_dict()}, report


def numbers(evidence):
    return {key: value for key, value in evidence.items() if not key.startswith("seconds")}


def test_a_worker_stops_where_a_rival_dominates_what_may_come(evaluator, with_delta):
    job = with_delta(TrialSpec("search", "grad_diff", 2, 1.0))
    whole, report = evaluated(evaluator, job)
    # Nobody has a utility above 1, so only a perfect model ends a trial after its forget set.
    first, part = evaluated(evaluator, replace(job, rivals=(rival(-100.0, 1.0), rival(0.0, 1.0))))
    assert (first["pruned"]["stage"], list(part.sets)) == ("forget", ["forget"])
    assert first["pruned"]["bound"] == {TWO[0]: whole[TWO[0]], TWO[1]: 1.0}
    assert first["pruned"]["values"] == rival(0.0, 1.0)["values"]
    assert not set(first) & {*TWO, "collapsed", "flagged"}
    for key in ("kind", "base", "method", "epoch", "alpha", "walk", "definition", "update_norm", "dtype"):
        assert first[key] == whole[key]
    json.dumps(first, allow_nan=False)
    most = composite_bound(without_rouge(report), MODEL_UTILITY.components, "tofu")
    later, part = evaluated(
        evaluator,
        replace(job, rivals=(rival(0.0, most + 1e-6),)),
    )
    assert later["pruned"]["stage"] == "retain"
    assert whole[TWO[1]] <= later["pruned"]["bound"][TWO[1]] < 1.0
    assert all(np.array_equal(values, report.arrays()[key]) for key, values in part.arrays().items())
    # A rival that is no better changes nothing.
    same, _ = evaluated(evaluator, replace(job, rivals=(rival(whole[TWO[0]], whole[TWO[1]]),)))
    assert numbers(same) == numbers(whole)


def without_rouge(report):
    return ScoreReport({name: replace(scores, rouge_l_recall=None) for name, scores in report.sets.items()})


# What the study keeps.


def reportable(store):
    store.record.note_base_run("npo", "0", [{"epoch": 1, "seconds": 1.0}])
    store.save_record()
    return StudyResult.of(store)


class Driver:
    """A searcher whose jobs a function decides: a search of the tiny study without Ray."""

    def __init__(self, store, jobs=(), proposals=0, budget=None):
        self.store = store
        store.use_sampler(SAMPLERS["random"].make(0))
        runs = BaseRuns(ClusterCapacity(9, 1, 9), {"grad_diff": ("aa",), "npo": ("bb",)}, training=set())
        self.ends = []
        self.guard = BudgetMonitor(store, budget or Budget(), lambda words: None)
        self.searcher = StudySearcher(
            store,
            store.spec.search_space(),
            jobs,
            proposals,
            runs,
            lambda: None,
            list,
            lambda *end: self.ends.append(end),
            WorkerPoolMonitor(None),
            self.guard,
        )
        self.asked = 0

    def work(self, evaluate):
        while isinstance(found := self.searcher.suggest(str(self.asked)), dict):
            evidence, items = evaluate(TrialSpec.from_text(found["job"]))
            own = {part.name for part in fields(TrialMetrics)}
            numbers = {name: value for name, value in evidence.items() if name not in own}
            known = {name: value for name, value in evidence.items() if name in own}
            metrics = TrialMetrics(**{"definition": "tofu", **known}, numbers=numbers)
            result = {"metrics": metrics.as_text()} | ({} if items is None else {"items": pack_arrays(items)})
            self.searcher.on_trial_complete(str(self.asked), result)
            assert self.searcher.error is None
            self.asked += 1


GIVEN = [TrialSpec("alpha_zero", base, epoch, 0.0) for base in ("grad_diff", "npo") for epoch in (1, 2)]
BOUND = {"stage": "general", "bound": {TWO[0]: -6.0, TWO[1]: 0.4}, "trial": 0, "values": {TWO[0]: -5.0, TWO[1]: 0.5}}


def pruned_evidence(job):
    facts = {"kind": job.kind, "base": job.base, "method": job.base, "epoch": job.epoch, "alpha": job.alpha}
    walk = Point(job.base, job.epoch, job.alpha).walk
    return {**facts, "walk": walk, "seconds": 0.1, "seconds_by_stage": {"forget": 0.05, "general": 0.05}, "pruned": BOUND}


@pytest.fixture
def half_pruned(new_store, made_up_evidence):
    """A study of four given trials and six of the search, every other one of which ended early."""
    store = new_store(search={"prune": True, "trials": 6})
    seen = []

    def decide(job):
        seen.append(job)
        if job.kind == "search" and len(seen) % 2:
            return pruned_evidence(job), {"forget/answer_loss": np.ones(2)}
        stages = {"forget": 0.05, "general": 0.05, "retain": 0.1, "generation": 0.3}
        return made_up_evidence(job, seconds_by_stage=stages), {"forget/answer_loss": np.ones(2)}

    driver = Driver(store, GIVEN, 6)
    driver.work(decide)
    return store, seen, driver


def test_a_pruned_trial_is_done_without_values_and_keeps_its_certificate(half_pruned):
    store, seen, driver = half_pruned
    assert store.counts() == {"complete": 7, "pruned": 3, "failed": 0, "interrupted": 0, "running": 0}
    pruned = list(store.trials((TrialState.PRUNED,)))
    assert all(trial.values is None and trial.user_attrs["pruned"] == BOUND for trial in pruned)
    assert all(list(store.items(trial.number)) == ["forget/answer_loss"] for trial in pruned)
    assert [job.rivals for job in seen if job.kind != "search"] == [()] * 4
    # Those of alpha >= 0 are held against trials of alpha >= 0; the given ones are.
    assert all({each["trial"] for each in job.rivals} >= {0, 1, 2, 3} for job in seen if job.kind == "search")
    assert len(driver.ends) == 10
    assert all(reason is None for _, reason, _ in driver.ends)
    # Nothing of it is asked for again, and it counts as tried.
    assert {TrialSpec(job.kind, job.base, job.epoch, job.alpha) for job in seen} == _done_jobs(store)
    assert sum(driver.searcher._proposed.values()) == 6
    status = status_of(store)
    assert (status["state"], status["trials"]["done"], status["trials"]["pruned"]) == ("finished", 10, 3)


def test_results_say_what_was_pruned_and_saved(half_pruned):
    result = reportable(half_pruned[0])
    assert len(result.trials) == 7
    assert list(result.pruned["dominated_by"]) == [0, 0, 0]
    assert list(result.pruned[f"{TWO[1]}_bound"]) == [0.4] * 3
    saved = result.summary()["saved"]
    assert saved == {"trials": 3, "stages": {"general": 3}, "seconds": pytest.approx(1.2), "share": pytest.approx(0.8)}
    page = write_report(result).read_text()
    assert "3 trials were not scored to their end (3 after general)" in page
    assert "<h3>Pruned trials</h3>" in page
    assert "search trials are done" not in page  # nothing is missing


def test_without_pruning_no_trial_has_rivals(new_store, made_up_evidence):
    store = new_store(search={"prune": False, "trials": 3})
    seen = []
    Driver(store, GIVEN, 3).work(lambda job: (seen.append(job), (made_up_evidence(job), None))[1])
    assert [job.rivals for job in seen] == [()] * 7
    result = reportable(store)
    assert result.pruned.empty
    assert result.saved is None
    assert "not scored to their end" not in write_report(result).read_text()


def test_pruning_suits_the_sampler_unless_the_study_says_so(new_store):
    asked = {(sampler, prune) for sampler in ("tpe", "random", "grid", "gp", "nsga2") for prune in (None, True, False)}
    spec = new_store().spec

    def ends_early(sampler, prune):
        return prunes(spec.model_copy(update={"search": spec.search.model_copy(update={"sampler": sampler, "prune": prune})}))

    assert {pair for pair in asked if ends_early(*pair)} == {
        *((sampler, None) for sampler in ("tpe", "random", "grid")),
        *((sampler, True) for sampler in ("tpe", "random", "grid", "gp", "nsga2")),
    }


def test_pruning_may_change_from_run_to_run(new_store):
    spec = new_store().spec
    other = spec.model_copy(update={"search": spec.search.model_copy(update={"prune": True})})
    assert other.fingerprint_payload() == spec.fingerprint_payload()
    assert "prune" not in spec.fingerprint_payload()["search"]


def test_pruned_trials_count_for_a_plateau(new_store, made_up_evidence):
    budget = Budget(plateau=Plateau(trials=5, gain=0.01))
    store = new_store(search={"prune": True})
    driver = Driver(store, GIVEN, 50, budget)
    driver.work(lambda job: (pruned_evidence(job) if job.kind == "search" else made_up_evidence(job), None))
    assert store.counts()["pruned"] == 5
    assert driver.guard.stopped.budget == "plateau"
    # The next run sees it as this one does.
    assert BudgetMonitor(store, budget, lambda words: None).stop().budget == "plateau"


def test_samplers_go_on_after_pruned_trials(new_store, made_up_evidence, tmp_path):
    for sampler in ("tpe", "gp", "nsga2", "random"):
        store = new_store(out=tmp_path / sampler, name=sampler, search={"prune": True})
        driver = Driver(store, GIVEN, 0)
        driver.work(lambda job: (made_up_evidence(job), None))
        store.use_sampler(SAMPLERS[sampler].make(0))
        for turn in range(24):
            point, job = store.ask_point(store.spec.search_space())
            if turn % 3:
                store.prune(job, point, pruned_evidence(job))
            else:
                store.complete(job, point, made_up_evidence(job, -5.0 - job.alpha, 0.5 + 0.1 * job.alpha))
        assert store.counts() == {"complete": 12, "pruned": 16, "failed": 0, "interrupted": 0, "running": 0}


def test_the_doctor_wants_no_item_scores_of_pruned_trials_but_whole_ones(half_pruned):
    store = half_pruned[0]
    found = list(item_scores(store))
    assert [each.state for each in found] == ["ok"]
    number = next(trial.number for trial in store.study.trials if trial.state == TrialState.PRUNED)
    path = store.out / "items" / "trials" / f"{number:05d}.npz"
    path.write_bytes(path.read_bytes()[:40])
    assert [each.finding.state for each in item_scores(store)] == ["problem"]
    path.unlink()
    assert [each.state for each in item_scores(store)] == ["ok"]


# From end to end.

FINE = {"sampler": "grid", "trials": 24}


def front(out):
    return sorted(map(tuple, StudyResult.open(out).front[["base", "epoch", "alpha", *TWO]].to_numpy().tolist()))


def test_a_grid_ends_with_the_same_front(new_store, evaluator, with_delta, tmp_path):
    volumes, fronts_of = [], []
    for prune in (False, True):
        store = new_store(out=tmp_path / f"prune-{prune}", name=f"grid-{prune}", search={**FINE, "prune": prune})
        jobs = [*GIVEN, *(TrialSpec("search", **point.params) for point in store.spec.grid_points())]

        def evaluate_for(job):
            evidence, report = evaluated(evaluator, with_delta(job))
            return evidence, report.arrays()

        Driver(store, jobs).work(evaluate_for)
        result = StudyResult.of(store)
        volumes.append(result.hypervolume)
        fronts_of.append(front(store.out))
    assert fronts_of[0] == fronts_of[1]
    for name, volume in volumes[0].items():
        assert volume == pytest.approx(volumes[1][name], rel=1e-12)
    assert store.counts()["pruned"] >= 1
    assert result.saved["trials"] == store.counts()["pruned"]


@pytest.mark.slow
def test_the_command_ends_with_the_same_front_and_says_what_it_saved(write_study, run_command, finished, tmp_path):
    summaries = []
    for prune in (False, True):
        file = write_study(tmp_path / f"{prune}.yaml", search={**FINE, "prune": prune})
        out = tmp_path / f"out-{prune}"
        summaries.append(json.loads(run_command("run", file, "--out", out, "--json")))
        if prune:
            told = run_command("run", file, "--out", out)  # nothing is left to do
    without, with_pruning = summaries
    assert front(tmp_path / "out-False") == front(tmp_path / "out-True")
    assert without["saved"] is None
    assert with_pruning["saved"]["trials"] == with_pruning["trials"]["pruned"] >= 1
    assert with_pruning["trials"]["pruned"] + with_pruning["trials"]["complete"] == without["trials"]["complete"]
    assert f"pruned trials: {with_pruning['trials']['pruned']} (" in told
    assert "not scored to their end" in (tmp_path / "out-True" / "report" / "report.html").read_text()
    result = StudyResult.open(tmp_path / "out-True")
    items = result.store.items(int(result.pruned["trial"].iloc[0]))
    assert "forget/paraphrase_loss" in items
    assert "retain/rouge_l_recall" not in items
