"""Exported adapters name the model they belong on as the user did; plain PEFT loads them where that name leads somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from search.evaluation.evaluator import Evaluator, StudyContext
from search.evaluation.prepared import prepare
from search.problem.trial import TrialSpec
from search.results.export import export
from search.results.recipe import Recipe
from search.spec.study import load_study
from uipe_core.deltas.store import DeltaStore
from uipe_core.logs.tofu import read_log
from uipe_core.models.loading import BASE_FOLDER, load_model, model_identity
from uipe_core.models.tiny import tiny_model
from uipe_core.unlearning.training import train_base_run

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NUMBERS = ("model_utility", "forget_quality", "log10_forget_quality", "ks_statistic")

LOGITS = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = AutoTokenizer.from_pretrained(sys.argv[1])("Where does the baker live ?", return_tensors="pt")["input_ids"]
with torch.no_grad():
    print(json.dumps(model(ids).logits[0, -1].tolist()))
"""


@pytest.fixture(scope="module")
def built(preparation, tmp_path_factory):
    """The tiny study's initial model, in a folder of its own."""
    folder = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
    return shutil.copytree(folder, tmp_path_factory.mktemp("models") / "initial", ignore=lambda *_: ["manifest.json"])


@pytest.fixture
def low_rank(finished, write_study, tmp_path):
    """Makes the recipe of a scored low-rank trial of a study with this model section."""

    def make(**changes):
        log = finished.out / "logs" / "retain.json"
        unlearning = {"adapter": {"rank": 4, "alpha": 8}, "methods": {"npo": {"beta": 1}}, "epochs": 1, "learning_rate": 0.02}
        prepared = prepare(load_study(write_study(tmp_path / "study.yaml", unlearning=unlearning, split=None, **changes)))
        source, run = prepared.models.ready_source("initial"), prepared.spec.variants()[0]
        config = prepared.unlearning(run)
        training = train_base_run(source.load(), prepared.corpus, config)
        entry = DeltaStore(prepared.delta_root).get_or_train(prepared.base_run_inputs(config), training)
        context = StudyContext(
            corpus=prepared.corpus,
            split=prepared.split,
            source=source,
            deltas=prepared.delta_root,
            references={"retain": read_log(log), "initial": read_log(finished.out / "logs" / "initial.json")},
            scoring=prepared.scoring,
            definition="tofu",
            objectives=prepared.spec.maximised,
            seed=0,
            threads=1,
        )
        metrics, _ = Evaluator(context).evaluate(TrialSpec("search", base=run.label, epoch=1, alpha=0.5, delta=entry.keys))
        expected = {"definition": "tofu", **{name: metrics.numbers[name] for name in NUMBERS}}
        provenance = {"corpus": "people", "models": dict(prepared.models.identities), "versions": {}}
        recipe = Recipe(prepared.spec, prepared.fingerprint, 3, run.label, 1, 0.5, expected, provenance)
        return recipe, read_log(log)

    return make


def logits(model, cwd, **environment):
    """What plain PEFT computes in another process."""
    blocked = "import sys; sys.modules['search'] = sys.modules['uipe_core'] = None\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked + LOGITS, str(model)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def own_logits(folder):
    import torch

    loaded = load_model(str(folder))
    ids = loaded.tokenizer("Where does the baker live ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return loaded.model(ids).logits[0, -1].tolist()


def named(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_base_model_of_a_study_that_built_it_travels_with_the_adapter(low_rank, place, tmp_path):
    recipe, reference = low_rank()
    folder = export(recipe, tmp_path / "adapter", "adapter", reference)
    assert named(folder)["base_model_name_or_path"] == f"./{BASE_FOLDER}"
    for path in folder.rglob("*.json"):
        assert str(place["cache"]) not in path.read_text(), path
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    moved = folder.rename(tmp_path / "elsewhere")
    expected = logits(".", moved)
    assert own_logits(moved) == pytest.approx(expected, abs=1e-5)
    plain = load_model(str(moved / BASE_FOLDER))
    assert max(abs(a - b) for a, b in zip(own_logits(moved / BASE_FOLDER), expected, strict=True)) > 1e-3
    assert not (moved / BASE_FOLDER / "manifest.json").exists() and plain.model.config.model_type == "llama"
    before = model_identity(str(moved))
    (moved / BASE_FOLDER / "config.json").write_text((moved / BASE_FOLDER / "config.json").read_text() + "\n")
    assert model_identity(str(moved)) != before


def test_a_base_model_below_the_current_folder_is_named_from_there(low_rank, built, finished, tmp_path, monkeypatch):
    model = {"kind": "pretrained", "initial": str(built), "retain": str(finished.out / "logs" / "retain.json"), "device": "cpu"}
    recipe, reference = low_rank(model=model, scoring={"temperatures": []})
    monkeypatch.chdir(built.parent)
    folder = export(recipe, tmp_path / "adapter", "adapter", reference)
    assert named(folder)["base_model_name_or_path"] == "./initial"
    assert own_logits(folder) == pytest.approx(logits(folder, built.parent), abs=1e-5)
    monkeypatch.chdir(tmp_path)
    there = export(recipe, tmp_path / "another", "adapter", reference)
    assert named(there)["base_model_name_or_path"] == str(built)


def test_a_base_model_of_the_hub_is_named_with_its_commit(low_rank, built, finished, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    repository = hub / "models--maker--small"
    shutil.copytree(built, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    model = {"kind": "pretrained", "initial": "maker/small", "retain": str(finished.out / "logs" / "retain.json")}
    recipe, reference = low_rank(model={**model, "device": "cpu"}, scoring={"temperatures": []})
    folder = export(recipe, tmp_path / "adapter", "adapter", reference)
    assert (named(folder)["base_model_name_or_path"], named(folder)["revision"]) == ("maker/small", COMMIT)
    expected = logits(folder, tmp_path, HF_HUB_CACHE=str(hub))
    # The name alone would be another model from now on.
    (repository / "refs" / "main").write_text(COMMIT[::-1])
    assert own_logits(folder) == pytest.approx(expected, abs=1e-5)
