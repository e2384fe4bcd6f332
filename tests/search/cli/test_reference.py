"""What a study file may hold: the list of objectives, and the JSON schema of study files."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from search.cli.reference import study_schema
from search.problem.objectives import ROLES, objective_named
from search.spec.errors import StudyFileError
from search.spec.study import parse_study

STUDIES = Path(__file__).parents[3] / "studies"
SHIPPED = sorted(STUDIES.glob("*.yaml"))
FIRST_LINE = "# yaml-language-server: $schema=study.schema.json"


def content(path):
    return YAML(typ="safe").load(path.read_text())


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="checking by a schema needs the package jsonschema")
    return jsonschema.Draft202012Validator(study_schema())


# uipe objectives


def test_objectives_are_listed_by_role_and_fit_80_columns(call, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, output, _ = call("objectives")
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    assert all(name in output for known in ROLES.values() for name in known)
    assert "package.module:function" in output and "def function(scores, references)" in output


def test_objectives_as_json_say_what_each_needs_and_costs(call):
    code, output, _ = call("objectives", "--json")
    assert code == 0
    shown = json.loads(output)
    by_name = {(each["role"], each["name"]): each for each in shown["objectives"]}
    assert {role: [name for at, name in by_name if at == role] for role in ROLES} == {
        role: list(known) for role, known in ROLES.items()
    }
    quality = by_name["forgetting", "log10_forget_quality"]
    assert (quality["needs_retain_model"], quality["sets"], quality["price"]) == (True, ["forget"], "losses")
    assert by_name["forgetting", "rouge"]["price"] == "generated text"
    assert by_name["forgetting", "memorization"]["price"] == "losses"
    assert by_name["utility", "lm_eval"]["price"] == "other"
    kept = by_name["utility", "retain_utility"]
    assert (kept["sets"], kept["optional_sets"], kept["price"]) == (["retain"], ["general"], "generated text")
    assert by_name["third", "related_log10_forget_quality"]["needs_retain_model"]
    assert {each["direction"] for each in by_name.values()} == {"maximize"}
    assert all(each["about"] for each in by_name.values())
    assert shown["own"]["name"] == "package.module:function"


def test_the_example_of_an_own_objective_is_computed_as_the_list_says(tmp_path, monkeypatch):
    import numpy as np

    from search.evaluation.metrics import own_value
    from uipe_core.metrics.scores import ScoreReport

    class Scores(ScoreReport):
        def __init__(self, loss):
            object.__setattr__(self, "loss", loss)

        def arrays(self):
            return {"forget/answer_loss": np.array(self.loss)}

    text = "def grown(scores, references):\n"
    text += "    key = 'forget/answer_loss'\n    return (scores[key] - references['initial'][key]).mean()\n"
    (tmp_path / "own_objectives.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_objectives:grown"
    assert objective_named("forgetting", name).function == name
    assert own_value(name, Scores([3.0, 5.0]), {"initial": Scores([1.0, 1.0])}) == 3.0


# uipe schema


def test_the_committed_schema_is_what_the_command_prints(call):
    code, output, _ = call("schema")
    assert code == 0
    assert output == (STUDIES / "study.schema.json").read_text(), "run: uipe schema > studies/study.schema.json"


def test_the_schema_is_valid_itself(validator):
    validator.check_schema(validator.schema)
    assert validator.schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_validates_and_names_the_schema(path, validator):
    assert path.read_text().splitlines()[0] == FIRST_LINE
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content(path))] == []


def changed(keys, value):
    study = copy.deepcopy(content(STUDIES / "quickstart.yaml"))
    holder = study
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    return study


WRONG = {
    "an unknown key": (("typo",), 1),
    "an unknown key of the corpus": (("corpus", "forget_persons"), 6),
    "another kind of corpus": (("corpus", "kind"), "tofus"),
    "an unknown method": (("unlearning", "methods", "npoo"), {}),
    "a hyperparameter of another method": (("unlearning", "methods", "npo"), {"layer": 1}),
    "a value out of bounds": (("unlearning", "methods", "npo"), {"beta": 0}),
    "an empty list": (("unlearning", "learning_rate"), []),
    "an unknown sampler": (("search", "sampler"), "lines"),
    "an unknown definition": (("scoring", "definition"), "rouge"),
    "a text for a number": (("search", "trials"), "many"),
    "an unknown objective": (("objectives",), {"forgetting": "forget_quality"}),
}


@pytest.mark.parametrize("keys, value", WRONG.values(), ids=WRONG)
def test_what_the_checks_of_a_study_refuse_the_schema_refuses_too(keys, value, validator):
    study = changed(keys, value)
    with pytest.raises(StudyFileError):
        parse_study(study)
    assert not validator.is_valid(study)


RIGHT = {
    "one value for a list": (("model", "other_retain_seeds"), 1),
    "a list of values": (("unlearning", "methods", "npo"), {"beta": [0.1, 1]}),
    "a method without settings": (("unlearning", "methods", "grad_diff"), None),
    "a batch size that is found": (("scoring", "batch_size"), "auto"),
    "an own objective": (("objectives",), {"forgetting": "my_package.metrics:forgotten"}),
    "a folder to start from": (("warm_start",), []),
}


@pytest.mark.parametrize("keys, value", RIGHT.values(), ids=RIGHT)
def test_what_a_study_may_say_the_schema_accepts(keys, value, validator):
    study = changed(keys, value)
    parse_study(study)
    assert [error.message for error in validator.iter_errors(study)] == []


def test_own_data_may_be_a_path_or_a_source(validator):
    corpus = {"kind": "questions", "forget": "forget.jsonl", "retain": {"source": "owner/name", "subset": "en"}}
    model = {"kind": "pretrained", "initial": "./model", "prompt_format": "chat"}
    study = {**content(STUDIES / "quickstart.yaml"), "corpus": corpus, "model": model}
    assert [error.message for error in validator.iter_errors(study)] == []
    assert not validator.is_valid({**study, "corpus": {**corpus, "retain": {"subset": "en"}}})


def test_a_corpus_that_is_added_is_in_the_schema(monkeypatch):
    from typing import ClassVar, Literal

    from search.spec.corpora import CORPORA, FREE_TEXT
    from search.spec.sections import Section

    class Village(Section):
        task: ClassVar = FREE_TEXT
        kind: Literal["village"]
        people: int = 12

    monkeypatch.setitem(CORPORA, "village", Village)
    assert "village" in json.dumps(study_schema()["$defs"]["Village"]["properties"]["kind"])


@pytest.mark.parametrize("command", ["objectives", "schema"])
def test_no_heavy_library_is_imported(command):
    code = (
        "import sys\nfrom search.cli.main import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    )
    code += "print([name for name in ('torch', 'transformers', 'ray', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
