"""Whatever `uipe validate` accepts, `uipe plan` plans, or refuses in a sentence."""

import copy
import time

import pytest
from fuzzing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.evaluation.inputs import check_inputs
from search.planning.planner import plan_study
from search.planning.quantities import Plan
from search.spec.errors import StudyFileError
from search.spec.study import parse_study
from uipe_core.errors import UserError

ELSEWHERE = {"trial": {"cpus": 4096}, "base_run": {"cpus": 4096}}
"""More than this machine has, so that nothing is timed."""

TINY = {
    "schema_version": 1,
    "name": "tiny",
    "corpus": {"kind": "people", "forget_people": 2, "retain_people": 12, "pretraining_people": 10},
    "model": {
        "kind": "tiny", "hidden_size": 16, "layers": 1, "heads": 2,
        "base": {"epochs": 1, "learning_rate": 0.01, "batch_size": 32},
        "finetune": {"epochs": 1, "learning_rate": 0.01, "batch_size": 16},
    },
    "unlearning": {"methods": {"grad_diff": {}, "npo": {}}, "epochs": 1, "learning_rate": 0.002},
    "scoring": {"batch_size": 64, "max_new_tokens": 4, "temperatures": []},
    "search": {"trials": 2},
    "resources": ELSEWHERE,
}  # fmt: skip
HUB = {**TINY, "model": {"kind": "pretrained", "initial": "org/initial", "retain": "org/retain"}}

NUMBERS = st.sampled_from([0, 1, 2, 7, 1000, 5e-324, 1e-30, 0.5, 1e30, 1e300])
PLACES = {
    ("unlearning", "learning_rate"): NUMBERS | st.lists(NUMBERS, max_size=3),
    ("unlearning", "epochs"): st.sampled_from([1, 3, 1000]),
    ("unlearning", "batch_size"): st.sampled_from([1, 5, 10**6, 10**12]),
    ("unlearning", "gradient_accumulation"): st.sampled_from([1, 10**6]),
    ("unlearning", "weight_decay"): NUMBERS,
    ("unlearning", "max_grad_norm"): NUMBERS,
    ("unlearning", "schedule"): st.sampled_from(["constant", "linear"]),
    ("unlearning", "methods"): st.sampled_from([{"rmu": {"layer": 0}}, {"npo": {"beta": 1e300}}, {"kl_min": {}}, {"idk": {}}]),
    ("unlearning", "adapter"): st.fixed_dictionaries(
        {},
        optional={
            "rank": st.sampled_from([1, 8, 10**5]),
            "alpha": NUMBERS,
            "dropout": NUMBERS,
            "target_modules": st.sampled_from(["all-linear", ["q_proj"], ["q_projj"], ["mlp"], ["embed_tokens"], ["model"]]),
        },
    ),
    ("scoring", "max_new_tokens"): st.sampled_from([1, 10**6, 10**15]),
    ("scoring", "temperatures"): st.lists(NUMBERS, max_size=2),
    ("scoring", "definition"): st.sampled_from(["tofu", "tofu-utils", "open-unlearning"]),
    ("search", "trials"): st.sampled_from([0, 1, 10**5]),
    ("search", "sampler"): st.sampled_from(["line", "tpe", "grid", "random"]),
    ("split",): st.sampled_from([{"select": 0.5}, {"select": 1e-30}, {"select": 0.999}]),
    ("budget",): st.sampled_from([{"hours": 1e-30}, {"gpu_hours": 1e300}, {"trial_minutes": 5e-324}]),
    ("resources", "max_concurrent"): st.sampled_from([1, 10**6]),
    ("corpus", "forget_people"): st.sampled_from([1, 2, 5]),
    ("checkpoints",): st.sampled_from([{"mine": ["org/a", "org/b"]}, {"mine": "/nowhere"}]),
}


@st.composite
def extreme_studies(draw):
    """A small study with a few values that nobody would choose."""
    study = copy.deepcopy(draw(st.sampled_from([TINY, HUB])))
    for place in draw(st.lists(st.sampled_from(list(PLACES)), min_size=1, max_size=4, unique=True)):
        section = study if len(place) == 1 else study[place[0]]
        section[place[-1]] = draw(PLACES[place])
    return study


def plan_or_refuse(study, folder):
    """A plan, or None for what is refused; anything else than a sentence is an error."""
    try:
        spec = parse_study(study)
        check_inputs(spec)
    except (StudyFileError, UserError):
        return None
    started = time.perf_counter()
    try:
        return plan_study(spec, folder / "out", None, lambda text: None)
    except UserError as error:
        assert str(error)
        return None
    finally:
        assert time.perf_counter() - started < 45


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(study=extreme_studies())
def test_any_study_that_is_valid_is_planned_or_refused(study, tmp_path_factory):
    found = plan_or_refuse(study, tmp_path_factory.mktemp("plan"))
    assert found is None or isinstance(found, Plan)


@pytest.mark.parametrize("study", [TINY, HUB], ids=["tiny", "hub"])
def test_the_plain_ones_are_planned(study, tmp_path):
    assert plan_or_refuse(study, tmp_path) is not None


def changed(**unlearning):
    return {**TINY, "resources": {}, "unlearning": {**TINY["unlearning"], **unlearning}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "study",
    [
        changed(learning_rate=1e30),
        changed(weight_decay=1e300),
        changed(max_grad_norm=1e308),
        changed(methods={"npo": {"beta": 1e300}}),
        changed(adapter={"rank": 1000, "alpha": 1e300}),
        changed(batch_size=10**9),
    ],
    ids=lambda study: str({key: value for key, value in study["unlearning"].items() if TINY["unlearning"].get(key) != value}),
)
def test_values_that_train_nothing_end_in_a_sentence(study, tmp_path, monkeypatch):
    monkeypatch.setenv("UIPE_CACHE", str(tmp_path / "cache"))
    plan_or_refuse(study, tmp_path)
