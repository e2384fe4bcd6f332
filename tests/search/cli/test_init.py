"""`uipe init`: a first study file for a model and data of one's own, read back and checked before it is put in place."""

import io
import sys
from dataclasses import replace

import pytest
import torch
from ruamel.yaml import YAML

from search.cli.draft import Draft, SeenModel
from search.spec.study import load_study
from uipe_core.scoring import half_precision


class Terminal(io.StringIO):
    """Standard input of somebody who answers."""

    def isatty(self):
        return True


@pytest.fixture
def world(base, own_data, tmp_path):
    """A folder with a model and data, as a user has it."""
    import shutil

    shutil.copytree(base, tmp_path / "model")
    for path in own_data:
        shutil.copy(path, tmp_path)
    return tmp_path


def options(world, **more):
    given = {"model": world / "model", "forget": world / "forget.jsonl", "retain": world / "retain.jsonl"}
    given = {**given, "to": world / "study.yaml", **more}
    return [part for name, value in given.items() if value is not None for part in (f"--{name.replace('_', '-')}", value)]


def content(path):
    return YAML(typ="safe").load(path.read_text())


def test_what_can_be_seen_is_written_and_validates(world, call):
    code, output, error = call("init", *options(world), "--yes")
    assert code == 0, error
    study = content(world / "study.yaml")
    assert study["corpus"] == {"kind": "questions", "forget": "./forget.jsonl", "retain": "./retain.jsonl"}
    assert study["model"]["initial"] == "./model"
    assert (study["model"]["kind"], study["model"]["dtype"], study["model"]["prompt_format"]) == (
        "pretrained",
        "float32",
        "chat",
    )
    assert study["objectives"] == {"forgetting": "memorization", "utility": "retain_utility"}
    assert study["unlearning"]["adapter"] is None and list(study["unlearning"]["methods"]) == ["grad_diff", "npo", "kl_min"]
    assert study["scoring"]["max_new_tokens"] == 8  # seven words and the end
    assert study["search"]["trials"] == 25
    assert "note: corpus.forget: 6 items" in output
    assert "Plan of study" in output and "from start to end" in output
    assert f"uipe run {world / 'study.yaml'}" in output
    code, output, error = call("validate", world / "study.yaml")
    assert code == 0, error
    assert "valid; 3 base runs of 5 epochs" in output
    assert sorted(path.name for path in world.iterdir()) == ["forget.jsonl", "model", "retain.jsonl", "study.yaml"]


@pytest.mark.parametrize(("speed", "dtype"), [(2.25, "bfloat16"), (1.1, "float32")])
def test_a_processor_that_is_faster_in_bfloat16_gets_it(world, call, monkeypatch, speed, dtype):
    monkeypatch.setattr(half_precision, "LARGE", 1000)
    monkeypatch.setattr(half_precision, "bfloat16_speed", lambda: speed)
    code, _, error = call("init", *options(world), "--yes")
    assert code == 0, error
    assert content(world / "study.yaml")["model"]["dtype"] == dtype
    assert ("measured here: 2.2 times as fast as float32" in (world / "study.yaml").read_text()) == (dtype == "bfloat16")
    # The plan of a study in float32 says so.
    text = (world / "study.yaml").read_text().replace("dtype: bfloat16", "dtype: float32")
    (world / "study.yaml").write_text(text)
    code, output, error = call("plan", world / "study.yaml")
    assert code == 0, error
    assert ("multiplies bfloat16 2.2 times as fast" in " ".join(output.split())) == (dtype == "bfloat16")


def test_a_retain_model_is_compared_with(world, base, call):
    code, _, error = call("init", *options(world, retain_model=base), "--yes")
    assert code == 0, error
    spec = load_study(world / "study.yaml")
    assert spec.model.retain == str(base)
    assert [objective.name for objective in spec.maximised] == ["log10_forget_quality", "retain_utility"]


def test_a_base_model_is_fine_tuned_by_the_study(world, call):
    code, _, error = call("init", *options(world), "--finetune", "--yes")
    assert code == 0, error
    spec = load_study(world / "study.yaml")
    assert (spec.model.kind, spec.model.base, spec.has_retain_model) == ("finetuned", str(world / "model"), True)
    assert spec.maximised[0].name == "log10_forget_quality"


def test_what_cannot_be_seen_is_asked_until_it_is_right(world, save_llama, call, monkeypatch):
    save_llama(world / "plain", chat=False, dtype=torch.bfloat16)
    answers = ["./nowhere", str(world / "plain"), "perhaps", "y", "none.jsonl", str(world / "forget.jsonl")]
    answers += [str(world / "retain.jsonl"), "", "chat", "lama2", "user : {question}"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    code, _, error = call("init", "--to", world / "study.yaml")
    assert code == 0, error
    assert "no such folder or GGUF file" in error and "no such file or folder" in error
    assert "Did you mean 'llama2'" in error and "no chat template" in error
    model = content(world / "study.yaml")["model"]
    assert model["prompt_template"] == "user : {question}" and "prompt_format" not in model
    assert model["dtype"] == "bfloat16" and "retain" not in model


def test_input_that_ends_writes_nothing(world, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(f"{world / 'model'}\n"))
    code, _, error = call("init", "--to", world / "study.yaml")
    assert code == 2 and "nothing was written" in error and not (world / "study.yaml").exists()


@pytest.mark.parametrize("yes", [(), ("--yes",)])
def test_without_a_terminal_everything_missing_is_named(world, call, monkeypatch, yes):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, error = call("init", "--model", world / "model", "--to", world / "study.yaml", *yes)
    assert code == 2
    assert "missing: --forget (the data to forget), --retain (the data to keep); give them" in error
    assert not (world / "study.yaml").exists()


def test_without_a_terminal_defaults_are_not_taken_unasked(world, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, error = call("init", *options(world))
    assert code == 2 and "give --yes" in error


def test_a_file_is_replaced_only_with_force(world, call):
    (world / "study.yaml").write_text("mine\n")
    code, _, error = call("init", *options(world), "--yes")
    assert code == 2 and "--force" in error
    assert (world / "study.yaml").read_text() == "mine\n"
    code, _, error = call("init", *options(world), "--yes", "--force")
    assert code == 0, error
    load_study(world / "study.yaml")


def test_bad_input_is_refused_and_nothing_is_left(world, save_llama, call):
    (world / "broken.jsonl").write_text('{"question": "Who?"}\n{"question": 3, "answer": "x"}\n')
    save_llama(world / "plain", chat=False)
    before = sorted(world.iterdir())
    cases = [
        ({"model": world / "none"}, "no such folder or GGUF file"),
        ({"forget": world / "none.jsonl"}, "no such file or folder"),
        ({"forget": world / "broken.jsonl"}, "problems in the data"),
        ({"retain": world / "forget.jsonl"}, "forget too"),
        ({"model": world / "plain"}, "missing: --prompt-format or --prompt-template"),
        ({"prompt_format": "llama4"}, "llama4"),
        ({"prompt_format": "phi", "prompt_template": "{question}"}, "both given"),
        ({"to": world}, "exists"),
        ({"to": world / "none" / "study.yaml"}, "its folder does not exist"),
    ]
    for changes, expected in cases:
        code, _, error = call("init", *options(world, **changes), "--yes")
        assert code == 2 and expected in error, (changes, error)
    code, _, error = call("init", *options(world, retain_model=world / "model"), "--finetune", "--yes")
    assert code == 2 and "leave it out" in error
    assert sorted(world.iterdir()) == before


def test_resources_are_those_of_the_machine():
    draft = Draft(None, SeenModel("/model"), "model", "/f", "/r")
    on_gpus = draft.variants(cores=16, gpus=4)
    assert [(each.adapter, each.gpus, each.cores) for each in on_gpus] == [(False, 1, 4), (True, 1, 4)]
    on_cpus = draft.variants(cores=8, gpus=0)
    assert [(each.adapter, each.gpus, each.cores) for each in on_cpus] == [
        (False, 0, 1),
        (False, 0, 8),
        (True, 0, 1),
        (True, 0, 8),
    ]


@pytest.mark.parametrize("changes", [{}, {"adapter": True}, {"finetune": True, "adapter": True}, {"gpus": 1, "cores": 4}])
@pytest.mark.parametrize("items", [6, 400])
def test_every_draft_is_a_study(world, changes, items):
    from search.spec.study import parse_study

    seen = SeenModel(str(world / "model"), str(world / "model"), "LlamaForCausalLM", "bfloat16", 7_000_000_000)
    forget, retain = (str(world / f"{name}.jsonl") for name in ("forget", "retain"))
    odd = world / "my study: 1.yaml"
    draft = replace(Draft(odd, seen, "./model", forget, retain, items=items, longest=700, misfits=("a\nb",)), **changes)
    spec = parse_study(YAML(typ="safe").load(draft.text()), world)
    assert spec.name == "my-study--1"
    assert (spec.unlearning.adapter is not None) == draft.adapter
    assert spec.unlearning.learning_rate == ((1e-4,) if draft.adapter else (1e-5,))
    assert (spec.split is not None) == (items == 400)
    assert spec.scoring.max_new_tokens == 512
    assert max(map(len, draft.text().splitlines())) <= 128
