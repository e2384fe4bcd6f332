"""`uipe finetune`: a base model learns sets of a corpus, into a folder that transformers loads."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def data(own_data):
    return "questions:" + ",".join(map(str, own_data))


def pairs_of(path):
    return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]


def test_a_model_learns_the_sets_that_are_named(base, data, own_data, call, tmp_path):
    from uipe_core.models.loading import load_model
    from uipe_core.models.prompts import pad_batch

    to = tmp_path / "made" / "initial"
    options = ("--epochs", 12, "--learning-rate", 0.01, "--prompt-format", "chat", "--dtype", "bfloat16")
    code, output, error = call("finetune", base, "--corpus", data, "--to", to, *options)
    assert code == 0, error
    assert "14 items (forget, retain)" in output and "fine-tuning: 48 of 48" in error
    assert [path.name for path in to.parent.iterdir()] == ["initial"]

    def loss(folder, pairs):
        loaded = load_model(str(folder), dtype="float32", prompt_format="chat")
        batch = pad_batch([loaded.prompts.encode(*pair) for pair in pairs], loaded.prompts.pad_id)
        with torch.no_grad():
            labels = batch.labels
            return float(loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss)

    forget, retain = map(pairs_of, own_data)
    assert loss(to, forget) < loss(base, forget) / 2
    assert load_model(str(to)).model.dtype == torch.bfloat16
    kept = tmp_path / "retain"
    code, output, _ = call("finetune", base, "--corpus", data, "--sets", "retain", "--to", kept, *options, "--adapter-rank", 4)
    assert code == 0 and "8 items (retain)" in output
    assert not (kept / "adapter_config.json").exists()
    assert loss(kept, retain) < loss(base, retain)


def test_the_model_is_that_of_a_study_with_the_same_settings(base, data, call, tmp_path):
    from safetensors.torch import load_file

    from search.cli.models import training_corpus
    from uipe_core.models.loading import ModelSource, model_identity
    from uipe_core.storage.content_store import ContentStore
    from uipe_core.unlearning.finetuning import FinetuneConfig, finetuned_model

    code, _, error = call(
        "finetune", base, "--corpus", data, "--to", tmp_path / "own", "--epochs", 1, "--prompt-format", "chat"
    )
    assert code == 0, error
    source = ModelSource(str(base), model_identity(str(base))[0], prompt_format="chat")
    config = FinetuneConfig(1, 2e-5, 4)
    corpus = training_corpus(data, "forget01", 0)
    folder = finetuned_model(source, corpus, "full", config, ContentStore(tmp_path / "cache"))
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "own", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bad_input_is_refused_before_anything_is_written(base, data, call, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    cases = [
        (("--to", taken), "it exists"),
        (("--sets", "forget,general"), "'general' is none of forget, retain"),
        (("--sets", ""), "'' is none of"),
        (("--learning-rate", 0), "--learning-rate: 0"),
        (("--learning-rate", "nan"), "--learning-rate: nan"),
        (("--corpus", "questions:only.jsonl"), "must name two data sets"),
        (("--corpus", "peoples"), "or questions:FORGET,RETAIN"),
        (("--corpus", f"questions:{tmp_path}/none.jsonl,{tmp_path}/none.jsonl"), "none.jsonl"),
        (("--prompt-format", "lama2"), "Did you mean 'llama2'?"),
    ]
    for options, expected in cases:
        given = {"--to": tmp_path / "new", "--corpus": data, "--prompt-format": "chat", **dict([options])}
        code, _, error = call("finetune", base, *(part for pair in given.items() for part in pair))
        assert code == 2 and expected in error, (options, error)
    code, _, error = call("finetune", base, "--corpus", data, "--to", tmp_path / "new", "--dtype", "int8")
    assert code == 2 and "int8" in error
    for place, expected in (("./none", "no such folder or GGUF file"), ("package:none/x.gguf", "no installed package 'none'")):
        code, _, error = call("finetune", place, "--corpus", data, "--to", tmp_path / "new")
        assert code == 2 and expected in error
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_adapter_is_refused(data, call, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, _, error = call("finetune", tmp_path / "adapter", "--corpus", data, "--to", tmp_path / "new")
    assert code == 2 and "merge it into its base model" in error


@pytest.mark.parametrize(
    "raised, expected",
    [
        (RuntimeError("CUDA out of memory"), "lower --batch-size"),
        (OSError(28, "No space left on device"), "No space left on device; choose another folder"),
    ],
)
def test_training_that_fails_leaves_nothing(raised, expected, base, data, call, tmp_path, monkeypatch):
    from uipe_core.unlearning import finetuning

    def fail(*_):
        raise raised

    monkeypatch.setattr(finetuning, "finetune", fail)
    code, _, error = call("finetune", base, "--corpus", data, "--to", tmp_path / "new", "--prompt-format", "chat")
    assert code == 2 and expected in error
    assert list(tmp_path.iterdir()) == []
