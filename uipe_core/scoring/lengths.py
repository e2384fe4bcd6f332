"""Refuse items that a model has too few positions for, before it is loaded; nothing is truncated."""

from collections.abc import Iterator

from uipe_core.corpora.multiple_choice import letter_answers, letter_prompt
from uipe_core.corpora.types import Corpus
from uipe_core.errors import UserError
from uipe_core.models.prompts import PromptFormat
from uipe_core.scoring.scorer import GENERATED_SETS, ScoringConfig

SHOWN = 60
"""Characters of a question that an error shows."""


def require_positions(corpus: Corpus, prompts: PromptFormat, config: ScoringConfig, limit: int | None, trains: bool) -> None:
    """Check that every item fits into a model, with its answers and with the longest text that may be generated.

    Args:
        corpus: Items to score, and to train on.
        prompts: Prompt format of the model.
        config: Generation length.
        limit: Positions of the model (`uipe_core.models.transformers_compat.position_limit`); None without a limit.
        trains: Whether the model is trained on the corpus too.

    Raises:
        UserError: An item with more tokens; names the longest.
    """
    if limit is None:
        return
    what, question, tokens = max(_lengths(corpus, prompts, trains), key=lambda each: each[2], default=("", "", 0))
    if tokens > limit:
        raise UserError(
            f"{what}: {_shown(question)} has {tokens} tokens with its answer, and the model has {limit} positions; shorten or "
            "leave out the item, or take a model with more positions (nothing is truncated)"
        )
    asked = [
        (len(prompts.prompt_ids(item.question)), item.question)
        for name in GENERATED_SETS
        for item in corpus.sets.get(name, ())
        if not item.plain  # the text of one is as long as its answer, which was looked at above
    ]
    for item in (item for name in GENERATED_SETS for item in corpus.sets.get(name, ())):
        needed = 0 if item.length is None else len(prompts.item_prompt_ids(item)) + item.length - 1
        if needed > limit:
            raise UserError(
                f"corpus: {_shown(item.question)} and a text of {item.length} tokens take {needed} positions, and the model "
                f"has {limit}; leave out the item, or take a model with more positions (nothing is truncated)"
            )
    tokens, question = max(asked, default=(0, ""))
    longest = max(config.generation_length, tokens + 1) if config.counts_prompt else tokens + config.generation_length
    # The last token is not fed.
    if asked and longest - 1 > limit:
        raise UserError(
            f"scoring.max_new_tokens: the prompt of {_shown(question)} has {tokens} tokens and its text may grow to {longest}, "
            f"and the model has {limit} positions; set it to {max(1, limit - tokens + 1)} or less"
        )


def _lengths(corpus: Corpus, prompts: PromptFormat, trains: bool) -> Iterator[tuple[str, str, int]]:
    """Yield set, question and tokens fed of every answer to every item."""
    for name, items in corpus.sets.items():
        for item in items:
            for answer in (item.answer, item.paraphrase, *item.perturbed_answers):
                yield f"corpus: {name}", item.question, len(prompts.encode_answer(item, answer).input_ids) - 1
    for name, questions in corpus.choices.items():
        for question in questions:
            prompt = letter_prompt(question)
            for letter in letter_answers(len(question.choices)):
                yield f"corpus: {name}", question.question, len(prompts.encode_plain(prompt, letter).input_ids) - 1
    if trains:
        for name, train in (("forget_train", corpus.forget_train), ("retain_train", corpus.retain_train)):
            for item in train:
                # An optimisation step feeds the last token too.
                yield f"corpus: {name}", item.question, len(prompts.encode_item(item).input_ids)


def _shown(question: str) -> str:
    return repr(question if len(question) <= SHOWN else f"{question[:SHOWN]}...")
