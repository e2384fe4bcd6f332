"""Code that comes with a model runs only where a file asks for it and whoever starts the command allows it."""

import json

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from search.evaluation.inputs import check_inputs
from search.spec.study import load_study


@pytest.fixture
def study_with_code(write_study, llama3, tmp_path, monkeypatch):
    """A study over a model whose code leaves a mark when it is imported, and where that mark would be."""
    from transformers.utils import hub

    monkeypatch.setattr(hub, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody must be asked"))
    folder, mark = tmp_path / "model", tmp_path / "imported"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **shape)).save_pretrained(folder)
    llama3.of_words(["a", "b"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling.StrangeConfig", "AutoModelForCausalLM": "modeling.StrangeLlama"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "strange_llama", "auto_map": own}))
    (folder / "modeling.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange_llama'\n"
        "class StrangeLlama(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    place = {"kind": "pretrained", "initial": str(folder), "retain": str(folder), "trust_remote_code": True}
    methods = {"rmu": {"layer": 1}}  # for which the number of layers is asked
    file = write_study(
        tmp_path / "study.yaml",
        model=place,
        unlearning={"methods": methods},
        checkpoints={"given": [str(folder)]},
    )
    return file, mark


def recipe_of(file, folder):
    """A recipe as somebody else might send it, with a fingerprint that cannot be right."""
    spec = load_study(file)
    content = {
        "uipe_recipe": 1,
        "fingerprint": "0" * 32,
        "point": {"trial": 0, "base": "given", "epoch": 1, "alpha": 0.5},
        "expected": {"model_utility": 0.5, "ks_statistic": 0.5},
        "provenance": {},
        "study": spec.model_dump(mode="json", exclude={"resources", "budget", "warm_start", "storage", "cache"}),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_key_in_a_file_runs_no_code(study_with_code, call, tmp_path):
    file, mark = study_with_code
    recipe = recipe_of(file, tmp_path)
    for command in (
        ("rebuild", recipe, "--to", tmp_path / "rebuilt"),
        ("run", file, "--out", tmp_path / "out"),
        ("plan", file),
    ):
        code, _, error = call(*command)
        assert code == 2
        assert "model.trust_remote_code: true in a file runs nothing by itself" in error
        assert "--trust-remote-code" in error
        assert not mark.exists()


def test_validate_never_runs_code_and_says_so(study_with_code, call):
    file, mark = study_with_code
    code, output, error = call("validate", file)
    assert code == 0, error
    assert "brings code of its own, so it is checked when the study runs" in output
    assert check_inputs(load_study(file))
    assert not mark.exists()


def test_the_option_without_the_key_runs_no_code_either(study_with_code, call, tmp_path):
    file, mark = study_with_code
    file.write_text(file.read_text().replace("trust_remote_code: true", "trust_remote_code: false"))
    code, _, error = call("plan", file, "--trust-remote-code")
    assert code == 2 and "cannot be" in error
    assert not mark.exists()


def test_both_together_run_it(study_with_code, call, tmp_path):
    file, mark = study_with_code
    code, _, error = call("rebuild", recipe_of(file, tmp_path), "--to", tmp_path / "rebuilt", "--trust-remote-code")
    assert code == 2 and "another fingerprint" in error
    assert mark.exists()
