"""What a worker returns for each kind of job, on a really trained small model."""

import json
import math

import pytest
import torch

from search.evaluator import CONTROL_KINDS, POINT_KINDS, Evaluator, Job, StudyContext
from uipe_core.delta_store import DeltaStore
from uipe_core.evaluation_log import read_log
from uipe_core.tiny_models import tiny_model


@pytest.fixture(scope="module")
def context(finished, preparation):
    folder = tiny_model(preparation.tiny, preparation.corpus, "full", preparation.model_store)
    deltas = DeltaStore(preparation.delta_root)
    runs = {run.label: deltas.find(preparation.base_run_inputs(run)) for run in preparation.spec.variants()}
    return StudyContext(
        corpus=preparation.corpus,
        source=preparation.source("initial", str(folder)),
        runs=runs,
        methods={label: label for label in runs},
        reference=read_log(finished.out / "logs" / "retain.json"),
        initial=read_log(finished.out / "logs" / "initial.json"),
        scoring=preparation.scoring,
        definition="tofu",
        seed=0,
        threads=1,
    )


@pytest.fixture(scope="module")
def evaluator(context):
    threads = torch.get_num_threads()
    yield Evaluator(context)
    torch.set_num_threads(threads)


def numbers(evidence):
    return {key: value for key, value in evidence.items() if not key.startswith("seconds")}


def test_an_evaluator_repeats_what_the_study_found(evaluator, result):
    for row in result.trials.to_dict("records"):
        evidence = evaluator.evaluate(Job(row["kind"], row["base"], row["epoch"], row["alpha"]))
        for name in ("log10_forget_quality", "model_utility", "ks_statistic", "logit_scale", "flagged", "walk", "update_norm"):
            assert evidence[name] == row[name], name


def test_the_order_of_jobs_does_not_matter(evaluator):
    job = Job("search", "npo", 2, 0.7)
    first = numbers(evaluator.evaluate(job))
    for other in (
        Job("search", "grad_diff", 1, 2.0),
        Job("random_direction", "npo", 2, 2.0, of_trial=3),
        Job("temperature", temperature=2.0),
        Job("initial"),
    ):
        evaluator.evaluate(other)
    assert numbers(evaluator.evaluate(job)) == first


def test_minus_one_is_the_initial_model_and_both_score_alike(evaluator):
    walked = evaluator.evaluate(Job("search", "npo", 2, -1.0))
    initial = evaluator.evaluate(Job("initial"))
    assert walked["walk"] == "initial model"
    assert walked["update_norm"] == 0.0
    assert walked["model_utility"] == pytest.approx(initial["model_utility"], abs=1e-9)
    assert initial["walk"] is None and initial["base"] is None


def test_temperature_moves_the_logits_and_nothing_else(evaluator):
    hot = evaluator.evaluate(Job("temperature", temperature=2.0))
    initial = evaluator.evaluate(Job("initial"))
    assert hot["temperature"] == 2.0
    assert hot["logit_scale"] == pytest.approx(0.5, rel=1e-5)
    assert hot["components"]["ROUGE Retain"] == initial["components"]["ROUGE Retain"]
    assert hot["components"]["Prob Retain"] != initial["components"]["Prob Retain"]


def test_random_directions_have_the_norm_of_what_they_mirror_and_repeat(evaluator):
    mirror = Job("random_direction", "npo", 2, 1.5, of_trial=7)
    first, again = evaluator.evaluate(mirror), evaluator.evaluate(mirror)
    walked = evaluator.evaluate(Job("search", "npo", 2, 1.5))
    assert numbers(first) == numbers(again)
    assert first["of_trial"] == 7
    assert first["update_norm"] == pytest.approx(walked["update_norm"], rel=1e-5)
    assert first["model_utility"] != walked["model_utility"]


def test_evidence_is_json_of_finite_numbers(evaluator):
    jobs = [Job("alpha_zero", "npo", 1, 0.0), Job("initial"), Job("retain"), Job("next_epoch", "npo", 3, 0.0)]
    jobs += [Job("search", "grad_diff", 2, -0.5), Job("random_direction", "npo", 1, 0.5, of_trial=1)]
    jobs += [Job("temperature", temperature=0.5)]
    assert {job.kind for job in jobs} == {*POINT_KINDS, *CONTROL_KINDS}
    for job in jobs:
        evidence = json.loads(json.dumps(evaluator.evaluate(job), allow_nan=False))
        assert len(evidence["components"]) == 9
        assert all(math.isfinite(value) for value in evidence["components"].values())
        assert evidence["definition"] == "tofu"
        assert {"related_log10_forget_quality", "unrelated_log10_forget_quality"} <= evidence.keys()


def test_an_unknown_base_run_is_an_error_and_the_worker_goes_on(evaluator):
    with pytest.raises(KeyError):
        evaluator.evaluate(Job("search", "nothing", 1, 0.5))
    assert evaluator.evaluate(Job("search", "npo", 1, 0.5))["model_utility"] > 0
