"""The corpus section of MUSE, and the objectives that only its items have."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.muse_folder import write_muse
from search.problem.objectives import ROLES
from search.spec.corpora import fetched_sources
from search.spec.errors import StudyFileError
from search.spec.study import StudySpec, load_study, parse_study

STUDIES = Path(__file__).parents[3] / "studies"
TRAINING = {"epochs": 1, "learning_rate": 0.001, "batch_size": 4}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "model").mkdir()

    def make(corpus=None, **changes):
        found = yaml.safe_load((STUDIES / "quickstart.yaml").read_text())
        found.pop("scoring")
        found["corpus"] = {"kind": "muse", **(corpus or {})}
        found["model"] = {"kind": "pretrained", "initial": "model"}
        return {**found, **changes}

    return make


def problems(data, folder):
    with pytest.raises(StudyFileError) as caught:
        parse_study(data, folder)
    return {problem.key: problem.message for problem in caught.value.problems}


def test_the_hub_is_the_default_and_a_folder_is_an_absolute_path(study, tmp_path):
    spec = parse_study(study(), tmp_path)
    assert fetched_sources(spec.corpus) == [("source", "muse-bench/MUSE-News")]
    assert (spec.corpus.forget, spec.corpus.window_words, spec.definition) == ("raw", 1500, "tofu")
    write_muse(tmp_path / "muse", 2, 12)
    local = parse_study(study({"source": "./muse", "forget": "sust_3"}), tmp_path)
    assert local.corpus.source == str(tmp_path / "muse") and not fetched_sources(local.corpus)
    assert "forget=sust_3" in local.corpus.load(0).name
    assert StudySpec.recorded(json.loads(local.model_dump_json())) == local


def test_objectives_are_muses_with_and_without_a_retain_model(study, tmp_path):
    expected = ["one_minus_verbmem", "knowmem_retain"]
    assert [each.name for each in parse_study(study(), tmp_path).maximised] == expected
    retain = study(model={"kind": "pretrained", "initial": "model", "retain": "owner/retrained"})
    assert [each.name for each in parse_study(retain, tmp_path).maximised] == expected
    named = study(objectives={"forgetting": "knowmem", "utility": "knowmem_retain", "third": "privleak"})
    assert [each.name for each in parse_study(named, tmp_path).maximised] == [
        "one_minus_knowmem",
        "knowmem_retain",
        "privleak_privacy",
    ]
    for role, name in (("forgetting", "memorization"), ("utility", "retain_utility"), ("third", "robust_forgetting")):
        parse_study(study(objectives={role: name}), tmp_path)


@pytest.mark.parametrize(
    ("corpus", "changes", "key", "expected"),
    [
        ({"source": "./none"}, {}, "corpus.source", "there is no"),
        ({"forget": "scal_5"}, {}, "corpus.forget", "Did you mean scal_"),
        ({"window_words": 0}, {}, "corpus.window_words", "at least 1"),
        ({"windowwords": 5}, {}, "corpus.windowwords", "Did you mean corpus.window_words"),
        ({}, {"unlearning": {**TRAINING, "methods": {"idk_dpo": {}}}}, "unlearning.methods.idk_dpo", "MUSE trains on texts"),
        ({}, {"objectives": {"third": "privacy"}}, "objectives.third", "no holdout items"),
    ],
)
def test_bad_input_is_named_with_a_remedy(study, tmp_path, corpus, changes, key, expected):
    found = problems(study(corpus, **changes), tmp_path)
    assert expected in found[key]


@pytest.mark.parametrize(
    ("role", "name", "expected"),
    [
        ("forgetting", "verbmem", "it is MUSE's"),
        ("utility", "knowmem_retain", "it is MUSE's"),
        ("forgetting", "knowmem", "no knowmem items"),
        ("third", "privleak", "no privleak_forget and no privleak_holdout items"),
    ],
)
def test_other_corpora_have_none_of_its_objectives(role, name, expected):
    assert name in ROLES[role]
    study = yaml.safe_load((STUDIES / "quickstart.yaml").read_text())
    assert expected in problems({**study, "objectives": {role: name}}, STUDIES)[f"objectives.{role}"]


def test_a_base_stage_of_a_tiny_model_is_refused(study, tmp_path):
    stage = {"epochs": 1, "learning_rate": 0.01, "batch_size": 4}
    found = problems(study(model={"kind": "tiny", "base": stage, "finetune": stage}), tmp_path)
    assert "MUSE has no texts for a base stage" in found["model.base"]


@pytest.mark.parametrize("name", ["muse_news_llama2_7b", "muse_books_iclm_7b"])
def test_the_studies_of_muse_are_valid(name):
    spec = load_study(STUDIES / f"{name}.yaml")
    assert [each.name for each in spec.maximised] == ["one_minus_verbmem", "knowmem_retain", "privleak_privacy"]
    assert spec.has_retain_model


@pytest.mark.parametrize("name", ["bio", "cyber", "chem"])
def test_the_studies_of_wmdp_are_valid(name):
    spec = load_study(STUDIES / f"wmdp_{name}_zephyr_7b.yaml")
    assert spec.corpus.forget.subset == (f"wmdp-{name}",)
    assert (spec.corpus.forget_texts is None) == (name == "chem")
