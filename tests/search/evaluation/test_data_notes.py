"""What `uipe validate` says of a user's own data."""

import json

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def model(llama3, tmp_path_factory):
    """Folder of a small Llama with a token a word."""
    folder = tmp_path_factory.mktemp("model")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = llama3.of_bytes([WORDS, "Who is it?"], 400)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(count):
    return [{"question": f"Who is {number}?", "answer": f"It is number {number}."} for number in range(count)]


@pytest.fixture
def validate(tmp_path, model, call):
    """Validate a study of the rows; returns code, notes and error."""

    def run(forget, retain=None, method="grad_diff", scoring=None, **corpus):
        for name, rows in {"forget": forget, "retain": retain or [{"question": "Why?", "answer": a} for a in "abc"]}.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        study = {
            "schema_version": 1,
            "name": "own",
            "corpus": {"kind": "questions", "forget": "forget.jsonl", "retain": "retain.jsonl", **corpus},
            "model": {"kind": "pretrained", "initial": str(model), "prompt_template": "{question} "},
            "unlearning": {"methods": {method: {}}, "epochs": 1, "learning_rate": 0.001},
            "scoring": scoring or {},
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        return call("validate", tmp_path / "study.yaml")

    return run


def test_counts_lengths_and_stand_ins_are_noted(validate):
    code, notes, error = validate(pairs(30))
    assert code == 0, error
    assert "note: corpus.forget: 30 items; " in notes
    assert "tokens each in the median" in notes
    assert "answers of other items stand in" in notes
    assert "too few for a test" not in notes
    assert "scoring.max_new_tokens" not in notes


def test_few_items_and_repeated_ones_are_noted(validate):
    code, notes, error = validate([*pairs(5), *pairs(1)], [*pairs(20)[10:], *pairs(12)[10:]])
    assert code == 0, error
    assert "corpus.forget: 6 items are too few for a test; give at least 20" in notes
    assert "corpus.forget: 1 items stand there more than once" in notes
    assert "corpus.retain: 2 items stand there more than once; each counts" in notes


def test_answers_should_fit_what_is_generated(validate):
    code, notes, error = validate(pairs(30), scoring={"max_new_tokens": 2})
    assert code == 0, error
    assert "corpus.forget: 30 of 30 answers are longer than what is generated (2 tokens)" in notes


def test_texts_are_windows_and_generated_as_long_as_they_go_on(validate):
    texts = [{"text": f"{WORDS} {number} {WORDS}"} for number in range(20)]
    code, notes, error = validate(texts, scoring={"max_new_tokens": 3}, prompt_words=5, continuation_words=5)
    assert code == 0, error
    assert "corpus.forget: 40 windows of texts; 60 to train on; " in notes
    assert "corpus.forget: 40 of 40" not in notes
    code, notes, error = validate(texts, method="idk_dpo", prompt_words=5, continuation_words=5)
    assert code == 2
    assert "idk_dpo answers questions, and corpus.forget has texts" in error


def test_answers_in_which_rouge_sees_no_word_are_refused(validate):
    russian = [{"question": "Кто?", "answer": answer} for answer in ("Анна", "Борис", "Вера")]
    assert validate(russian)[0] == 0
    code, _, error = validate(russian, scoring={"definition": "tofu"})
    assert code == 2
    assert "3 of 3 forget answers ('Анна') have no letter a-z" in error
    code, _, error = validate([*russian, {"question": "Что?", "answer": "?!"}])
    assert code == 2
    assert "1 of 4 forget answers ('?!') have no letter and no digit" in error


def test_everything_wrong_with_the_data_is_one_error(validate):
    code, _, error = validate([*pairs(3), {"question": "Who?"}], [*pairs(1), {"text": "a b"}])
    assert code == 2
    assert "corpus: 3 problems in the data" in error
    assert "forget.jsonl, line 4: field 'answer' is missing" in error
    assert "retain.jsonl, line 1: 'Who is 0?' with its answer is in forget too" in error
    assert "retain.jsonl, line 2: has text" in error
