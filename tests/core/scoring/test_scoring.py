"""Scores against one item at a time, on several architectures; prompts and where answers begin."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from uipe_core.corpora.types import MEMBERSHIP_SETS, Corpus, item_set_hash
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import IGNORED, PromptFormat, pad_batch
from uipe_core.models.transformers_compat import accepts_logits_to_keep, wrap_adapter
from uipe_core.scoring.scorer import Scorer, ScoringConfig

NEW_TOKENS = 12
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.4,
}
LORA = {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


class LlamaOfOldInterface(LlamaForCausalLM):
    """A model whose forward knows no `logits_to_keep`, as remote code often does."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )


ARCHITECTURES = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(vocab_size=size, **SHAPE)),
    "llama grouped": lambda size: LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **SHAPE)),
    "llama old": lambda size: LlamaOfOldInterface(LlamaConfig(vocab_size=size, **SHAPE)),
    "llama lora": lambda size: wrap_adapter(LlamaForCausalLM(LlamaConfig(vocab_size=size, **SHAPE)), LORA),
    "gpt2": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    ),
    "gpt_neox": lambda size: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=size, max_position_embeddings=64, **SHAPE)),
    "qwen2": lambda size: Qwen2ForCausalLM(Qwen2Config(vocab_size=size, num_key_value_heads=1, **SHAPE)),
    "gemma": lambda size: GemmaForCausalLM(GemmaConfig(vocab_size=size, num_key_value_heads=1, head_dim=8, **SHAPE)),
}


@pytest.fixture(scope="module")
def corpus(world):
    """A few items of every set, of different lengths."""
    sets = {name: items[::9] if len(items) > 20 else items[::3] for name, items in world.sets.items()}
    return Corpus("few", sets, (), ())


@pytest.fixture
def load_random(load_tiny):
    """A randomly initialised model of an architecture, with the tokenizer of the small world."""
    tiny = load_tiny()

    def load(architecture):
        torch.manual_seed(3)
        model = ARCHITECTURES[architecture](len(tiny.tokenizer)).eval()
        return LoadedModel(model, tiny.tokenizer, tiny.prompts)

    return load


def score(loaded, corpus, batch_size=32, **options):
    return Scorer(corpus, loaded.prompts, ScoringConfig(batch_size, NEW_TOKENS)).score(loaded, **options)


@torch.no_grad()
def loss_of_one(loaded, question, answer, temperature=1.0):
    """Mean loss per answer token: one sequence, all logits, double precision."""
    example = loaded.prompts.encode(question, answer)
    ids = torch.tensor([example.input_ids])
    scores = (loaded.model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
    picked = [scores[position - 1, ids[0, position]] for position in range(example.prompt_length, ids.shape[1])]
    return -float(torch.stack(picked).mean()), len(picked)


@torch.no_grad()
def generate_one(loaded, question):
    ids = torch.tensor([loaded.prompts.prompt_ids(question)])
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=loaded.prompts.pad_id,
        eos_token_id=loaded.prompts.eos_id,
    )
    return loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def assert_losses_are_those_of_single_items(report, loaded, corpus, temperature=1.0):
    for name, items in corpus.sets.items():
        scores = report.sets[name]
        for row, item in enumerate(items):
            columns = [
                (item.answer, scores.answer_loss[row], scores.answer_tokens[row]),
                (item.paraphrase, scores.paraphrase_loss[row], scores.paraphrase_tokens[row]),
                *zip(item.perturbed_answers, scores.perturbed_loss[row], scores.perturbed_tokens[row], strict=True),
            ]
            for text, loss, tokens in columns:
                expected, count = loss_of_one(loaded, item.question, text, temperature)
                assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
                assert tokens == count


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_texts_of_a_batch_are_those_of_single_items(architecture, load_random, corpus):
    loaded = load_random(architecture)
    report = score(loaded, corpus)
    assert_losses_are_those_of_single_items(report, loaded, corpus)
    for name in ("forget", "real_authors"):
        questions = [item.question for item in corpus.sets[name]]
        assert list(report.sets[name].generated) == [generate_one(loaded, question) for question in questions]


def test_models_that_cannot_keep_chosen_logits_are_told_apart(load_random):
    accepts = {name: accepts_logits_to_keep(load_random(name).model) for name in ARCHITECTURES}
    assert [name for name, able in accepts.items() if not able] == ["llama old"]


def assert_same_scores(report, expected, rows=None):
    for name, scores in expected.sets.items():
        order = slice(None) if rows is None else rows[name]
        for field in ("answer_loss", "paraphrase_loss", "perturbed_loss", "rouge_l_recall"):
            values, wanted = getattr(report.sets[name], field), getattr(scores, field)
            if wanted is not None:
                np.testing.assert_allclose(values[order], wanted, rtol=1e-5, atol=1e-6)
        if scores.generated is not None:
            assert list(np.array(report.sets[name].generated)[order]) == list(scores.generated)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_scores_do_not_depend_on_the_batch_size(batch_size, load_tiny, corpus):
    assert_same_scores(score(load_tiny(), corpus, batch_size), score(load_tiny(), corpus))


def test_scores_do_not_depend_on_the_order_of_items(load_tiny, corpus):
    backwards = replace(corpus, sets={name: items[::-1] for name, items in reversed(corpus.sets.items())})
    rows = {name: slice(None, None, -1) for name in corpus.sets}
    assert_same_scores(score(load_tiny(), backwards), score(load_tiny(), corpus), rows)


def test_scoring_again_gives_the_same_bits_even_after_training_mode(load_random, corpus):
    loaded = load_random("gpt2")
    first = score(loaded, corpus)
    loaded.model.train()
    second = score(loaded, corpus)
    for name, scores in first.sets.items():
        assert np.array_equal(scores.answer_loss, second.sets[name].answer_loss)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits_and_leaves_the_text(temperature, load_tiny, corpus):
    loaded = load_tiny()
    report, plain = score(loaded, corpus, temperature=temperature), score(loaded, corpus)
    assert_losses_are_those_of_single_items(report, loaded, corpus, temperature)
    assert report.logit_scale == pytest.approx(plain.logit_scale / temperature)
    assert report.sets["forget"].generated == plain.sets["forget"].generated


def test_logit_scale_doubles_with_the_logits(load_tiny, corpus):
    loaded = load_tiny()
    before = score(loaded, corpus).logit_scale
    with torch.no_grad():
        loaded.model.lm_head.weight *= 2
    assert score(loaded, corpus).logit_scale == pytest.approx(2 * before, rel=1e-5)


def test_logit_scale_is_the_mean_spread_at_gold_tokens_of_the_utility_sets(load_tiny, corpus):
    loaded, spreads = load_tiny(), []
    for name in ("retain", "real_authors", "world_facts"):
        for item in corpus.sets[name]:
            example = loaded.prompts.encode(item.question, item.answer)
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([example.input_ids])).logits[0]
            spreads += logits[example.prompt_length - 1 : -1].std(-1).tolist()
    assert score(loaded, corpus).logit_scale == pytest.approx(np.mean(spreads), rel=1e-5)


def test_rouge_is_the_recall_of_the_rouge_score_package_with_stemmer(load_tiny, corpus):
    # Words the model never says give recalls between 0 and 1, whatever the small model has learned.
    longer = {
        name: tuple(replace(item, answer=f"{item.answer} indeed") if row % 2 else item for row, item in enumerate(items))
        for name, items in corpus.sets.items()
    }
    corpus = replace(corpus, sets=longer)
    report = score(load_tiny(), corpus)
    scorer = RougeScorer(["rougeL", "rouge1"], use_stemmer=True)
    seen = set()
    for name in ("forget", "retain", "real_authors", "world_facts"):
        scores = report.sets[name]
        for row, item in enumerate(corpus.sets[name]):
            expected = scorer.score(item.answer, scores.generated[row])
            assert scores.rouge_l_recall[row] == pytest.approx(expected["rougeL"].recall)
            assert scores.rouge_1_recall[row] == pytest.approx(expected["rouge1"].recall)
            seen.add(round(float(scores.rouge_l_recall[row]), 3))
    assert len(seen) > 2


def test_rouge_counts_words_of_the_same_stem(load_tiny, corpus):
    items = tuple(replace(i, answer=i.answer.replace("plays", "playing")) for i in corpus.sets["retain"] if "plays" in i.answer)
    scores = score(load_tiny(), replace(corpus, sets={"retain": items})).sets["retain"]
    assert len(items) > 0
    assert all(" plays " in text for text in scores.generated)
    plain = RougeScorer(["rougeL"], use_stemmer=False)
    for row, item in enumerate(items):
        assert scores.rouge_l_recall[row] > plain.score(item.answer, scores.generated[row])["rougeL"].recall


def test_a_penalty_in_the_models_own_settings_does_not_bend_the_greedy_text(load_tiny, corpus):
    plain = score(load_tiny(), corpus).sets["forget"].generated
    loaded = load_tiny()
    loaded.model.generation_config.repetition_penalty = 5.0
    loaded.model.generation_config.no_repeat_ngram_size = 1
    assert score(loaded, corpus).sets["forget"].generated == plain


def test_related_sets_are_scored_but_not_generated_for(load_tiny, corpus):
    report = score(load_tiny(), corpus)
    assert set(report.sets) == set(corpus.sets)
    for name in ("related", "unrelated"):
        assert report.sets[name].generated is None
        assert report.sets[name].rouge_l_recall is None


def test_a_report_names_its_items(load_tiny, corpus):
    report = score(load_tiny(), corpus)
    for name, items in corpus.sets.items():
        assert report.sets[name].item_hash == item_set_hash(items)
        assert report.sets[name].questions == tuple(item.question for item in items)
        assert report.sets[name].answers == tuple(item.answer for item in items)


def test_an_item_without_paraphrase_is_scored_by_its_answer(load_tiny, corpus):
    scores = score(load_tiny(), corpus).sets["world_facts"]
    assert np.array_equal(scores.paraphrase_loss, scores.answer_loss)


def test_progress_ends_at_its_total(load_tiny, corpus):
    seen = []
    score(load_tiny(), corpus, batch_size=20, progress=lambda *step: seen.append(step))
    total = seen[-1][1]
    done = [count for count, _ in seen]
    assert {of for _, of in seen} == {total}
    assert done == sorted(set(done))
    assert done[-1] == total
    # Answers first, then the texts at once.
    assert total - done[-2] == sum(len(corpus.sets[name]) for name in ("forget", "retain", "real_authors", "world_facts"))


def letter_tokenizer(bos=False):
    """One token a letter, but ``ab`` is one token; ``<s>`` is put in front on request."""
    letters = {token: index for index, token in enumerate(["<s>", "</s>", *"abcQ?", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tokens(prompts, example):
    ids = list(example.input_ids)
    words = prompts.tokenizer.convert_ids_to_tokens(ids)
    return words[: example.prompt_length], words[example.prompt_length :]


def test_prompt_and_answer_are_tokenized_together_where_the_border_holds():
    prompts = PromptFormat(letter_tokenizer(), "{question}a")
    assert tokens(prompts, prompts.encode("Q", "cab")) == (["Q", "a"], ["c", "ab", "</s>"])


def test_a_token_that_would_span_the_border_is_split_there():
    prompts = PromptFormat(letter_tokenizer(), "{question}a")
    assert prompts.tokenizer.tokenize("Qab") == ["Q", "ab"]
    assert tokens(prompts, prompts.encode("Q", "bc")) == (["Q", "a"], ["b", "c", "</s>"])
    assert tokens(prompts, prompts.encode("Q", "bab")) == (["Q", "a"], ["b", "ab", "</s>"])


@pytest.mark.parametrize("answer", ["cab", "bc"])
def test_a_plain_template_gets_the_special_tokens_once(answer):
    prompts = PromptFormat(letter_tokenizer(bos=True), "{question}a")
    prompt, rest = tokens(prompts, prompts.encode("Q", answer))
    assert prompt == ["<s>", "Q", "a"]
    assert rest[-1] == "</s>"
    assert "<s>" not in rest


@pytest.mark.parametrize("answer", ["cab", "bc"])
def test_a_chat_template_writes_its_special_tokens_itself(answer):
    tokenizer = letter_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}a{% endfor %}"
    prompts = PromptFormat(tokenizer)
    prompt, rest = tokens(prompts, prompts.encode("Q", answer))
    assert prompt == ["<s>", "Q", "a"]
    assert "<s>" not in rest


def test_a_question_with_braces_is_left_as_it_is():
    assert PromptFormat(letter_tokenizer(), "Q{question}?").prompt_text("{a} {0} {question}") == "Q{a} {0} {question}?"


def test_without_a_chat_template_a_prompt_format_must_be_given():
    with pytest.raises(UserError, match=r"no chat template.*model\.prompt_template"):
        PromptFormat(letter_tokenizer())


def test_a_template_without_a_place_for_the_question_is_refused():
    with pytest.raises(UserError, match=r"'Q\?' does not contain \{question\}"):
        PromptFormat(letter_tokenizer(), "Q?")


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        PromptFormat(tokenizer, "{question}")


def test_padding_falls_back_on_the_end_token_and_carries_neither_label_nor_mask():
    prompts = PromptFormat(letter_tokenizer(), "{question}?")
    assert prompts.pad_id == prompts.eos_id
    examples = [prompts.encode("Q", "c"), prompts.encode("QQQ", "ccc")]
    batch = pad_batch(examples, prompts.pad_id)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8]
    c, end = prompts.tokenizer.convert_tokens_to_ids(["c", "</s>"])
    assert batch.labels.tolist() == [[IGNORED] * 2 + [c, end] + [IGNORED] * 4, [IGNORED] * 4 + [c, c, c, end]]
    assert batch.input_ids[0, 4:].tolist() == [prompts.pad_id] * 4


def test_stages_tell_the_numbers_of_the_whole_one_after_the_other(load_random, corpus):
    loaded = load_random("llama")
    stages = list(Scorer(corpus, loaded.prompts, ScoringConfig(8, NEW_TOKENS)).stages(loaded))
    whole = score(loaded, corpus, 8)
    named = ["forget", "general", "retain", "others", "generation"]
    assert [list(report.seconds) for report in stages] == [named[: count + 1] for count in range(len(named))]
    assert [set(report.sets) for report in stages[:3]] == [
        {"forget"},
        {"forget", "real_authors", "world_facts"},
        {"forget", "real_authors", "world_facts", "retain"},
    ]
    assert list(stages[3].sets) == list(stages[4].sets) == list(whole.sets) == list(corpus.sets)
    for report in stages:
        for key, values in report.arrays().items():
            assert np.array_equal(values, whole.arrays()[key]), key
    for report in stages[:-1]:
        assert report.logit_scale is None
        assert all(scores.rouge_l_recall is None and scores.generated is None for scores in report.sets.values())
    assert stages[-1].logit_scale == whole.logit_scale
    assert {name: scores.generated for name, scores in stages[-1].sets.items()} == {
        name: scores.generated for name, scores in whole.sets.items()
    }


def test_a_scoring_broken_off_changes_nothing_of_the_next(load_random, corpus):
    loaded = load_random("llama")
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(8, NEW_TOKENS))
    next(scorer.stages(loaded))
    report, fresh = scorer.score(loaded).arrays(), score(loaded, corpus, 8).arrays()
    assert all(np.array_equal(report[key], values) for key, values in fresh.items())


def test_min_k_of_forget_and_holdout_is_that_of_the_audit(load_tiny, corpus):
    from uipe_core.audits.membership import membership_scores
    from uipe_core.audits.token_scores import read_token_scores

    loaded = load_tiny()
    report = score(loaded, corpus)
    for name, scores in report.sets.items():
        if name not in MEMBERSHIP_SETS:
            assert scores.min_k is None
            continue
        answers = [item.answer for item in corpus.sets[name]]
        expected = membership_scores(read_token_scores(loaded, corpus.sets[name]), answers)["min_k"]
        np.testing.assert_allclose(scores.min_k, expected, rtol=1e-5, atol=1e-6)
    without = score(loaded, replace(corpus, sets={name: items for name, items in corpus.sets.items() if name != "holdout"}))
    assert all(scores.min_k is None for scores in without.sets.values())


def test_implied_sets_are_not_scored_and_leave_all_numbers_as_they_are(load_tiny, corpus):
    loaded = load_tiny()
    whole, implied = score(loaded, corpus), score(loaded, replace(corpus, implied=("holdout",)))
    assert set(implied.sets) == set(corpus.sets) - {"holdout"}
    for name in ("forget", "retain", "world_facts", "real_authors"):
        assert np.array_equal(implied.sets[name].answer_loss, whole.sets[name].answer_loss)
