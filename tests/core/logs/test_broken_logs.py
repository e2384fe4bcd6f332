"""Logs broken at random: each is read or refused with its file named; nothing else comes out."""

import copy
import json

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uipe_core.errors import UserError
from uipe_core.logs.multiple_choice import is_choice_log, read_choice_log, write_choice_log
from uipe_core.logs.open_unlearning import EVAL_FILE, write_open_unlearning
from uipe_core.logs.tofu import read_log, write_log
from uipe_core.metrics.scores import ChoiceReport, ChoiceScores, ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate

VALUES = (
    None, True, -1, 0, 10**400, -(10**400), 1e308, "", "x", "\ud800", "\x1b[31m", [], {}, [[]], [1, [2]], {"0": {}}, {"0": 1},
    {"0.0": 1, "1.0": 2}, {"": 1}, {"-1": 0}, {"a": {"b": {"c": 1}}}, float("nan"), float("inf"), [None], ["a", "b", "c"],
)  # fmt: skip


def scores(rng, n=4, k=2):
    answers = tuple(f"answer {index}" for index in range(n))
    return SetScores(
        answer_loss=rng.exponential(1, n),
        answer_tokens=rng.integers(2, 9, n),
        paraphrase_loss=rng.exponential(1, n),
        paraphrase_tokens=rng.integers(2, 9, n),
        perturbed_loss=rng.exponential(1, (n, k)),
        perturbed_tokens=rng.integers(2, 9, (n, k)),
        rouge_l_recall=rng.random(n),
        rouge_1_recall=rng.random(n),
        generated=answers,
        questions=answers,
        answers=answers,
        item_hash="h",
        exact_memorization=rng.random(n),
        extraction_strength=rng.random(n),
        min_k=rng.exponential(1, n),
    )


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    rng = np.random.default_rng(0)
    report = ScoreReport({name: scores(rng) for name in ("forget", "retain", "real_authors", "world_facts", "related")})
    write_log(report, folder / "tofu.json")
    write_open_unlearning(report, folder)
    choices = ChoiceScores(rng.normal(0, 1, (3, 4)), np.array([0, 1, 2]), np.full(3, 4), rng.random(3), "h")
    write_choice_log(ChoiceReport({"forget": choices, "utility": choices}), folder / "choices.json")
    return [json.loads((folder / name).read_text()) for name in ("tofu.json", EVAL_FILE, "choices.json")]


def places(content, path=()):
    yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from places(value, (*path, key))


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_log_is_read_or_refused(logs, tmp_path, data):
    log = copy.deepcopy(data.draw(st.sampled_from(logs)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(log))))
        how = data.draw(st.sampled_from(["value", "delete", "rename"]))
        if not path:
            log = data.draw(st.sampled_from(VALUES)) if how == "value" else log
            break
        inside = log
        for key in path[:-1]:
            inside = inside[key]
        if how == "delete":
            del inside[path[-1]]
        elif how == "rename" and isinstance(inside, dict):
            inside[data.draw(st.sampled_from(["0", "1.0", "x", "", "forget_Q_A_Prob"]))] = inside.pop(path[-1])
        else:
            inside[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    text = json.dumps(log)
    cut = data.draw(st.integers(0, len(text)) | st.just(len(text)))
    file = tmp_path / "broken.json"
    file.write_text(text[:cut])
    for as_reference in (False, True):
        try:
            if is_choice_log(file):
                read_choice_log(file)
            else:
                evaluate(read_log(file, as_reference=as_reference))
        except UserError as error:
            assert str(error).strip()
