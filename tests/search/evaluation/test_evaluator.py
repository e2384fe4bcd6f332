"""What a worker returns for each kind of job, on a really trained small model."""

import base64
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from search.evaluation.controls import CONTROLS
from search.evaluation.evaluator import Evaluator
from search.evaluation.metrics import METRICS
from search.problem.trial import POINT_KINDS, TrialSpec, identity


@pytest.fixture(scope="module")
def evaluator(study_context):
    threads = torch.get_num_threads()
    yield Evaluator(study_context)
    torch.set_num_threads(threads)


def evidence_of(evaluator, job):
    """What a trial carries: what the driver knows of it, and what its worker returns."""
    metrics, _ = evaluator.evaluate(job)
    return {**identity(job, {"grad_diff": "grad_diff", "npo": "npo"}), **metrics.as_dict()}


@pytest.fixture(scope="module")
def evaluate(evaluator, with_delta):
    """The evidence of a job."""
    return lambda job: evidence_of(evaluator, with_delta(job))


def numbers(evidence):
    return {key: value for key, value in evidence.items() if not key.startswith("seconds")}


def test_an_evaluator_repeats_what_the_study_found(evaluate, result):
    for row in result.trials.to_dict("records"):
        evidence = evaluate(TrialSpec(row["kind"], row["base"], row["epoch"], row["alpha"]))
        for name in ("log10_forget_quality", "model_utility", "ks_statistic", "logit_scale", "flagged", "walk", "update_norm"):
            assert evidence[name] == row[name], name


def test_the_order_of_jobs_does_not_matter(evaluate):
    job = TrialSpec("search", "npo", 2, 0.7)
    first = numbers(evaluate(job))
    for other in (
        TrialSpec("search", "grad_diff", 1, 2.0),
        TrialSpec("random_direction", "npo", 2, 2.0, of_trial=3),
        TrialSpec("temperature", temperature=2.0),
        TrialSpec("initial", model="initial"),
    ):
        evaluate(other)
    assert numbers(evaluate(job)) == first


def test_minus_one_is_the_initial_model_and_both_score_alike(evaluate):
    walked = evaluate(TrialSpec("search", "npo", 2, -1.0))
    initial = evaluate(TrialSpec("initial", model="initial"))
    assert walked["walk"] == "initial model"
    assert walked["update_norm"] == 0.0
    # The initial model was scored on all items at once, and batches decide the last bits.
    assert walked["model_utility"] == pytest.approx(initial["model_utility"], abs=1e-6)
    assert initial["walk"] is None and initial["base"] is None


def test_temperature_moves_the_logits_and_nothing_else(evaluate):
    hot = evaluate(TrialSpec("temperature", temperature=2.0))
    initial = evaluate(TrialSpec("initial", model="initial"))
    assert hot["temperature"] == 2.0
    assert hot["logit_scale"] == pytest.approx(0.5, rel=1e-4)
    assert hot["components"]["ROUGE Retain"] == initial["components"]["ROUGE Retain"]
    assert hot["components"]["Prob Retain"] != initial["components"]["Prob Retain"]


def test_random_directions_have_the_norm_of_what_they_mirror_and_repeat(evaluate):
    mirror = TrialSpec("random_direction", "npo", 2, 1.5, of_trial=7)
    first, again = evaluate(mirror), evaluate(mirror)
    walked = evaluate(TrialSpec("search", "npo", 2, 1.5))
    assert numbers(first) == numbers(again)
    assert first["of_trial"] == 7
    assert first["update_norm"] == pytest.approx(walked["update_norm"], rel=1e-5)
    assert first["model_utility"] != walked["model_utility"]


def test_evidence_is_json_of_finite_numbers(evaluate):
    jobs = [
        TrialSpec("alpha_zero", "npo", 1, 0.0),
        TrialSpec("initial", model="initial"),
        TrialSpec("retain", model="retain"),
        TrialSpec("next_epoch", "npo", 3, 0.0),
    ]
    jobs += [TrialSpec("search", "grad_diff", 2, -0.5), TrialSpec("random_direction", "npo", 1, 0.5, of_trial=1)]
    jobs += [TrialSpec("temperature", temperature=0.5), TrialSpec("held_out", "npo", 1, 0.5, of_trial=1)]
    jobs += [TrialSpec("matched_scale", "npo", 1, 0.5, temperature=1.1, of_trial=1), TrialSpec("held_out", model="retain")]
    jobs += [TrialSpec("other_seed", "npo", 1, 0.5, of_trial=1)]
    jobs += [TrialSpec("never_finetuned", model="never_finetuned"), TrialSpec("other_retain", model="other_retain-1")]
    assert {job.kind for job in jobs} == {*POINT_KINDS, *CONTROLS} - {"confirm", "dial"} - {
        kind for kind, control in CONTROLS.items() if control.audit is not None
    }
    for job in jobs:
        evidence = json.loads(json.dumps(evaluate(job), allow_nan=False))
        assert len(evidence["components"]) == 9
        assert all(math.isfinite(value) for value in evidence["components"].values())
        assert evidence["definition"] == "tofu"
        assert {"related_log10_forget_quality", "unrelated_log10_forget_quality"} <= evidence.keys()


def test_a_walk_too_far_is_a_collapse_and_says_why(evaluate):
    assert evaluate(TrialSpec("initial", model="initial"))["collapsed"] is None
    assert "nats per token on retain" in evaluate(TrialSpec("search", "npo", 2, 1e4))["collapsed"]


def test_evidence_has_memorisation_of_what_should_go_and_what_should_stay(evaluate):
    for job in (TrialSpec("initial", model="initial"), TrialSpec("search", "npo", 2, 0.5)):
        evidence = evaluate(job)
        for name in ("forget", "retain"):
            assert 0 <= evidence[f"{name}_extraction_strength"] <= evidence[f"{name}_exact_memorization"] <= 1


def test_an_unknown_base_run_is_an_error_and_the_worker_goes_on(evaluate):
    with pytest.raises(ValueError, match="entries of the delta store"):
        evaluate(TrialSpec("search", "nothing", 1, 0.5))
    assert evaluate(TrialSpec("search", "npo", 1, 0.5))["model_utility"] > 0


def test_held_out_points_are_scored_on_the_other_items(evaluator, with_delta, preparation):
    split, corpus = preparation.split, preparation.corpus
    for kind, rows in (("search", split.select), ("held_out", split.report)):
        _, report = evaluator.evaluate(with_delta(TrialSpec(kind, "npo", 2, 0.5, of_trial=1 if kind == "held_out" else None)))
        asked = tuple(corpus.sets["forget"][row].question for row in rows["forget"])
        assert report.sets["forget"].questions == asked


def test_matched_scale_brings_the_logits_to_those_of_the_initial_model(evaluate):
    sharp = evaluate(TrialSpec("search", "grad_diff", 2, 1.5))
    matched = evaluate(TrialSpec("matched_scale", "grad_diff", 2, 1.5, temperature=sharp["logit_scale"], of_trial=1))
    assert matched["logit_scale"] == pytest.approx(1.0, rel=1e-4)
    assert matched["components"]["ROUGE Retain"] == sharp["components"]["ROUGE Retain"]


def test_item_scores_travel_as_text(evaluator, with_delta):
    from search.execution.workers import pack_arrays

    _, report = evaluator.evaluate(with_delta(TrialSpec("search", "npo", 1, 0.5)))
    arrays = np.load(io.BytesIO(base64.b64decode(pack_arrays(report.arrays()))))
    assert np.array_equal(arrays["forget/answer_loss"], report.sets["forget"].answer_loss)


def test_smaller_batches_give_the_same_numbers_and_say_so(evaluator, with_delta):
    job = with_delta(TrialSpec("search", "npo", 1, 0.5))
    whole = evidence_of(evaluator, job)
    assert "batch_size" not in whole
    narrow = Evaluator(evaluator.context)

    def no_room_for_more_than_four(model, arguments, inputs):
        if len(inputs["input_ids"]) > 4:
            raise MemoryError

    narrow.loaded.model.register_forward_pre_hook(no_room_for_more_than_four, with_kwargs=True)
    half = evidence_of(narrow, job)
    assert half.pop("batch_size") < evaluator.context.scoring.batch_size
    assert half["model_utility"] == pytest.approx(whole["model_utility"], abs=1e-6)
    assert half["log10_forget_quality"] == pytest.approx(whole["log10_forget_quality"], abs=1e-9)


def test_a_metric_that_cannot_tell_is_left_out(evaluate, monkeypatch):
    monkeypatch.setitem(METRICS, "known", lambda report, references: len(references))
    monkeypatch.setitem(METRICS, "unknown", lambda report, references: math.nan)
    evidence = evaluate(TrialSpec("initial", model="initial"))
    assert evidence["known"] == 4.0
    assert "unknown" not in evidence


@pytest.fixture
def overflowing(evaluator, monkeypatch):
    """Lets the worker's model be one whose hidden states are fp16: they overflow behind its first layer."""
    model = evaluator.loaded.model

    def overflow(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        return (hidden * 1e6).half().to(hidden.dtype)

    handle = model.model.layers[0].register_forward_hook(overflow)
    yield
    handle.remove()


def test_a_slip_of_the_machine_is_scored_again(evaluator, with_delta, evaluate):
    job = with_delta(TrialSpec("search", "npo", 1, 0.5))
    before = evaluate(TrialSpec("search", "npo", 1, 0.5))
    model, slips = evaluator.loaded.model, [True]

    def slip(module, inputs, output):
        if slips:
            slips.pop()
            output.logits.fill_(float("nan"))
        return output

    handle = model.register_forward_hook(slip)
    after = evidence_of(evaluator, job)
    handle.remove()
    assert not slips
    assert numbers(after) == numbers(before)


@pytest.mark.parametrize(
    "rivals",
    [(), ({"trial": 1, "values": {"log10_forget_quality": -1e3, "model_utility": 0.0}},)],
    ids=["whole", "stage by stage"],
)
def test_logits_that_overflow_are_a_collapse_and_no_failure(evaluator, with_delta, overflowing, rivals):
    job = replace(with_delta(TrialSpec("search", "npo", 1, 0.5)), rivals=rivals)
    metrics, report = evaluator.evaluate(job)
    evidence = json.loads(json.dumps(metrics.as_dict(), allow_nan=False))
    assert "logits that are not finite for 100% of retain" in evidence["collapsed"]
    assert evidence["model_utility"] == 0.0
    assert math.isfinite(evidence["log10_forget_quality"])
    assert all(np.isfinite(values).all() for values in report.arrays().values())
