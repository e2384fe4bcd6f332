"""Plans: the arithmetic against numbers worked out by hand, and the timing on real models."""

import json
import shutil
from dataclasses import replace

import pytest

from search.planning.plan import at_once, make_plan
from search.planning.planner import plan_study
from search.planning.quantities import ASSUMED, CALCULATED, COUNTED, MEASURED, PAST, UNKNOWN, Machine, Rates, Sizes, Work
from search.spec.study import load_study
from uipe_core.errors import UserError

WORK = Work(
    builds=2, built=1, trains=("grad_diff", "npo"), trained=1, imports=0, epochs=3, steps=5, references=2,
    controls=6, from_logs=2, given=6, search=24, walks=3,
)  # fmt: skip
SIZES = Sizes(parameters=10**9, adapter=None, stored=2, scored=2)
RATES = Rates(MEASURED, {"grad_diff": 100.0, "npo": 200.0}, builds=50.0, trial=10.0, reference=20.0, item_bytes=10**5, load=4.0)
MACHINE = Machine(8, 64 * 10**9, 10**9, (), 10**12, 10**12, same_disk=False)


def study(write_study, tmp_path, **changes):
    return load_study(write_study(tmp_path / "study.yaml", **changes))


def amounts(plan):
    return {line.what: line.value for line in plan.lines}


@pytest.fixture
def spec(write_study, tmp_path):
    return study(write_study, tmp_path, resources={"trial": {"cpus": 4}, "base_run": {"cpus": 8}})


def test_time_and_sizes_are_what_they_are_by_hand(spec):
    plan = make_plan(spec, WORK, SIZES, RATES, MACHINE)
    found = amounts(plan)
    assert plan.misfits == ()
    assert found["optimiser steps"] == 5 * 3 * 2
    # A sixth of 30 points is 5, each scored 3 times more.
    assert found["trials: 3 controls of each of 5 front points"] == 15
    # Dense fp32 update vectors: 4 bytes of 1e9 parameters, 3 epochs, 2 runs.
    assert found["update vector of one epoch"] == 4 * 10**9
    assert found["update vectors to store"] == 24 * 10**9
    assert found["a trial's weights, host"] == 6 * 10**9
    assert found["a base run, device, without activations"] == 16 * 10**9
    # One base run at a time: (100 + 200) * 3 + 2 * 20; trials two at a time: 6 - 2 + 30 + 15 of 10 s.
    assert found["base runs and references, 1 at once"] == 940
    assert found["trials, 2 at once"] == 250
    assert found["from start to end"] == 15 + 2 * 4 + 50 + 940 + 250
    # An epoch takes 150 s on average, and two are searched.
    assert found["one more alpha, as a share of training 2 epochs and scoring"] == 10 / (2 * 150 + 10)
    how = {line.what: line.how for line in plan.lines}
    assert how["one trial"] == MEASURED and how["from start to end"] == CALCULATED
    assert how["base runs to train"] == COUNTED and how["start of Ray, report"] == ASSUMED


def test_audits_are_scorings_and_a_line_of_their_own(spec):
    plan = make_plan(spec, replace(WORK, audits=20), SIZES, RATES, MACHINE)
    found = amounts(plan)
    assert found["audits of finalists, in scorings"] == 20
    assert found["trials, 2 at once"] == 250 + 100
    assert "audits of finalists, in scorings" not in amounts(make_plan(spec, WORK, SIZES, RATES, MACHINE))


def test_training_steps_of_audits_take_what_those_of_base_runs_take(spec):
    found = amounts(make_plan(spec, replace(WORK, audits=20, audit_steps=12), SIZES, RATES, MACHINE))
    # An epoch of 5 steps takes 150 s on average; two trials at a time.
    assert found["audits of finalists, in training steps"] == 12
    assert found["training steps of audits, 2 at once"] == 12 * 30 / 2
    assert found["from start to end"] == 15 + 2 * 4 + 50 + 940 + 350 + 180
    nothing_to_time = replace(WORK, audit_steps=12, trains=(), trained=3)
    plan = make_plan(spec, nothing_to_time, SIZES, RATES, MACHINE)
    line = next(line for line in plan.lines if line.what == "training steps of audits, 2 at once")
    assert (line.value, line.how) == (None, UNKNOWN)


def test_alternate_answers_are_sampled_before_anything_is_trained(spec):
    found = amounts(make_plan(spec, replace(WORK, samples=60), SIZES, replace(RATES, sample=0.5), MACHINE))
    assert found["alternate answers to sample"] == 60
    assert found["sampling alternate answers, at the first temperature"] == 30
    assert found["from start to end"] == 15 + 2 * 4 + 50 + 940 + 250 + 30
    unknown = make_plan(spec, replace(WORK, samples=60), SIZES, RATES, MACHINE)
    line = next(line for line in unknown.lines if line.what.startswith("sampling alternate"))
    assert (line.value, line.how) == (None, UNKNOWN)


def test_alternates_are_counted_where_the_cache_lacks_them(write_study, tmp_path, place):
    spec = study(write_study, tmp_path, unlearning={"methods": {"alt_po": {}}})
    found = amounts(plan_study(spec, tmp_path / "out", None, lambda text: None))
    assert found["alternate answers to sample"] == 12 * len(spec.corpus.load(spec.seed).forget_train)
    assert found["sampling alternate answers, at the first temperature"] > 0


def test_the_steps_of_relearning_are_counted(write_study, tmp_path, place):
    relearning = {"epochs": 2, "batch_size": 4, "few": 5}
    spec = study(write_study, tmp_path, audit={"top": 2, "tests": ["relearning", "fluency"], "relearning": relearning})
    found = amounts(plan_study(spec, tmp_path / "out", None, lambda _: None))
    # 16 forget items, 5 of them, and 16 retain items, in fours, twice; two finalists, the initial and the retain model.
    assert found["audits of finalists, in training steps"] == 4 * 2 * (4 + 2 + 4)
    assert found["audits of finalists, in scorings"] == 4 * 4


def test_more_samples_of_an_audit_are_more_scorings(write_study, tmp_path, place):
    found = []
    for samples in (10, 1000):
        spec = study(write_study, tmp_path, audit={"top": 2, "tests": ["sampling"], "samples": samples})
        plan = plan_study(spec, tmp_path / "out", None, lambda _: None)
        found.append(amounts(plan)["audits of finalists, in scorings"])
    assert found == [4 * 3, 4 * 300]


def test_gpu_hours_are_gpus_held_times_hours(write_study, tmp_path):
    resources = {"trial": {"gpus": 0.5}, "base_run": {"gpus": 1, "processes": 2}}
    spec = study(write_study, tmp_path, resources=resources)
    machine = replace(MACHINE, gpus=(80 * 10**9,) * 4)
    assert at_once(spec, machine) == (8, 2, True)
    found = amounts(make_plan(spec, WORK, SIZES, RATES, machine))
    assert found["GPUs held"] == pytest.approx((2 * 940 + 0.5 * 490) / 3600)


def test_low_rank_vectors_are_the_factors(spec):
    plan = make_plan(spec, WORK, replace(SIZES, adapter=10**6), RATES, MACHINE)
    assert amounts(plan)["update vectors to store"] == 3 * 2 * 4 * 10**6
    assert amounts(plan)["a base run, device, without activations"] == 2 * 10**9 + 16 * 10**6


@pytest.mark.parametrize(
    ("changes", "machine", "found", "remedy"),
    [
        ({}, {"deltas_free": 10**9}, "update vectors need 24.0 GB, and 1.0 GB", "cache.deltas"),
        ({}, {"out_free": 10**5}, "the output folder needs", "--out"),
        ({}, {"deltas_free": 24 * 10**9, "same_disk": True}, "update vectors need 24.0 GB", "cache.deltas"),
        ({}, {"memory": 40 * 10**9}, "8 trials at once need 72.0 GB", "resources.max_concurrent"),
        ({"budget": {"hours": 0.1}}, {}, "budget.hours is 0.1", "search.trials"),
        ({"budget": {"trial_minutes": 0.1}}, {}, "each would fail", "raise budget.trial_minutes"),
        (
            {"budget": {"gpu_hours": 0.1}, "resources": {"trial": {"gpus": 1}}},
            {"gpus": (80 * 10**9,)},
            "budget.gpu_hours is 0.1",
            "search.trials",
        ),
        (
            {"resources": {"trial": {"gpus": 0.25}}},
            {"gpus": (4 * 10**9,)},
            "a GPU would hold 8.0 GB of weights for 4 trials, and has 4.0 GB",
            "resources.trial.gpus",
        ),
        (
            {"resources": {"base_run": {"gpus": 1}}},
            {"gpus": (8 * 10**9,)},
            "a GPU would hold 16.0 GB of weights for 1 base runs",
            "unlearning.adapter",
        ),
    ],
)
def test_what_cannot_fit_is_said_with_what_to_change(write_study, tmp_path, changes, machine, found, remedy):
    plan = make_plan(study(write_study, tmp_path, **changes), WORK, SIZES, RATES, replace(MACHINE, **machine))
    misfits = [misfit for misfit in plan.misfits if found in misfit.what]
    assert len(misfits) == 1, plan.misfits
    assert remedy in misfits[0].remedy


def test_what_is_not_known_is_said(spec):
    plan = make_plan(spec, replace(WORK, steps=None), None, None, MACHINE, ("a reason",))
    unknown = {line.what for line in plan.lines if line.how == UNKNOWN}
    assert unknown == {
        "optimiser steps", "update vectors", "output folder: item scores, database", "from start to end", "GPUs held"
    }  # fmt: skip
    assert all((line.value is None) == (line.how == UNKNOWN) for line in plan.lines)
    assert plan.notes == ("a reason",)


def test_a_study_for_a_cluster_is_not_held_against_this_machine(write_study, tmp_path):
    resources = {"max_concurrent": 16, "trial": {"gpus": 1, "custom": {"a100": 0.01}}}
    plan = make_plan(study(write_study, tmp_path, resources=resources), WORK, SIZES, RATES, replace(MACHINE, memory=10**9))
    assert plan.misfits == ()
    assert any("cluster that runs 16 trials" in note for note in plan.notes)


def test_a_finished_study_has_nothing_to_train(finished, call):
    code, output, error = call("plan", finished.file, "--like", finished.out, "--json")
    assert code == 0, error
    plan = json.loads(output)
    assert (code, plan["fits"], plan["misfits"]) == (0, True, [])
    found = {line["what"]: line for line in plan["lines"]}
    assert found["base runs in the cache"]["value"] == 2 and "base runs to train" not in found
    assert found["small models in the cache"]["value"] == 4
    assert found["trials: controls"]["value"] == 9 and found["trials: search"]["value"] == 5
    assert found["update vectors to store"]["value"] == 0
    assert found["one trial"]["how"] == PAST and 0 < found["one trial"]["value"] < 10


def test_what_is_missing_is_begun_and_timed(finished, tmp_path, monkeypatch, call, result, write_study, place):
    empty = tmp_path / "empty"
    monkeypatch.setenv("UIPE_CACHE", str(empty))
    file = write_study(tmp_path / "slow.yaml", budget={"hours": 0.0001})
    code, output, error = call("plan", file, "--json")
    plan = json.loads(output)
    assert code == 1 and not plan["fits"]
    assert "budget.hours is 0.0001" in plan["misfits"][0]["what"]
    found = {line["what"]: line for line in plan["lines"]}
    assert found["small models to build"]["value"] == 4 and found["base runs to train"]["value"] == 2
    for what in ("one trial", "one epoch of a base run, on average", "one reference model, all items"):
        assert found[what]["how"] == MEASURED and 0 < found[what]["value"] < 60
    assert found["small models"]["value"] > 0
    assert "timing a few steps of npo" in error
    # What it begins it does not leave in the caches, and the vectors it foretells are as large as those the study stored.
    assert not empty.exists()
    entry = place["cache"] / "deltas" / result.store.record.base_runs["npo"].delta
    stored = (entry / "epoch-001.safetensors").stat().st_size
    assert found["update vector of one epoch"]["value"] == pytest.approx(stored, rel=0.05)


def test_times_of_another_study_are_refused(finished, write_study, tmp_path):
    other = load_study(write_study(tmp_path / "other.yaml", corpus={"kind": "people", "forget_people": 3, "retain_people": 12}))
    with pytest.raises(UserError, match=r"--like .*: it is a study of another model and corpus"):
        plan_study(other, tmp_path / "out", finished.out, lambda text: None)
    with pytest.raises(UserError, match="not a study folder"):
        plan_study(load_study(finished.file), tmp_path / "out", tmp_path, lambda text: None)


@pytest.fixture
def hub_study(tmp_path, write_study):
    """A study of models from the hub that are not here."""
    model = {"kind": "pretrained", "initial": "org/initial", "retain": "org/retain", "dtype": "bfloat16"}
    return write_study(tmp_path / "hub.yaml", model=model, search={"trials": 7})


def test_models_that_are_not_here_are_not_fetched(hub_study, call):
    code, output, _ = call("plan", hub_study, "--json")
    plan = json.loads(output)
    assert code == 0
    told = " ".join(plan["notes"])
    assert "org/initial, org/retain: not on this machine" in told and "memory and disk are not known" in told
    found = {line["what"]: line for line in plan["lines"]}
    assert found["base runs to train"]["value"] == 2 and found["optimiser steps"]["value"] > 0
    assert found["from start to end"]["how"] == UNKNOWN


def test_a_configuration_alone_gives_memory_and_disk(hub_study, call, monkeypatch, tmp_path):
    import huggingface_hub.constants
    from transformers import LlamaConfig
    from transformers.utils import hub

    snapshot = tmp_path / "hub" / "models--org--initial" / "snapshots" / ("c" * 40)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, dtype="bfloat16"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c" * 40)
    for module in (huggingface_hub.constants, hub):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    code, output, error = call("plan", hub_study, "--json")
    assert code == 0, error
    plan = json.loads(output)
    found = {line["what"]: line["value"] for line in plan["lines"]}
    # Embedding and head; per layer four projections of attention, three of the feed-forward block, two norms; the last norm.
    parameters = 2 * 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert found["parameters"] == parameters
    assert found["update vector of one epoch"] == 4 * parameters
    assert found["a trial's weights, device"] == 2 * parameters
    assert "not on this machine" in " ".join(plan["notes"])


def test_the_table_names_numbers_and_how_they_are_known(finished, call):
    code, output, _ = call("plan", finished.file, "--like", finished.out)
    assert code == 0
    assert "Plan of tiny" in output and "past study" in output and "everything that is known fits" in output


def test_disk_of_a_folder_that_does_not_exist_yet_is_that_above_it(finished, tmp_path):
    plan = plan_study(load_study(finished.file), tmp_path / "a" / "b", finished.out, lambda text: None)
    free = shutil.disk_usage(tmp_path).free
    assert amounts(plan)["free for the output folder"] == pytest.approx(free, rel=0.2)
