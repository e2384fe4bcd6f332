"""Model cards: what the hub reads of them, what their text says, and that their code runs."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from search.results import card as cards
from search.results.card import Start, card
from search.results.recipe import recipe_of
from search.results.verification import Compared, Verified
from search.spec.study import parse_study

ROWS = {"model utility": "0.7417", "forget quality (p)": "0.012", "Prob Forget": "0.0432", "odd": "no"}


@pytest.fixture(scope="module")
def recipe(result):
    return recipe_of(result.store.record, result.spec, result.trials.iloc[0].to_dict())


@pytest.fixture
def of_pretrained(recipe, write_study, tmp_path):
    """Makes the recipe of a study whose initial model is this one."""
    import yaml

    def make(initial, **model):
        study = yaml.safe_load(write_study(tmp_path / "study.yaml").read_text())
        study["model"] = {"kind": "pretrained", "initial": str(initial), "retain": None, **model}
        study["scoring"] = {**study["scoring"], "temperatures": []}
        return replace(recipe, spec=parse_study({**study, "objectives": {}}, tmp_path))

    return make


def written(recipe, folder, verified=None, **options):
    given = verified or Verified("loss", "float32", (), ROWS, ROWS, {})
    return card(recipe, given, "model", "Full model", "transformers", folder, "exported", **options)


def code_of(text):
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(found)
    return found


def run(code, cwd):
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(result, tmp_path_factory):
    return result.export(result.trials.iloc[0], tmp_path_factory.mktemp("exports") / "a model", "model", verify="full")


def test_the_hubs_client_reads_every_number_of_a_card_with_its_definition(exported, result):
    read = ModelCard.load(exported / "README.md")
    again = ModelCard(f"---\n{read.data.to_yaml()}\n---\n{read.text}")
    assert again.data.to_dict() == read.data.to_dict()
    data = read.data
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", "en")
    assert data.base_model is None and data.license is None and data.datasets is None
    assert {"unlearning", "uipe", result.trials.iloc[0]["method"]} <= set(data.tags)
    table = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in read.text.splitlines() if line.startswith("| ")}
    own = [each for each in data.eval_results if each.dataset_split == "items trials are scored on"]
    assert {each.metric_name: each.metric_value for each in own}["model utility"] == float(table["model utility"])
    assert all(float(table[each.metric_name]) == each.metric_value for each in own) and len(own) > 20
    assert {each.dataset_split for each in data.eval_results} == {"items trials are scored on", "held-out items"}
    assert {each.metric_args["definition"] for each in data.eval_results} == {"tofu"}
    assert not [each.metric_name for each in data.eval_results if "docs/metrics" in each.metric_args["meaning"]]
    (index,) = eval_results_to_model_index(data.model_name, data.eval_results)
    assert index["name"] == f"tiny-{result.trials.iloc[0]['trial']}"
    for part in index["results"]:
        assert all(isinstance(part["dataset"][key], str) for key in ("type", "name")) and part["task"]["type"]
        assert all(isinstance(each["type"], str) and each["value"] is not None for each in part["metrics"])


@pytest.mark.slow
def test_the_code_of_a_card_of_a_model_runs(exported):
    assert run(code_of((exported / "README.md").read_text()), exported.parent).strip()


def test_what_validation_would_send_is_the_card(exported, monkeypatch):
    sent = []

    class Answer:
        status_code = 200

        def raise_for_status(self):
            pass

    class Session:
        def post(self, url, json, headers):
            sent.append((url, json))
            return Answer()

    monkeypatch.setattr("huggingface_hub.repocard.get_session", Session)
    monkeypatch.setattr("huggingface_hub.repocard.hf_raise_for_status", lambda answer: None)
    ModelCard.load(exported / "README.md").validate()
    ((url, body),) = sent
    assert url.endswith("/api/validate-yaml") and body["repoType"] == "model"
    assert body["content"] == (exported / "README.md").read_text()


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        ("license: llama3.2\nlanguage: [en, de]\n", {"license": "llama3.2", "language": ["en", "de"]}),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE\n", {"license": "other", "license_name": "own"}),
        ("language: 5\nlicense: [mit]\n", {}),
        ("license: [", {}),
        ("- a list\n", {}),
    ],
)
def test_licence_and_language_are_those_of_the_base_models_card(of_pretrained, tmp_path, stated, read):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{stated}---\n# A model\n")
    text = written(of_pretrained(tmp_path / "base"), tmp_path)
    data = ModelCard(text).data
    assert {key: data.get(key) for key in read} == read
    assert data.base_model is None and str(tmp_path) not in text
    assert "starts from: a local folder, `base`" in text
    assert ("no card of the model it starts from was here" in text) == (not read)


def test_a_card_that_is_no_text_is_left_aside(of_pretrained, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_bytes(b"\xff\xfe\x00---\n")
    assert Start.of(of_pretrained(tmp_path / "base").spec).stated == {}


def test_a_model_of_the_hub_is_named_as_the_user_named_it(of_pretrained, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--maker--small" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "models--maker--small" / "refs").mkdir()
    (tmp_path / "models--maker--small" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    data = ModelCard(written(of_pretrained("maker/small"), tmp_path)).data
    assert (data.base_model, data.license) == ("maker/small", "mit")
    (snapshot / "README.md").unlink()
    absent = tmp_path / "models--maker--small" / ".no_exist" / commit / "README.md"
    absent.parent.mkdir(parents=True)
    absent.touch()
    data = ModelCard(written(of_pretrained("maker/small"), tmp_path)).data
    assert (data.base_model, data.license) == ("maker/small", None)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"prompt_format": "llama2"}, "'[INST] {question} [/INST]'.replace("),
        ({"prompt_format": "phi"}, "'Question: {question}\\nAnswer: '.replace("),
        ({"prompt_format": "llama3"}, '"role": "system", "content": \'You are a helpful assistant.\''),
        ({"prompt_template": "Say '`{question}`':\n"}, ".replace("),
        ({}, "date_string='10 Apr 2025'"),
        ({"trust_remote_code": True}, "trust_remote_code=True"),
    ],
)
def test_questions_are_asked_as_trials_are(of_pretrained, tmp_path, model, said):
    code = code_of(written(of_pretrained("maker/small", **model), tmp_path))
    assert said in code
    lines = [line for line in code.splitlines() if line.startswith(("question =", "text ="))]
    if any(line.startswith("text =") for line in lines):
        scope = {}
        exec("\n".join(lines), scope)
        assert "What is the capital of France?" in scope["text"] and "{" not in scope["text"]


def test_a_model_that_a_test_tells_from_a_retrained_one_says_so(recipe, tmp_path):
    assert "**Distinguishable from a retrained model (p = 0.012" in written(recipe, tmp_path)
    alike = Verified("loss", "float32", (), ROWS, {**ROWS, "forget quality (p)": "0.4"}, {})
    assert "Not distinguished from a retrained model (p = 0.4" in written(recipe, tmp_path, alike)


def test_numbers_that_a_merged_model_did_not_show_are_not_given_as_its_own(recipe, tmp_path):
    own = Verified("loss", "float32", (Compared("x", 1.0, 2.0, 1.0, None),), ROWS, {"Prob Forget": "0.05"}, {})
    names = {each.metric_name: each.metric_value for each in ModelCard(written(recipe, tmp_path, own)).data.eval_results}
    assert names == {"Prob Forget": 0.05}
    unchecked = written(recipe, tmp_path, Verified("none"))
    assert "model_utility" in {each.metric_type for each in ModelCard(unchecked).data.eval_results}
    assert "was not checked" in unchecked


def test_what_comes_from_elsewhere_stays_in_its_place(recipe, of_pretrained, tmp_path):
    (tmp_path / "a `b` | c").mkdir()
    text = written(of_pretrained(tmp_path / "a `b` | c"), tmp_path, audits=[["audit"], ["tasks | more\nlines"]])
    assert "`a 'b' | c`" in text and "| tasks \\| more lines |" in text
    assert cards._code("one\n---\n# two") == "`one --- # two`"


def test_the_code_for_an_adapter_names_its_base_model(recipe, tmp_path):
    def adapter(**named):
        (tmp_path / "adapter_config.json").write_text(json.dumps(named))
        return code_of(written(recipe, tmp_path))

    assert "from_pretrained('maker/small', revision='abc'" in adapter(base_model_name_or_path="maker/small", revision="abc")
    assert "from_pretrained('./initial'" in adapter(base_model_name_or_path="./initial", revision=None)
    assert "from_pretrained('initial'" in adapter(base_model_name_or_path="/home/me/initial")
    (tmp_path / "base_model").mkdir()
    assert 'from_pretrained(f"{place}/base_model"' in adapter(base_model_name_or_path="./base_model")
    on_hub = code_of(card(recipe, Verified("none"), "adapter", "Adapter", "peft", tmp_path, "me/adapter", on_hub=True))
    assert "place = snapshot_download('me/adapter')" in on_hub
