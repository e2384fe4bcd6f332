"""The corpus section of a user's own data."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.spec.corpora import fetched_sources, path_sites
from search.spec.errors import StudyFileError
from search.spec.study import StudySpec, parse_study

STUDIES = Path(__file__).parents[3] / "studies"


@pytest.fixture
def study(tmp_path):
    """Study with the given corpus keys; its folder has forget.jsonl, retain.csv, docs/ and model/."""
    rows = [{"question": f"Who is {number}?", "answer": f"Ann {number}."} for number in range(3)]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "retain.csv").write_text("question,answer\nWho?,Bo\nWhen?,Now\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("some words here and there")
    (tmp_path / "own.docx").write_text("")
    (tmp_path / "model").mkdir()

    def make(changes: dict[str, Any] | None = None, **corpus: Any) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((STUDIES / "quickstart.yaml").read_text())
        found["corpus"] = {"kind": "questions", "forget": "forget.jsonl", "retain": "retain.csv", **corpus}
        found.pop("scoring")
        found["model"] = {"kind": "pretrained", "initial": "model"}
        return {**found, **(changes or {})}

    return make


def problems(data: dict[str, Any], folder: Path) -> dict[str, str]:
    with pytest.raises(StudyFileError) as caught:
        parse_study(data, folder)
    return {problem.key: problem.message for problem in caught.value.problems}


def test_paths_are_absolute_and_hub_names_stay(study, tmp_path):
    more = {"general": {"source": "docs"}, "holdout": "owner/name", "related": {"source": "owner/other", "subset": "en"}}
    spec = parse_study(study(**more), tmp_path)
    assert spec.corpus.forget.source == str(tmp_path / "forget.jsonl")
    assert spec.corpus.general.source == str(tmp_path / "docs")
    assert spec.corpus.general.split == "train"
    assert fetched_sources(spec.corpus) == [("holdout.source", "owner/name"), ("related.source", "owner/other")]
    assert len(path_sites(study(**more)["corpus"])) == 5


def test_a_path_and_a_mapping_with_it_are_the_same_study(study, tmp_path):
    one, other = parse_study(study(), tmp_path), parse_study(study(forget={"source": "./forget.jsonl"}), tmp_path)
    assert one.corpus == other.corpus
    payload = one.fingerprint_payload()
    assert "source" not in payload["corpus"]["forget"]
    assert StudySpec.recorded(json.loads(one.model_dump_json())) == one


def test_the_corpus_is_loaded_with_the_seed(study, tmp_path):
    spec = parse_study(study({"seed": 4}), tmp_path)
    corpus = spec.corpus.load(spec.seed)
    assert "seed=4" in corpus.name
    assert set(corpus.sets) == {"forget", "retain"}


def test_the_definition_counts_words_of_any_script_unless_given(study, tmp_path):
    assert parse_study(study(), tmp_path).definition == "tofu-unicode"
    assert parse_study(study({"scoring": {"batch_size": 4}}), tmp_path).definition == "tofu-unicode"
    assert parse_study(study({"scoring": {"definition": "tofu"}}), tmp_path).definition == "tofu"
    assert parse_study(yaml.safe_load((STUDIES / "quickstart.yaml").read_text())).definition == "tofu"


@pytest.mark.parametrize(
    ("corpus", "key", "expected"),
    [
        ({"forget": "none.jsonl"}, "corpus.forget", "there is no file"),
        ({"forget": "./none"}, "corpus.forget", "there is no folder"),
        ({"forget": "own.docx"}, "corpus.forget", "files here end in .parquet, .jsonl, .json, .csv, .txt, .md"),
        ({"forget": "nowhere"}, "corpus.forget.source", "Write ./nowhere"),
        ({"forget": 3}, "corpus.forget", "found 3"),
        ({"retain": {"source": "none.md"}}, "corpus.retain.source", "there is no file"),
        ({"retain": {"sauce": "a/b"}}, "corpus.retain.sauce", "Did you mean corpus.retain.source?"),
        ({"retain": {"source": "a/b", "split": "../x"}}, "corpus.retain.split", "inside the data set"),
        ({"forgett": "a/b"}, "corpus.forgett", "Did you mean corpus.forget?"),
        ({"prompt_words": 0}, "corpus.prompt_words", "at least 1"),
    ],
)
def test_wrong_values_are_named_with_their_remedy(study, tmp_path, corpus, key, expected):
    found = problems(study(**corpus), tmp_path)
    assert expected in found[key]
    assert "TOFU" not in found[key]


def test_forget_and_retain_are_needed(study, tmp_path):
    data = study()
    del data["corpus"]["forget"], data["corpus"]["retain"]
    assert set(problems(data, tmp_path)) == {"corpus.forget", "corpus.retain"}


def test_what_else_does_not_fit_the_data(study, tmp_path):
    tiny = yaml.safe_load((STUDIES / "quickstart.yaml").read_text())["model"]
    assert "no texts for a base stage" in problems(study({"model": tiny}), tmp_path)["model.base"]
    parse_study(study({"model": {**tiny, "base": None}}), tmp_path)
    third = {"search": {"third_objective": "related_log10_forget_quality"}}
    assert "Give corpus.related" in problems(study(third), tmp_path)["search.third_objective"]
    parse_study(study({"objectives": {"third": "related_extraction_strength"}}, related="forget.jsonl"), tmp_path)
