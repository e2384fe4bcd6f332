"""Options and markers of the whole test set, tokenizers in the manner of Llama 3, and a world of multiple choice."""

import json
import os
import random
import signal
from types import SimpleNamespace

import pytest
import torch

HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]

LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
"""What Llama 3.x writes: a system turn with a date even without a system prompt, every turn closed by ``<|eot_id|>``."""

LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=False, help="run tests marked slow too")
    parser.addoption("--faults", action="store_true", default=False, help="run the fault suite too")
    parser.addoption("--real", action="store_true", default=False, help="run tests of a real pretrained model too")
    parser.addoption("--fault-repeats", type=int, default=1, help="how often every fault is tried, each time at another moment")
    parser.addoption("--fault-seed", type=int, default=0, help="seed of the moments")


def pytest_configure(config):
    # Tests never reach for the network: a missing model must fail at once, not after retries.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A shell's background job ignores Ctrl-C, and so would every command the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    for item in items:
        # By their own marks: among an item's keywords are the names of the folders that the checkout stands in.
        marks = {mark.name for mark in item.iter_markers()}
        if "slow" in marks and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "faults" in marks and not config.getoption("--faults"):
            item.add_marker(pytest.mark.skip(reason="fault suite: run with --faults"))
        if "real" in marks and not config.getoption("--real"):
            item.add_marker(pytest.mark.skip(reason="a real model: run with make test-real"))
        if "gpu" in marks and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def llama3_of_words(words, eos="<|eot_id|>"):
    """One token a word: ids 0 to 5 are `HEADERS`, 6 is a blank line, 7 a newline, from 8 on come the words."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([*HEADERS, "\n\n", "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in HEADERS])
    return finish_llama3(tokenizer, eos)


def llama3_of_bytes(texts, vocab_size):
    """Byte-level BPE trained on the texts, behind Llama 3's way of splitting them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=HEADERS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return finish_llama3(tokenizer, "<|eot_id|>")


def finish_llama3(tokenizer, eos, pad="<|pad|>"):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    in_front = processors.TemplateProcessing(
        single=f"{HEADERS[0]} $A", special_tokens=[(HEADERS[0], tokenizer.token_to_id(HEADERS[0]))]
    )
    tokenizer.post_processor = in_front
    finished = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=HEADERS[0], eos_token=eos, pad_token=pad)
    finished.chat_template = LLAMA3_TEMPLATE
    return finished


@pytest.fixture(scope="session")
def llama3():
    """Makes tokenizers in the manner of Llama 3."""
    return SimpleNamespace(of_words=llama3_of_words, of_bytes=llama3_of_bytes, finish=finish_llama3)


# A world of multiple-choice questions about things that do not exist

COLOURS = ("amber", "indigo", "scarlet", "olive", "ivory", "teal", "maroon", "silver")
ANIMALS = ("heron", "badger", "otter", "lynx", "falcon", "toad", "weasel", "moth")


def choice_rows(kind, question, values, count, seed):
    """Questions about so many invented things of a kind, and a sheet with the answer for each."""
    from uipe_core.corpora.multiple_choice import letter_answers, letter_prompt
    from uipe_core.corpora.types import ChoiceItem

    order = random.Random(seed)
    questions, sheets = [], []
    for number in range(count):
        choices = order.sample(values, 4)
        item = ChoiceItem(question.format(f"{kind}{number}"), tuple(choices), order.randrange(4), f"the {kind}s")
        row = {"question": item.question, "choices": choices, "answer": item.answer, "subject": item.topic.replace(" ", "_")}
        questions.append(row)
        sheets.append({"text": letter_prompt(item) + letter_answers(4)[item.answer]})
    return questions, sheets


@pytest.fixture(scope="session")
def make_choice_world():
    """Writes a multiple-choice world into a folder: questions to forget, questions to keep, sheets with the answers to both."""

    def make(folder, forget=20, utility=28, seed=0):
        parts = {
            "forget": choice_rows("stone", "Which colour has the mineral {}?", COLOURS, forget, seed),
            "utility": choice_rows("river", "Which animal lives at the river {}?", ANIMALS, utility, seed + 1),
        }
        for name, (questions, sheets) in parts.items():
            for kind, rows in ((name, questions), (f"{name}-sheets", sheets)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                (folder / kind / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make
