"""Sample alternate answers to forget questions from the initial model, read given ones, and draw one of each item an epoch.

Mekala et al., alternate preference optimisation (arXiv 2409.13474), section 3: answers as plausible as the one to forget, with
other facts. The prompt is ours; the authors' asks for the same in other words.
"""

import random
from collections.abc import Mapping, Sequence

from uipe_core.corpora.files import DataSet
from uipe_core.corpora.types import Item, ItemSet
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.scoring.sampling import samples

ALTERNATES_SCHEMA = 1
"""Raised with every change in this file that alters the sampled answers."""

COUNT = 5
"""Alternate answers kept of an item, as in the paper; fewer where fewer differ."""

ASKED = 12
"""Samples of an item at one temperature."""

TEMPERATURES = (1.0, 1.5, 2.0)
"""The next is tried for items whose samples are all empty or the answer itself."""

PROMPT = (
    "Here is a question with its answer.\nQuestion: {question}\nAnswer: {answer}\n"
    "Give another answer to the same question, just as believable, in which every fact is a different one. "
    "Write only this answer."
)
"""How a model is asked for an alternate answer."""

_EXTRA = 1.5
"""Longest sample, in lengths of the longest answer in tokens: an alternate has about the form of the answer."""

Alternates = tuple[tuple[str, ...], ...]
"""Alternate answers of every forget item, in order."""


def sample_alternates(loaded: LoadedModel, items: ItemSet) -> Alternates:
    """Sample alternate answers of every item from the initial model.

    Args:
        loaded: The initial model.
        items: Questions with the answers to forget.

    Raises:
        UserError: All samples of an item are empty or the answer itself; names the first such item, and the remedy.
    """
    found: dict[int, tuple[str, ...]] = {}
    limit = longest_sample(loaded, items)
    for temperature in TEMPERATURES:
        left = [place for place in range(len(items)) if place not in found]
        if not left:
            break
        drawn = draw_texts(loaded, [items[place] for place in left], limit, temperature)
        for place, texts in zip(left, drawn, strict=True):
            usable = [text.strip() for text in texts if is_alternate(text, items[place].answer)]
            if usable:
                found[place] = tuple(dict.fromkeys(usable))[:COUNT]
    lacking = [place for place in range(len(items)) if place not in found]
    if lacking:
        item = items[lacking[0]]
        raise UserError(
            f"unlearning.methods.alt_po: {len(lacking)} of {len(items)} forget items have no alternate answer, first "
            f"{item.question!r}: all {ASKED * len(TEMPERATURES)} samples of the initial model are empty or its answer "
            f"{item.answer!r}; give alternates as corpus.alternates, or remove the method"
        )
    return tuple(found[place] for place in range(len(items)))


def longest_sample(loaded: LoadedModel, items: ItemSet) -> int:
    """Return how many tokens a sampled answer may have."""
    return max(1, int(_EXTRA * max(loaded.prompts.encode_item(item).answer_length for item in items)))


def draw_texts(
    loaded: LoadedModel, items: Sequence[Item], limit: int, temperature: float = TEMPERATURES[0]
) -> Sequence[Sequence[str]]:
    """Draw `ASKED` samples of each item, alternates or not."""
    prompts = [_prompt(loaded, item.question, item.answer) for item in items]
    return samples(loaded, prompts, ASKED, limit, temperature=temperature)


def _prompt(loaded: LoadedModel, question: str, answer: str) -> list[int]:
    """Return the prompt for an alternate; the question alone where the vocabulary lacks the words of `PROMPT`.

    Small models built by a study know no instructions: what they answer by chance is their alternate.
    """
    unknown = loaded.tokenizer.unk_token_id
    words = loaded.tokenizer(PROMPT.format(question="", answer=""), add_special_tokens=False)["input_ids"]
    follows = unknown is None or unknown not in words
    return loaded.prompts.prompt_ids(PROMPT.format(question=question, answer=answer) if follows else question)


def is_alternate(text: str, answer: str) -> bool:
    """Return True if a text is neither empty nor the answer, whatever its spaces, capitals and punctuation at the end."""
    return _plain(text) not in ("", _plain(answer))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(" .!?")


def given_alternates(source: str, items: ItemSet) -> Alternates:
    """Read alternate answers from rows with ``question`` and ``alternate``, a text or a list of texts.

    Rows with an ``answer`` belong to the item with this answer; further keys are ignored. The files of the authors' code have
    this form. Several rows of a question are several alternates.

    Args:
        source: File, folder or data set of the hub.
        items: Questions with the answers to forget.

    Raises:
        UserError: An item has none, or one that is empty or the answer itself; or a row has not these fields.
    """
    found: dict[tuple[str, str | None], list[str]] = {}
    for _, row in DataSet(source, split="train").rows():
        values = row.fields.get("alternate")
        texts = values if isinstance(values, list) else [values]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"corpus.alternates: {row.where}: alternate must be a text or a list of texts; correct it")
        answer = row.fields.get("answer")
        found.setdefault((row.text("question"), None if answer is None else str(answer)), []).extend(map(str, texts))
    alternates = []
    for item in items:
        texts = found.get((item.question, item.answer)) or found.get((item.question, None)) or []
        if not texts:
            raise UserError(
                f"corpus.alternates: {source} has no alternate of the forget item {item.question!r} with the answer "
                f"{item.answer!r}; add one"
            )
        for text in texts:
            if not is_alternate(text, item.answer):
                what = "is empty" if not text.strip() else f"is the answer itself ({text!r})"
                raise UserError(f"corpus.alternates: an alternate of {item.question!r} {what}; give another answer")
        alternates.append(tuple(texts))
    return tuple(alternates)


def draw_alternates(alternates: Sequence[Sequence[str]], seed: int, epoch: int) -> tuple[str, ...]:
    """Draw one alternate of every item; equal arguments draw the same, independently of other epochs."""
    generator = random.Random(f"alternates/{seed}/{epoch}")
    return tuple(generator.choice(own) for own in alternates)


def sampled_inputs() -> Mapping[str, object]:
    """Return what determines sampled alternates in addition to model and items."""
    return {"schema": ALTERNATES_SCHEMA, "prompt": PROMPT, "count": COUNT, "asked": ASKED, "temperatures": list(TEMPERATURES)}
