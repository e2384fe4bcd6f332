"""Check a study's local inputs, items and reference models, and load warm-start points, before anything is spent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from search.evaluation.data_notes import data_notes
from search.evaluation.harness import require_harness
from search.evaluation.metrics import own_function
from search.evaluation.model_checks import LATER, check_models
from search.evaluation.task import Report
from search.problem.objectives import Objective
from search.problem.space import Point
from search.problem.trial import INITIAL, RETAIN
from search.spec.corpora import QuestionsCorpus, fetched_sources
from search.spec.models import TinyModel
from search.spec.study import StudySpec
from search.store.trials import on_front
from uipe_core.corpora.split import split_corpus
from uipe_core.corpora.types import KEPT_SETS, Corpus
from uipe_core.errors import UserError
from uipe_core.metrics.answers import has_latin_word
from uipe_core.metrics.composites import composite, membership_auc
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.uncertainty import detectable_shift
from uipe_core.unlearning.methods import METHODS


def require_trust(spec: StudySpec, granted: bool) -> None:
    """Refuse a study whose models bring code of their own, unless the one who starts it trusts that code.

    Args:
        spec: The study. A key of a file, which may be somebody else's, grants nothing by itself.
        granted: ``--trust-remote-code`` was given.

    Raises:
        UserError: The study asks for trust that is not granted.
    """
    if not isinstance(spec.model, TinyModel) and spec.model.trust_remote_code and not granted:
        raise UserError(
            f"model.trust_remote_code: true in a file runs nothing by itself; read the code that comes with "
            f"{spec.model.start}, then add --trust-remote-code (in Python: trust_remote_code=True), or set the key to false"
        )


def check_inputs(spec: StudySpec) -> list[str]:
    """Check the inputs of a study that are on this machine; return notes on what only the run can check.

    Code that comes with a model is never run here, whatever the study says.

    Raises:
        UserError: If an input is missing or broken.
    """
    check_objectives(spec)
    if spec.tracking is not None:
        spec.tracking.require_installed()
    notes = [f"corpus.{key}: {source} {LATER}" for key, source in fetched_sources(spec.corpus)]
    corpus = None
    if not notes:
        corpus = spec.corpus.load(spec.seed)
        notes += check_items(spec, corpus)
    notes += check_models(spec, corpus)
    if corpus is not None and isinstance(spec.corpus, QuestionsCorpus):
        notes += data_notes(spec, corpus)
    return [*notes, *earlier_fronts(spec).notes]


def check_objectives(spec: StudySpec) -> None:
    """Import the objectives of the user's own, and look for the tasks of the harness.

    Raises:
        UserError: One cannot be imported, or is no function; the harness or a task is missing.
    """
    if spec.lm_eval is not None:
        require_harness(spec.lm_eval)
    for objective in spec.maximised:
        if objective.function is not None:
            own_function(objective.function)


MANY_ITEMS = 100
"""Forget quality on so many items passes no untouched model (TOFU, two real logs); on 20 it passes 46% of them."""


def check_items(spec: StudySpec, corpus: Corpus) -> list[str]:
    """Check what a study that begins asks of its items; one that has begun is read, resumed and exported as it is.

    Raises:
        UserError: As `check_split` and `check_words`, or a method that answers questions is to unlearn texts.
    """
    check_words(corpus, spec.definition)
    refusing = [run.label for run in spec.variants() if METHODS[run.method].substitutes]
    if refusing and any(item.plain for item in corpus.forget_train):
        raise UserError(
            f"unlearning.methods: {refusing[0]} answers questions, and corpus.forget has texts; remove the method, or give "
            "questions with answers"
        )
    return check_split(spec, corpus)


def check_split(spec: StudySpec, corpus: Corpus) -> list[str]:
    """Refuse a split that leaves forget quality too few items where there are enough; return a note where there are too few.

    Raises:
        UserError: Fewer than `MANY_ITEMS` forget items to select on, of more than that; or an empty half.
    """
    split = split_corpus(corpus, None if spec.split is None else spec.split.select, spec.seed)
    if "forget" not in corpus.sets or spec.maximised[0].quality_of is None:
        return []
    whole, kept = len(corpus.sets["forget"]), len(split.select["forget"])
    if kept < MANY_ITEMS < whole:
        assert spec.split is not None
        enough = math.ceil(100 * MANY_ITEMS / whole) / 100
        raise UserError(
            f"split.select: {spec.split.select:g} leaves forget quality {kept} of {whole} forget items, and on fewer than "
            f"{MANY_ITEMS} it passes models that were never unlearned; give {enough:.2f} or more, or leave it out"
        )
    items = [corpus.sets["forget"][row] for row in split.select["forget"]]
    twice = len(items) - len({(item.question, item.answer) for item in items})
    notes = [f"corpus: {twice} forget items stand there more than once; forget quality counts each"] if twice else []
    if kept >= MANY_ITEMS:
        return notes
    half = "" if spec.split is None else f" `split` leaves {kept} of {whole} forget items; without it there are {whole}."
    return [*notes, f"{power_of_forget_quality(kept)}{half}"]


def check_words(corpus: Corpus, definition: str) -> None:
    """Refuse answers in which ROUGE sees no word: their recall is 0, and with it model utility, whatever a model answers.

    Raises:
        UserError: An evaluation set with such answers: most definitions count runs of a-z and 0-9 alone.
    """
    if not corpus.sets:
        return  # multiple choice has letters, not words
    any_script = definition_named(definition).unicode_rouge
    remedy = NEED_WORDS if any_script else "set scoring.definition (--definition) to tofu-unicode"
    for name in (name for name in ("forget", *KEPT_SETS) if name in corpus.sets):
        answers = [item.answer for item in corpus.sets[name]]
        if without := rows_without_words(answers, definition):
            raise UserError(f"corpus: {described_without_words(name, answers, without, definition)}; {remedy}")


NEED_WORDS = "give answers with words, or leave these items out"


def rows_without_words(answers: Sequence[str], definition: str) -> list[int]:
    """Return the places of answers in which ROUGE of a definition sees no word."""
    has_word = _has_word if definition_named(definition).unicode_rouge else has_latin_word
    return [row for row, answer in enumerate(answers) if not has_word(answer)]


def described_without_words(name: str, answers: Sequence[str], without: Sequence[int], definition: str) -> str:
    """Say what the answers found by `rows_without_words` do to the numbers of their set."""
    counted = "letter" if definition_named(definition).unicode_rouge else "letter a-z"
    return (
        f"{len(without)} of {len(answers)} {name} answers ({answers[without[0]]!r}) have no {counted} and no digit, all that "
        f"ROUGE of the definition {definition} counts, so their recall is 0 for every model"
    )


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def power_of_forget_quality(items: int) -> str:
    """Say in a sentence what forget quality on so many items can see (`uipe_core.metrics.uncertainty.detectable_shift`)."""
    shift, distance = detectable_shift(items)
    if distance >= 1:
        return f"Forget quality on {items} items: no difference is seen, however large."
    return (
        f"Forget quality on {items} items: truth ratios {shift:.2g} standard deviations from the retain model's (KS distance "
        f"{distance:.2f}) are seen (p < 0.05) in nine of ten draws of items; what is closer may pass as unlearned."
    )


@dataclass(frozen=True)
class EarlierFronts:
    """Hold what earlier studies offer.

    Attributes:
        points: Front points that exist in this study too, in the order of `warm_start`, each once.
        notes: What was left out, and why.
    """

    points: tuple[Point, ...]
    notes: tuple[str, ...]


def earlier_fronts(spec: StudySpec) -> EarlierFronts:
    """The fronts of the studies that `spec.warm_start` names, as points of this study.

    Numbers are not taken over: corpus, model or definition may be others here, so every point is scored again.

    Raises:
        UserError: If a folder holds no study or no trial, or its study maximises something else.
    """
    points: dict[Point, None] = {}
    notes: list[str] = []
    for place, folder in enumerate(spec.warm_start):
        name, front = _front_of(spec, f"warm_start[{place}]: ", Path(folder))
        for point in front:
            reason = _misfit(spec, point)
            if reason is not None:
                where = f"{point.base}, epoch {point.epoch}, alpha {point.alpha:.4g}"
                notes.append(f"warm_start: {where} of {name} is left out: {reason}")
            else:
                points.setdefault(point)
    return EarlierFronts(tuple(points), tuple(notes))


def _front_of(spec: StudySpec, where: str, folder: Path) -> tuple[str, list[Point]]:
    """Name of the study in a folder, and its front."""
    from search.store.study_store import StudyStore  # Optuna and pandas come with it, and most studies need none of it

    try:
        store = StudyStore.open(folder)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    ours = [objective.name for objective in spec.maximised]
    theirs = [objective.name for objective in store.objectives]
    if ours != theirs:
        raise UserError(
            f"{where}{folder}: its study maximises {', '.join(theirs)}, this one {', '.join(ours)}; give studies with the same "
            "objectives, or remove it"
        )
    trials, controls = store.trials_frame(), store.controls_frame()
    store.close()
    if trials.empty:
        raise UserError(f"{where}{folder}: no trial of this study is complete yet; finish it, or remove it")
    name = store.record.name
    front = trials[on_front(trials, controls, ours)]
    return name, [
        Point(str(row["base"]), int(row["epoch"]), float(row["alpha"]), warm_start=name) for row in front.to_dict("records")
    ]


def _misfit(spec: StudySpec, point: Point) -> str | None:
    """Why a point is none of this study's search, or None."""
    epochs = spec.base_epochs()
    if point.base not in epochs:
        return f"this study has no base run {point.base} (it has {', '.join(epochs)})"
    if point.epoch > epochs[point.base]:
        return f"{point.base} has {epochs[point.base]} epochs here"
    low, high = spec.alpha_ranges()[point.base]
    if not low <= point.alpha <= high:
        return f"{spec.range_key(point.base)} goes from {low:g} to {high:g}"
    return "it is scored anyway" if point.alpha == 0 else None


UNKNOWN = 0.05
"""Mean answer probability and extraction strength below which a model does not know a set."""

AS_WELL = 0.9
"""Share of the initial model's answer probability from which on a retain model knows the forget set as well."""


def check_references(
    references: Mapping[str, Report], identities: Mapping[str, str], objectives: Sequence[Objective], definition: str
) -> list[str]:
    """Return warnings about the reference models of free text, each with its numbers.

    Args:
        references: Scores of the reference models on all items.
        identities: Of their weights, by name.
        objectives: What the study maximises.
        definition: Metric definition.

    Raises:
        UserError: The initial and the retain model are the same.
    """
    initial, retain = references.get(INITIAL), references.get(RETAIN)
    if not isinstance(initial, ScoreReport) or "forget" not in initial.sets:
        return []
    found = []
    forget = initial.sets["forget"]
    known, extracted = _probability(forget), _extraction(forget)
    if known < UNKNOWN and extracted < UNKNOWN:
        found.append(
            f"the initial model does not know the forget set (mean answer probability {known:.3f}, extraction strength "
            f"{extracted:.3f}): there is nothing to unlearn; check model.initial and model.prompt_format"
        )
    if isinstance(retain, ScoreReport) and "forget" in retain.sets:
        _require_another(forget, retain.sets["forget"], identities)
        other = _probability(retain.sets["forget"])
        if known < other:
            found.append(
                f"the retain model knows the forget set better than the initial model (mean answer probability {other:.3f} "
                f"against {known:.3f}): have the two been exchanged?"
            )
        elif np.isfinite(other) and known >= UNKNOWN and other > AS_WELL * known:
            found.append(
                f"the retain model knows the forget set nearly as well as the initial model (mean answer probability "
                f"{other:.3f} against {known:.3f}): was it trained without the forget set?"
            )
    compared = [each for each in objectives if each.membership]
    if compared and isinstance(retain, ScoreReport) and membership_auc(retain.sets, compared[0].membership) is None:
        found.append(
            f"{compared[0].title}: the retain model's log has no Min-K% of {' and '.join(compared[0].membership)} items, "
            "so its reference is 0.5"
        )
    utility = objectives[1]
    if utility.components and set(utility.sets) <= initial.sets.keys():
        value = composite(initial, utility.components, definition)
        if value < UNKNOWN:
            found.append(
                f"the {utility.title} of the initial model is {value:.3f}, so there is nothing to keep: look at its answers in "
                "logs/initial.json, at model.prompt_format and at scoring.definition"
            )
    return found


def _probability(scores: SetScores) -> float:
    return float(np.exp(-scores.answer_loss).mean())


def _extraction(scores: SetScores) -> float:
    return 0.0 if scores.extraction_strength is None else float(scores.extraction_strength.mean())


def _require_another(initial: SetScores, retain: SetScores, identities: Mapping[str, str]) -> None:
    """Refuse a retain model that is the initial one: by its weights, or by every loss."""
    losses = [(getattr(initial, name), getattr(retain, name)) for name in ("answer_loss", "paraphrase_loss", "perturbed_loss")]
    same = all(one.shape == two.shape and np.array_equal(one, two) for one, two in losses)
    if same or (INITIAL in identities and identities[INITIAL] == identities.get(RETAIN)):
        raise UserError(
            "model.retain: it is the initial model, or one that answers every item alike; give the model trained without the "
            "forget set, or none"
        )
