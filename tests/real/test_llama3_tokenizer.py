"""Llama 3's own tokenizer, from the wheel ``llama-models``, under the prompt format ``llama3``."""

import base64
from importlib.util import find_spec
from pathlib import Path

import pytest

from uipe_core.corpora.types import Item
from uipe_core.models.prompts import PromptFormat

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llama_models") is None, reason="the wheel llama-models is not installed: make test-real"),
]

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
"""The first of its 256 special tokens, which stand behind the 128,000 of text."""


@pytest.fixture(scope="module")
def tokenizer(llama3):
    """The tokenizer as transformers has it, with the test set's template of Llama 3.x."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url):
            lines = Path(tiktoken_url).read_bytes().splitlines()
            return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}

    file = Path(find_spec("llama_models").origin).parent / "llama3" / "tokenizer.model"
    converted = Converter(str(file), extra_special_tokens=SPECIAL).converted()
    return llama3.finish(converted, "<|eot_id|>", pad="<|finetune_right_pad_id|>")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return PromptFormat(tokenizer, name="llama3")


def test_the_ids_are_llama_3s_own(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"]) == [128000, 128009]
    assert tokenizer("Hello world", add_special_tokens=False)["input_ids"] == [9906, 1917]


@pytest.mark.parametrize("answer", ["Paris.", " Paris.", "1789", "\u00c5rhus, 12 km", "\n- one\n- two"])
def test_prompt_and_answer_have_one_start_one_end_and_a_border(prompts, tokenizer, answer):
    example = prompts.encode_item(Item("What is the capital of France?", answer))
    ids = list(example.input_ids)
    assert ids.count(128000) == 1
    assert ids[0] == 128000
    assert ids[-1] == 128009
    assert ids[: example.prompt_length] == prompts.prompt_ids("What is the capital of France?")
    # The end of the answer carries loss, and nothing of the prompt does.
    own = tokenizer.decode(ids[example.prompt_length :])
    assert own == f"{answer.strip()}<|eot_id|>"
    assert tokenizer.decode(ids[: example.prompt_length]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
