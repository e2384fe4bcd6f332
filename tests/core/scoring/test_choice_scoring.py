"""Letters against one question at a time, with tokenizers of every kind; and a small model that really learned them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uipe_core.corpora.files import DataSet
from uipe_core.corpora.multiple_choice import letter_answers, letter_prompt, load_multiple_choice
from uipe_core.corpora.types import ChoiceItem, Corpus, item_set_hash
from uipe_core.metrics.multiple_choice import evaluate_choices
from uipe_core.models.loading import LoadedModel, load_model
from uipe_core.models.prompts import PromptFormat
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model
from uipe_core.scoring.multiple_choice import ChoiceScorer
from uipe_core.storage.content_store import ContentStore

ITEMS = (
    ChoiceItem("Who?", ("me", "you", "him", "her"), 1, "people"),
    ChoiceItem("When, if I may ask, will it be?", ("now", "later"), 0, "time"),
    ChoiceItem("Why?", ("so", "thus", "hence", "for no reason at all", "because"), 4),
)
CORPUS = Corpus("few", {}, (), (), choices={"forget": ITEMS[:1], "utility": ITEMS})


def split_tokenizer(pattern, bos=False, merges=()):
    """Tokens are what the pattern finds in the texts, byte by byte where it finds letters alone; merges join two tokens."""
    texts = [letter_prompt(item) + letter for item in ITEMS for letter in letter_answers(5)]
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    symbols = sorted({character for word in words for character in word})
    vocabulary = ["<s>", "</s>", *symbols, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges)))
    tokenizer.pre_tokenizer = splitter
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    # A space and a letter are one token each time: one pass a question, as with Llama and GPT-2.
    "one token": lambda: split_tokenizer(r" ?[^ ]+", merges=[(" ", letter) for letter in "ABCDE"]),
    "one token after bos": lambda: split_tokenizer(r" ?[^ ]+", bos=True, merges=[(" ", letter) for letter in "ABCDE"]),
    # The space is a token of its own, which all letters share: still one pass.
    "two tokens": lambda: split_tokenizer(r" |[^ ]+"),
    # Some letters are one token, others two: two passes.
    "mixed": lambda: split_tokenizer(r" ?[^ ]+", merges=[(" ", "B"), (" ", "D")]),
    # The colon swallows the space: prompt and letter are tokenized apart.
    "border": lambda: split_tokenizer(r".+|\n", merges=[(":", " ")]),
}
MODELS = {
    "llama": lambda size: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
        )
    ),
    "gpt2": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=512, initializer_range=0.4)
    ),
}


def load_random(tokenizer, architecture="llama"):
    torch.manual_seed(3)
    made = TOKENIZERS[tokenizer]()
    return LoadedModel(MODELS[architecture](len(made)).eval(), made, PromptFormat(made, "{question}"))


@torch.no_grad()
def likelihood_of_one(loaded, item, letter):
    """Log-likelihood of a letter: one sequence, all logits, double precision."""
    example = loaded.prompts.encode_plain(letter_prompt(item), letter)
    ids = torch.tensor([example.input_ids])
    scores = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, ids[0, place]]) for place in range(example.prompt_length, ids.shape[1]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_letters_of_a_batch_are_those_of_single_questions(tokenizer, architecture, batch_size):
    loaded = load_random(tokenizer, architecture)
    report = ChoiceScorer(CORPUS, loaded.prompts, batch_size).score(loaded)
    for name, items in CORPUS.choices.items():
        scores = report.sets[name]
        for row, item in enumerate(items):
            letters = letter_answers(len(item.choices))
            expected = [likelihood_of_one(loaded, item, letter) for letter in letters]
            assert scores.log_likelihood[row, : len(letters)] == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert np.isneginf(scores.log_likelihood[row, len(letters) :]).all()
            assert scores.correct[row] == (np.argmax(expected) == item.answer)


@pytest.mark.parametrize(("tokenizer", "passes"), [("one token", 1), ("two tokens", 1), ("mixed", 2), ("border", 1)])
def test_one_pass_a_question_wherever_letters_differ_in_their_last_token_only(tokenizer, passes):
    loaded, seen = load_random(tokenizer), []
    ChoiceScorer(CORPUS, loaded.prompts, 1).score(loaded, progress=lambda *step: seen.append(step))
    total = passes * 4
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_a_bos_token_stands_in_front_once():
    loaded = load_random("one token after bos")
    example = loaded.prompts.encode_plain("Answer:", " B")
    assert loaded.tokenizer.convert_ids_to_tokens(list(example.input_ids))[0] == "<s>"
    assert example.input_ids.count(0) == 1
    assert example.answer_length == 1


def test_a_report_names_its_items_and_the_spread_of_its_logits():
    loaded = load_random("one token")
    report = ChoiceScorer(CORPUS, loaded.prompts).score(loaded)
    assert report.sets["forget"].item_hash == item_set_hash(ITEMS[:1])
    spreads = []
    for item in ITEMS:
        ids = torch.tensor([loaded.prompts.encode_plain(letter_prompt(item), "").input_ids])
        with torch.no_grad():
            spreads.append(float(loaded.model(input_ids=ids).logits[0, -1].std()))
    assert report.logit_scale == pytest.approx(np.mean(spreads), rel=1e-5)
    with torch.no_grad():
        loaded.model.lm_head.weight *= 2
    assert ChoiceScorer(CORPUS, loaded.prompts).score(loaded).logit_scale == pytest.approx(2 * np.mean(spreads), rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_overflow_become_finite_scores_that_look_good_nowhere(value):
    loaded = load_random("mixed")
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(value)
    report = ChoiceScorer(CORPUS, loaded.prompts).score(loaded)
    assert not report.is_finite
    bounded = report.without_overflow()
    assert bounded.is_finite
    assert bounded.logit_scale is None
    metrics = evaluate_choices(bounded)
    assert (metrics.forget.accuracy, metrics.forget.answer_probability) == (1.0, 1.0)
    assert (metrics.utility.accuracy, metrics.utility.answer_probability) == (0.0, 0.0)
    assert metrics.forgetting_to_chance == -0.75
    assert not metrics.below_chance


def test_plain_items_are_tokenized_as_they_stand():
    prompts = load_random("one token after bos").prompts
    words = prompts.tokenizer.convert_ids_to_tokens
    example = prompts.encode_plain("", "Who?")
    assert words(list(example.input_ids)) == ["<s>", *"Who?"]
    assert example.prompt_length == 1


# A model that really learned the letters


@pytest.fixture(scope="module")
def learned(make_choice_world, tmp_path_factory):
    """A small choice world, and folders of the small models that know all of it and its utility questions only."""
    folder = make_choice_world(tmp_path_factory.mktemp("choices"))
    names = ("forget", "utility", "forget-sheets", "utility-sheets")
    corpus = load_multiple_choice(*(DataSet(str(folder), (name,)) for name in names))
    config = TinyModelConfig("word", None, 32, 1, 2, None, Stage(epochs=20, learning_rate=1e-2, batch_size=8), seed=0)
    store = ContentStore(tmp_path_factory.mktemp("models"))
    return corpus, {stage: tiny_model(config, corpus, stage, store) for stage in ("full", "retain")}


def accuracy(learned, stage, corpus=None):
    loaded = load_model(str(learned[1][stage]), device="cpu")
    return evaluate_choices(ChoiceScorer(corpus or learned[0], loaded.prompts).score(loaded))


def test_a_model_that_learned_the_letters_answers_well_and_one_that_did_not_guesses(learned):
    full, retain = accuracy(learned, "full"), accuracy(learned, "retain")
    assert full.forget.accuracy > 0.9
    assert full.utility.accuracy > 0.9
    assert retain.utility.accuracy > 0.9
    assert retain.forget.accuracy < 0.6
    assert full.forgetting_to_chance < -0.6
    assert retain.forgetting_to_chance > full.forgetting_to_chance


def test_other_right_answers_are_not_rewarded(learned):
    turned = tuple(replace(item, answer=(item.answer + 1) % 4) for item in learned[0].choices["forget"])
    corpus = replace(learned[0], choices={**learned[0].choices, "forget": turned})
    metrics = accuracy(learned, "full", corpus)
    assert metrics.forget.accuracy < 0.1
    assert metrics.forgetting_to_chance == 0.0
    assert metrics.utility.accuracy > 0.9
