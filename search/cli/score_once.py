"""Score a model outside any study; compute the metrics of an evaluation log."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from search.evaluation.inputs import NEED_WORDS, check_words, described_without_words, rows_without_words
from search.report.progress import Bars
from uipe_core.corpora.multiple_choice import WMDP_AND_MMLU, load_multiple_choice, sets_in_folder
from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import KEPT_SETS, RELATED_SETS, UTILITY_SETS, Corpus, ItemSet
from uipe_core.errors import UserError
from uipe_core.logs.multiple_choice import is_choice_log, read_choice_log, write_choice_log
from uipe_core.logs.open_unlearning import write_open_unlearning
from uipe_core.logs.tofu import is_log, read_log, unread_parts, write_log
from uipe_core.metrics.answers import rouge_recall
from uipe_core.metrics.collapse import choice_collapse_reason, collapse_reason
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.multiple_choice import evaluate_choices
from uipe_core.metrics.scores import ChoiceReport, ScoreReport
from uipe_core.metrics.tofu import evaluate, quality_of_set
from uipe_core.models.loading import load_model
from uipe_core.models.transformers_compat import position_limit
from uipe_core.scoring.lengths import require_positions
from uipe_core.scoring.multiple_choice import ChoiceScorer
from uipe_core.scoring.scorer import Scorer, ScoringConfig

LOG_FORMATS = ("tofu", "open-unlearning")


@dataclass(frozen=True)
class Loading:
    """Options of loading a model; see `uipe_core.models.loading.load_model`."""

    dtype: str
    device: str
    prompt_template: str | None
    prompt_format: str | None


def score_once(
    model: str,
    corpus: Corpus,
    loading: Loading,
    scoring: ScoringConfig,
    definition: str,
    reference: str | None,
    log: Path | None,
    log_format: str,
) -> dict[str, Any]:
    """Score a model and return its numbers as plain JSON values.

    Args:
        model: Folder or hub name.
        corpus: What it is scored on.
        loading, scoring: How.
        definition: Metric definition.
        reference: Evaluation log of either kind, or a model, which is then scored first, on what forget quality compares.
        log: Where to write the evaluation log, if at all: a file, or a folder for open-unlearning's two.
        log_format: One of `LOG_FORMATS`.

    Raises:
        UserError: An unknown format, a model or log that cannot be read, a reference of other items.
    """
    if log_format not in LOG_FORMATS:
        raise UserError(f"--log-format: {log_format!r} is unknown; give {' or '.join(LOG_FORMATS)}")
    check_words(corpus, definition)
    if corpus.choices:
        return _choices_once(model, corpus, loading, scoring, reference, log)
    against = None
    if reference is not None and is_log(reference):
        against = read_log(reference, as_reference=True)
    elif reference is not None:
        compared = {name: items for name, items in corpus.sets.items() if name in ("forget", *RELATED_SETS)}
        against = _scored(reference, corpus, compared, loading, scoring, "scoring the reference")
    scores = _scored(model, corpus, corpus.sets, loading, scoring, "scoring")
    values = _values(scores, against, definition)
    if log is not None:
        facts = {"model": model, "corpus": corpus.name}
        if log_format == "tofu":
            write_log(scores, log, facts)
        else:
            write_open_unlearning(scores, log, facts, against)
    return values


def metrics_of_log(log: Path, reference: Path | None, definition: str) -> dict[str, Any]:
    """Return the numbers of an evaluation log as plain JSON values; raises as `score_once`."""
    definition_named(definition)
    if is_choice_log(log):
        return _choice_values(read_choice_log(log))
    against = None if reference is None else read_log(reference, as_reference=True)
    if against is not None and (forget := _forget_set_alone(log)) is not None:
        quality = quality_of_set(forget, against, "forget", definition_named(definition))
        lacking = [name for name in UTILITY_SETS if name not in forget.sets] or ["losses of the forget set's own answers"]
        notes = [f"model utility: not in this log, which has no {', '.join(lacking)}", *_notes_on_reference(forget, against)]
        notes += _notes_on_parts(log)
        return {"definition": definition, "model_utility": None, **quality.as_dict(), "collapsed": None, "notes": notes}
    scores = _with_words_of(read_log(log), definition)
    values = _values(scores, against, definition)
    notes = [*_notes_on_words(scores, definition), *_notes_on_parts(log)]
    return {**values, "notes": [*values.get("notes", ()), *notes]} if notes else values


def _forget_set_alone(log: Path) -> ScoreReport | None:
    """Return what forget quality compares of a log that lacks what the other numbers need; None for a whole log."""
    forget = read_log(log, as_reference=True)
    if not forget.sets.keys() & set(UTILITY_SETS):
        return forget
    try:
        read_log(log)
    except UserError:  # wrong values were refused above, so something is missing
        return forget
    return None


def _notes_on_parts(log: Path) -> list[str]:
    """Say which tasks of a log are in no number."""
    unread = unread_parts(log)
    return [f"not in any number here: {', '.join(unread)}, which TOFU does not have"] if unread else []


def _notes_on_words(report: ScoreReport, definition: str) -> list[str]:
    """Say of which answers the ROUGE in a log is 0 whatever the model answered: no remedy is left but another definition."""
    remedy = NEED_WORDS
    if not definition_named(definition).unicode_rouge:
        remedy = "--definition tofu-unicode computes ROUGE again from the texts in the log"
    notes = []
    for name in ("forget", *KEPT_SETS):
        scores = report.sets.get(name)
        if scores is None or scores.answers is None or scores.rouge_l_recall is None:
            continue
        without = rows_without_words(scores.answers, definition)
        # Where it is not 0, the log's ROUGE counts other words than the definition's.
        if without and not scores.rouge_l_recall[without].any():
            notes.append(f"{described_without_words(name, scores.answers, without, definition)}; {remedy}")
    return notes


def _with_words_of(report: ScoreReport, definition: str) -> ScoreReport:
    """Return a log's scores with ROUGE over the words that the definition counts, where that differs from the log's."""
    if not definition_named(definition).unicode_rouge:
        return report
    sets = {}
    for name, scores in report.sets.items():
        if scores.generated is None or scores.answers is None:
            sets[name] = scores
            continue
        pairs = zip(scores.answers, scores.generated, strict=True)
        recall = np.array([rouge_recall(answer, text, unicode=True) for answer, text in pairs])
        sets[name] = replace(scores, rouge_l_recall=recall[:, 0], rouge_1_recall=recall[:, 1])
    return replace(report, sets=sets)


def corpus_named(name: str, split: str, seed: int, first_items: int | None, for_training: bool = False) -> Corpus:
    """Load the corpus that ``--corpus`` names: people, tofu or choices (from the hub), tofu:FOLDER or choices:FOLDER.

    Of TOFU perhaps its first items only, and where `for_training` its training items too; choices from the hub are WMDP-Bio
    and MMLU.
    """
    kind, _, folder = name.partition(":")
    if kind == "choices":
        return load_multiple_choice(*(sets_in_folder(Path(folder)) if folder else WMDP_AND_MMLU))
    if kind not in ("people", "tofu") or (kind == "people" and folder):
        raise UserError(f"--corpus: {name!r} is unknown; give people, tofu, tofu:FOLDER, choices or choices:FOLDER")
    return (
        load_people(seed)
        if kind == "people"
        else load_tofu(folder or "locuslab/TOFU", split, None, first_items, for_training=for_training)
    )


def _values(scores: ScoreReport, against: ScoreReport | None, definition: str) -> dict[str, Any]:
    values = {**evaluate(scores, against, definition).as_dict(), "collapsed": collapse_reason(scores)}
    notes = [] if against is None else _notes_on_reference(scores, against)
    return {**values, **({"notes": notes} if notes else {})}


def _notes_on_reference(scores: ScoreReport, against: ScoreReport) -> list[str]:
    """Say so where the reference has another tokenizer: its losses per token are then another model family's."""
    ours, theirs = scores.sets["forget"].paraphrase_tokens, against.sets["forget"].paraphrase_tokens
    if len(ours) != len(theirs) or not (ours.any() and theirs.any()):
        return []
    # Code bases count the end token or do not: a difference that is the same for every item is none.
    _, counts = np.unique(ours - theirs, return_counts=True)
    if counts.max() >= len(ours) / 2:
        return []
    return [
        "the reference's answers have other numbers of tokens: it is of another model family, and so is forget quality's scale"
    ]


def _choices_once(
    model: str, corpus: Corpus, loading: Loading, scoring: ScoringConfig, reference: str | None, log: Path | None
) -> dict[str, Any]:
    if reference is not None:
        raise UserError(f"--reference: {reference!r} given, but multiple choice is held against chance; leave it out")
    loaded = load_model(model, **asdict(loading))
    require_positions(corpus, loaded.prompts, scoring, position_limit(loaded.model.config), trains=False)
    with Bars() as bars:
        scorer = ChoiceScorer(corpus, loaded.prompts, scoring.batch_size)
        scores = scorer.score(loaded, progress=lambda done, total: bars.show("scoring", done, total))
    values = _choice_values(scores)
    if log is not None:
        write_choice_log(scores, log, {"model": model, "corpus": corpus.name})
    return values


def _choice_values(scores: ChoiceReport) -> dict[str, Any]:
    return {**evaluate_choices(scores).as_dict(), "collapsed": choice_collapse_reason(scores)}


def _scored(
    model: str, corpus: Corpus, sets: Mapping[str, ItemSet], loading: Loading, scoring: ScoringConfig, title: str
) -> ScoreReport:
    loaded = load_model(model, **asdict(loading))
    require_positions(replace(corpus, sets=sets), loaded.prompts, scoring, position_limit(loaded.model.config), trains=False)
    with Bars() as bars:
        scorer = Scorer(replace(corpus, sets=sets), loaded.prompts, scoring)
        return scorer.score(loaded, progress=lambda done, total: bars.show(title, done, total))
