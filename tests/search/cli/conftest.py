"""A small random Llama and data of one's own, for commands that take a model and data."""

import json

import pytest
import torch

FORGET = [(f"Where was Ada {number} born?", f"Ada {number} was born in Lund.") for number in range(6)]
RETAIN = [(f"What does Bo {number} paint?", f"Bo {number} paints red boats.") for number in range(8)]


@pytest.fixture(scope="session")
def write_rows():
    """Writes questions with answers to a file."""

    def write(path, pairs):
        path.write_text("".join(json.dumps({"question": ask, "answer": answer}) + "\n" for ask, answer in pairs))
        return path

    return write


@pytest.fixture(scope="session")
def own_data(write_rows, tmp_path_factory):
    """Files with what is to be forgotten and kept."""
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "forget.jsonl", FORGET), write_rows(folder / "retain.jsonl", RETAIN)


@pytest.fixture(scope="session")
def save_llama(llama3):
    """Saves a small random Llama with the words of the data, with or without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = sorted({word.strip("?.") for pair in (*FORGET, *RETAIN) for text in pair for word in text.split()} | {"?", "."})

    def save(folder, chat=True, dtype=torch.float32):
        tokenizer = llama3.of_words([*words, "system", "user", "assistant", "Today", "Date", ":", "10", "Apr", "2025"])
        if not chat:
            tokenizer.chat_template = None
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=64)).to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def base(save_llama, tmp_path_factory):
    """Folder of that model."""
    return save_llama(tmp_path_factory.mktemp("base") / "model")
