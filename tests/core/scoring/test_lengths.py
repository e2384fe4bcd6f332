"""Items longer than a model has positions: one sentence before anything is scored."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MptConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from uipe_core.corpora.types import Corpus, Item
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import PromptFormat
from uipe_core.models.transformers_compat import position_limit
from uipe_core.scoring.lengths import require_positions
from uipe_core.scoring.scorer import Scorer, ScoringConfig


@pytest.fixture(scope="module")
def prompts(llama3):
    return PromptFormat(llama3.of_words(["who", "what", "long", "short"]), "{question} ")


def corpus_of(words):
    """Three sets; the longest item has so many words in its answer."""
    short = Item("who what", "short", "short", ("long",))
    return Corpus(
        "few",
        {
            "forget": (short,),
            "retain": (short, Item("what who", "long " * words, perturbed_answers=("long",))),
            "world_facts": (short,),
        },
        (),
        (),
    )


def gpt2(positions, vocab):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, n_positions=positions)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("words", [12, 13, 14])
def test_the_limit_is_where_torch_fails(words, prompts):
    """A prompt of BOS and two words, the answer and its end token, which is not fed: 16 positions hold 13 words."""
    model = gpt2(16, len(prompts.tokenizer))
    corpus, config = corpus_of(words), ScoringConfig(4, 2)
    scorer = Scorer(corpus, prompts, config)
    if words <= 13:
        require_positions(corpus, prompts, config, position_limit(model.config), trains=False)
        scorer.score(LoadedModel(model, prompts.tokenizer, prompts))
        return
    with pytest.raises(UserError, match="corpus: retain: 'what who' has 17 tokens with its answer, and the model has 16"):
        require_positions(corpus, prompts, config, position_limit(model.config), trains=False)
    with pytest.raises(IndexError):
        scorer.score(LoadedModel(model, prompts.tokenizer, prompts))


@pytest.mark.parametrize(
    ("length", "counts_prompt", "fits"), [(14, False, True), (15, False, False), (17, True, True), (18, True, False)]
)
def test_prompt_and_generation_fit_together(length, counts_prompt, fits, prompts):
    config = ScoringConfig(4, length, counts_prompt)
    if fits:
        require_positions(corpus_of(3), prompts, config, 16, trains=False)
        return
    with pytest.raises(UserError, match=r"scoring\.max_new_tokens: the prompt of .* has 3 tokens .* set it to 14 or less"):
        require_positions(corpus_of(3), prompts, config, 16, trains=False)


def test_training_items_count_only_where_the_model_is_trained(prompts):
    corpus = replace(corpus_of(3), forget_train=(Item("who", "long " * 40),))
    require_positions(corpus, prompts, ScoringConfig(4, 2), 16, trains=False)
    with pytest.raises(UserError, match="forget_train: 'who' has 43 tokens"):
        require_positions(corpus, prompts, ScoringConfig(4, 2), 16, trains=True)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=16), 16),
        (MptConfig(max_seq_len=32), 32),
        (LlamaConfig(max_position_embeddings=8), None),
        (CONFIG_MAPPING["gpt_neox"](max_position_embeddings=8), None),
        (CONFIG_MAPPING["bloom"](), None),
        (CONFIG_MAPPING["mamba"](), None),
        (CONFIG_MAPPING["opt"](max_position_embeddings=24), 24),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_only_tables_of_positions_are_a_limit(config, limit):
    assert position_limit(config) == limit
