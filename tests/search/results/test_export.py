"""Exports of real trials: rebuilt from nothing, loaded by strangers, and withdrawn when their numbers are not the trial's."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from search.results import export as exporting
from search.results.export import export
from search.results.recipe import Recipe, read_recipe, recipe_of
from uipe_core.deltas.store import DeltaStore
from uipe_core.errors import ExportMismatchError, UserError
from uipe_core.models.tiny import tiny_model


def weights(folder):
    return load_file(folder / "model.safetensors")


def umask():
    """What this process takes from the modes of its files."""
    current = os.umask(0)
    os.umask(current)
    return current


def strange_python(script, *arguments):
    """Runs a script in a fresh interpreter in which our packages cannot be imported."""
    blocked = "import sys; sys.modules['search'] = sys.modules['uipe_core'] = None\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked + script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def row(result):
    """A trial that left alpha = 0."""
    return result.trials[result.trials["alpha"] != 0].iloc[0]


@pytest.fixture(scope="module")
def exported(result, row, tmp_path_factory):
    return result.export(row, tmp_path_factory.mktemp("exports") / "a model", "model")


@pytest.fixture
def recipe(result, row):
    return recipe_of(result.store.record, result.spec, row.to_dict())


def test_a_model_export_is_a_complete_model_folder(exported, row):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "recipe.yaml"} <= names
    card = (exported / "README.md").read_text()
    assert f"trial {row['trial']}" in card
    assert f"{row['model_utility']:.4f}" in card


def test_exported_weights_are_the_walk_itself(exported, row, preparation):
    folder = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
    initial = weights(folder)
    run = next(run for run in preparation.spec.variants() if run.label == row["base"])
    update = (
        DeltaStore(preparation.delta_root)
        .find(preparation.base_run_inputs(preparation.unlearning(run)))
        .load(int(row["epoch"]))
    )
    for name, tensor in weights(exported).items():
        assert torch.equal(tensor, torch.add(initial[name], update.tensors[name], alpha=1 + row["alpha"])), name


def test_at_alpha_zero_the_export_is_the_unlearned_epoch(result, preparation, tmp_path):
    row = result.trials[result.trials["alpha"] == 0].iloc[1]
    folder = result.export(row, tmp_path / "zero", "model")
    initial = weights(tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store))
    run = next(run for run in preparation.spec.variants() if run.label == row["base"])
    update = (
        DeltaStore(preparation.delta_root)
        .find(preparation.base_run_inputs(preparation.unlearning(run)))
        .load(int(row["epoch"]))
    )
    assert all(torch.equal(tensor, initial[name] + update.tensors[name]) for name, tensor in weights(folder).items())


def test_a_recipe_rebuilds_the_same_weights_from_nothing(exported, row, result, call, monkeypatch, tmp_path):
    recipe = result.export(row, tmp_path / "recipe", "recipe") / "recipe.yaml"
    monkeypatch.setenv("UIPE_CACHE", str(tmp_path / "empty"))
    code, output, error = call("rebuild", recipe, "--to", tmp_path / "rebuilt")
    assert code == 0, error
    assert "rebuilt and checked" in output
    assert "scoring the export ..." in error and "scoring the held-out items: " in error and "ks_statistic: trial " in error
    again = weights(tmp_path / "rebuilt")
    assert again.keys() == weights(exported).keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(exported).items())


def test_plain_transformers_load_and_generate(exported):
    script = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "In which country is Lisbon?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
print(json.dumps({"text": text, "parameters": model.num_parameters()}))
"""
    answer = strange_python(script, exported)
    assert len(answer["text"]) > len("In which country is Lisbon?")
    assert answer["parameters"] == sum(tensor.numel() for tensor in weights(exported).values())


def test_an_adapter_is_loaded_by_peft_and_already_scaled(finished, write_study, place, tmp_path):
    from search.evaluation.prepared import prepare
    from search.spec.study import load_study
    from uipe_core.deltas.extrapolation import Extrapolator
    from uipe_core.logs.tofu import read_log
    from uipe_core.metrics.tofu import evaluate
    from uipe_core.scoring.scorer import Scorer
    from uipe_core.unlearning.training import train_base_run

    unlearning = {"adapter": {"rank": 4, "alpha": 8}, "methods": {"npo": {"beta": 1}}, "epochs": 1, "learning_rate": 0.02}
    preparation = prepare(load_study(write_study(tmp_path / "lora.yaml", unlearning=unlearning, split=None)))
    source = preparation.models.source(
        "initial", str(tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store))
    )
    run = preparation.spec.variants()[0]
    training = train_base_run(source.load(), preparation.corpus, preparation.unlearning(run))
    update = (
        DeltaStore(preparation.delta_root)
        .get_or_train(preparation.base_run_inputs(preparation.unlearning(run)), training)
        .load(1)
    )
    loaded = source.load()
    loaded.model = Extrapolator(loaded.model).apply(update, 0.75)
    reference = read_log(finished.out / "logs" / "retain.json")
    report = Scorer(preparation.corpus, loaded.prompts, preparation.scoring).score(loaded)
    metrics = evaluate(report, reference)
    expected = {"definition": "tofu", "model_utility": metrics.model_utility, **metrics.forget_quality.as_dict()}
    provenance = {"corpus": "people", "models": dict(preparation.models.identities), "versions": {}}
    recipe = Recipe(preparation.spec, preparation.fingerprint, 0, run.label, 1, 0.75, expected, provenance)
    folder = export(recipe, tmp_path / "adapter", "adapter", reference)
    merged = export(recipe, tmp_path / "model", "model", reference)

    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base_model"
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o666 & ~umask()}
    script = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload()
other = AutoModelForCausalLM.from_pretrained(sys.argv[3])
pairs = list(zip(model.state_dict().values(), other.state_dict().values(), strict=True))
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()
moved = max(float((a - b).abs().max()) for a, b in zip(model.state_dict().values(), plain.values(), strict=True))
print(json.dumps({"apart": max(float((a - b).abs().max()) for a, b in pairs), "moved": moved}))
"""
    seen = strange_python(script, folder / "base_model", folder, merged)
    assert seen["apart"] < 1e-6 < 1e-3 < seen["moved"]


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        ("full", r"model_utility: trial 0\.\d+, export 0\.\d+, apart by \d"),
        ("loss", r"item losses.*: apart by \d.*allowed 0\.0001"),
    ],
)
def test_one_altered_weight_withdraws_the_export_and_says_by_how_much(result, row, recipe, tmp_path, monkeypatch, verify, said):
    model = exporting.EXPORTERS["model"]

    def sabotaged(*arguments):
        model.write(*arguments)
        path = next(path for path in arguments if hasattr(path, "is_dir")) / "model.safetensors"
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 1.5
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setitem(exporting.EXPORTERS, "model", replace(model, write=sabotaged))
    with pytest.raises(ExportMismatchError, match=said):
        result.export(row, tmp_path / "out", "model", verify=verify)
    with pytest.raises(ExportMismatchError, match=r"Prob Retain: trial 0\.\d+, export"):
        export(recipe, tmp_path / "out", "model")
    assert list(tmp_path.iterdir()) == []


def test_another_alpha_withdraws_the_export(recipe, tmp_path):
    with pytest.raises(ExportMismatchError, match="apart by"):
        export(replace(recipe, alpha=recipe.alpha - 3.0), tmp_path / "out", "model")
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_ends_the_command_with_1_and_no_traceback(result, row, call, tmp_path):
    path = result.export(row, tmp_path / "recipe", "recipe") / "recipe.yaml"
    content = yaml.safe_load(path.read_text())
    content["expected"]["model_utility"] += 0.01
    path.write_text(yaml.safe_dump(content))
    code, _, error = call("rebuild", path, "--to", tmp_path / "out", "--verify", "full")
    assert code == 1
    assert "apart by 0.01" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(recipe, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    for target in (tmp_path / "used", tmp_path / "used" / "file"):
        with pytest.raises(UserError, match="choose another"):
            export(recipe, target, "recipe")
    assert (tmp_path / "used" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (export(recipe, tmp_path / "empty", "recipe") / "recipe.yaml").is_file()


def test_a_place_that_cannot_be_written_is_refused(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--to"):
        export(recipe, tmp_path / "file" / "below", "recipe")


def test_an_adapter_of_a_full_fine_tuning_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        export(recipe, tmp_path / "out", "adapter")
    with pytest.raises(UserError, match="--as: 'zip' is unknown"):
        export(recipe, tmp_path / "out", "zip")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_a_changed_world_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="fingerprint"):
        export(replace(recipe, fingerprint="0" * 32), tmp_path / "out", "model")


def test_a_recipe_survives_its_file(result, row, recipe, tmp_path):
    assert read_recipe(result.export(row, tmp_path / "recipe", "recipe") / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a recipe"),
        ("just text", "not a recipe"),
        ("uipe_recipe: 99", "not a recipe"),
        ("uipe_recipe: [", "not YAML"),
        ("uipe_recipe: 1\npoint: {trial: 1}", "damaged"),
        (b"\xff\xfe\x00\x01", "not YAML"),
    ],
)
def test_damaged_and_foreign_recipes_are_refused_by_name(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("change", ["study", "alpha", "base", "epoch", "expected"])
def test_a_recipe_with_a_broken_part_is_refused(result, row, tmp_path, call, change):
    path = result.export(row, tmp_path / "recipe", "recipe") / "recipe.yaml"
    content = yaml.safe_load(path.read_text())
    if change == "study":
        content["study"]["unlearning"]["epochs"] = "two"
    elif change == "expected":
        del content["expected"]["ks_statistic"]
    else:
        content["point"][change] = {"alpha": float("nan"), "base": "no_such_method", "epoch": 9}[change]
    path.write_text(yaml.safe_dump(content))
    code, _, error = call("rebuild", path, "--to", tmp_path / "out")
    assert code == 2
    assert "damaged" in error and change in error.replace("ks_statistic", "expected").replace("epochs", "study")
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_recipe(tmp_path / "recipe.yaml")
