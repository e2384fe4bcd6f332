"""Describe a user's own data: how many items, how long, which are there twice, where something stands in."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from search.problem.stand_ins import STANDS_IN
from search.spec.models import FinetunedModel, PretrainedModel, TinyModel
from search.spec.sections import is_local, lacks_package
from search.spec.study import StudySpec
from uipe_core.corpora.types import Corpus, ItemSet
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from uipe_core.models.prompts import PromptFormat

FEW_ITEMS = 20
"""Forget items below which a test tells next to nothing."""


def data_notes(spec: StudySpec, corpus: Corpus) -> list[str]:
    """Return notes on every set of a corpus; lengths are in tokens of the initial model, if that is on this machine."""
    prompts = None if isinstance(spec.model, TinyModel) else _prompts(spec.model)
    trained = {"forget": corpus.forget_train, "retain": corpus.retain_train}
    notes = []
    for name, items in corpus.sets.items():
        parts = [f"{len(items)} {'windows of texts' if any(item.plain for item in items) else 'items'}"]
        if name in trained and len(trained[name]) != len(items):
            parts.append(f"{len(trained[name])} to train on")
        if prompts is not None:
            lengths = [len(prompts.encode_item(item).input_ids) for item in items]
            parts.append(f"{median(lengths):g} tokens each in the median, {max(lengths)} in the longest")
        parts += [STANDS_IN[lacking] for lacking in corpus.stand_ins.get(name, ())]
        notes.append(f"corpus.{name}: {'; '.join(parts)}")
        twice = len(items) - len({(item.question, item.answer) for item in items})
        # Where forget quality is maximised, `check_split` says it of forget.
        if twice and (name != "forget" or spec.maximised[0].quality_of is None):
            notes.append(f"corpus.{name}: {twice} items stand there more than once; each counts")
        if prompts is not None:
            notes += _cut_short(spec, name, items, prompts)
    count = len(corpus.sets["forget"])
    if count < FEW_ITEMS:
        notes.append(f"corpus.forget: {count} items are too few for a test; give at least {FEW_ITEMS}, better 100")
    return notes


def _cut_short(spec: StudySpec, name: str, items: ItemSet, prompts: "PromptFormat") -> list[str]:
    """Return a note where answers are longer than the text that is generated for them: their recall cannot reach 1."""
    from uipe_core.scoring.scorer import ScoringConfig

    config = ScoringConfig.of(spec.scoring.definition, spec.scoring.rows, spec.scoring.max_new_tokens)
    longer = []
    for item in (each for each in items if not each.plain):  # a text is generated as long as its continuation
        example = prompts.encode_item(item)
        room = config.generation_length - (example.prompt_length if config.counts_prompt else 0)
        if example.answer_length > max(1, room):
            longer.append(example.answer_length)
    if not longer:
        return []
    counted = " with the prompt" if config.counts_prompt else ""
    return [
        f"corpus.{name}: {len(longer)} of {len(items)} answers are longer than what is generated ({config.generation_length} "
        f"tokens{counted}), so their ROUGE recall stays below 1; set scoring.max_new_tokens to {max(longer)} for all of them"
    ]


def _prompts(model: PretrainedModel | FinetunedModel) -> "PromptFormat | None":
    """Return the prompt format of the initial model; None if that is not on this machine or brings code of its own."""
    from uipe_core.models.loading import ModelSource, brings_code

    place = model.start
    if lacks_package(place):
        return None
    if not is_local(place):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(place, "config.json", revision=model.revision)
        if not isinstance(found, str):
            return None
        place = str(Path(found).parent)
    if brings_code(Path(place)):
        return None
    try:
        return ModelSource(place, "", prompt_template=model.prompt_template, prompt_format=model.prompt_format).prompts()
    except UserError:
        return None  # an adapter without a tokenizer, or a copy that is not whole
