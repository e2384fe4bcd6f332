"""List the audits of a model: attacks under which knowledge may come back, or be seen to have been there.

One entry of `AUDITS` says everything about a kind: what is done to the model, what is measured, what it needs and costs, and
what it cannot show. An audit of a trial is a control of its study, so that it resumes and is kept like the others. Torch is
imported where an audit runs, because commands that only read a study list them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from search.spec.corpora import FREE_TEXT, MULTIPLE_CHOICE
from search.spec.runtime import Audit as AuditSection
from uipe_core.corpora.types import Corpus
from uipe_core.metrics.scores import ChoiceReport, ScoreReport

if TYPE_CHECKING:
    from uipe_core.audits.relearning import RelearningConfig
    from uipe_core.models.loading import LoadedModel
    from uipe_core.scoring.scorer import Scorer


@dataclass(frozen=True)
class AuditInputs:
    """Inputs of an audit on a worker.

    Attributes:
        corpus: The study's items, those of training among them.
        scored: Evaluation sets with the items that trials are scored on.
        scorer: Scores these.
        initial: Scores of the initial model on these; of letters where the study scores letters.
        longest: Most tokens of a generated text.
        unicode: ROUGE counts words of any script.
        settings: Section ``audit`` of the study.
        seed: Of draws.
    """

    corpus: Corpus
    scored: Corpus
    scorer: "Scorer"
    initial: ScoreReport | ChoiceReport
    longest: int
    unicode: bool
    settings: AuditSection
    seed: int


Change = Callable[["LoadedModel", Corpus, AuditSection, int], AbstractContextManager["LoadedModel"]]
"""What an attack does to a model, with the study's items, its section ``audit`` and its seed."""


@dataclass(frozen=True)
class Number:
    """One number of an audit: its key in the evidence, and its name in tables, which may name a setting in braces."""

    key: str
    title: str
    places: int = 3


@dataclass(frozen=True)
class Audit:
    """A kind of audit.

    Attributes:
        title: Its name in tables.
        shows, cannot_show: The question it answers, and the one that it does not.
        scorings: What it costs, in scorings of a trial.
        each_sample: `scorings` are those of one of ``audit.samples`` samples.
        needs: Evaluation sets without which it cannot be done.
        tasks: Tasks whose models it is for.
        changed: Changes the model until the context ends, when it is restored to the bit; the model is then scored like any
            other. None where `measured` does the work.
        measured: Return numbers of the model.
        numbers: Those of `measured`, for tables.
        settings: What of section ``audit`` its numbers depend on; None where they depend on nothing there.
        steps: Training steps it takes, from the section and the corpus; None where it trains nothing.
    """

    title: str
    shows: str
    cannot_show: str
    scorings: float = 1.0
    each_sample: bool = False
    needs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = (FREE_TEXT,)
    changed: Change | None = None
    measured: "Callable[[LoadedModel, AuditInputs], Mapping[str, float]] | None" = None
    numbers: tuple[Number, ...] = field(default=())
    settings: Callable[[AuditSection], Mapping[str, Any]] | None = None
    steps: Callable[[AuditSection, Corpus], int] | None = None

    def cost(self, section: AuditSection) -> float:
        """Return what it costs under a section's settings, in scorings of a trial."""
        return self.scorings * (section.samples if self.each_sample else 1)

    def settings_text(self, section: AuditSection) -> str | None:
        """Return its settings as JSON, which its controls carry: changed settings make another control."""
        return None if self.settings is None else json.dumps(self.settings(section), sort_keys=True)


@contextmanager
def with_rounded_weights(loaded: "LoadedModel", scheme: str) -> "Iterator[LoadedModel]":
    """Yield the model rounded to a grid. One with an adapter is merged first, as it is before it ships in few bits."""
    from copy import deepcopy

    from uipe_core.audits.quantisation import round_weights, rounded
    from uipe_core.deltas.extrapolation import merge
    from uipe_core.models.transformers_compat import has_adapter

    if has_adapter(loaded.model):
        merged = merge(deepcopy(loaded.model))
        round_weights(merged, scheme)
        yield replace(loaded, model=merged)
        return
    with rounded(loaded.model, scheme):
        yield loaded


def _relearning_config(kind: str, section: AuditSection, corpus: Corpus, seed: int) -> "RelearningConfig":
    from search.evaluation.models import adapter_config
    from uipe_core.audits.relearning import RelearningConfig

    settings = section.relearning
    return RelearningConfig(
        kind,
        items={"few": settings.few, "benign": len(corpus.forget_train)}.get(kind),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        adapter=adapter_config(settings.adapter),
        seed=seed,
    )


def _rounded(scheme: str) -> Change:
    return lambda loaded, corpus, section, seed: with_rounded_weights(loaded, scheme)


def _relearned(kind: str) -> Change:
    def changed(
        loaded: "LoadedModel", corpus: Corpus, section: AuditSection, seed: int
    ) -> "AbstractContextManager[LoadedModel]":
        from uipe_core.audits.relearning import relearn
        from uipe_core.errors import UserError

        found = relearn(loaded, corpus, _relearning_config(kind, section, corpus, seed))
        if found.loaded is None:
            raise UserError(f"training {found.problem}")
        return nullcontext(found.loaded)

    return changed


def _relearning_settings(kind: str) -> Callable[[AuditSection], Mapping[str, Any]]:
    return lambda section: section.relearning.model_dump(mode="json", exclude=set() if kind == "few" else {"few"})


def _relearning_steps(kind: str) -> Callable[[AuditSection, Corpus], int]:
    def steps(section: AuditSection, corpus: Corpus) -> int:
        from uipe_core.audits.relearning import relearning_items, training_steps
        from uipe_core.errors import UserError

        config = _relearning_config(kind, section, corpus, 0)
        try:
            return training_steps(len(relearning_items(corpus, config)), config)
        except UserError:  # no such items: the table will say so
            return 0

    return steps


def _membership(loaded: "LoadedModel", inputs: AuditInputs) -> dict[str, float]:
    from uipe_core.audits.membership import membership_scores
    from uipe_core.audits.token_scores import read_token_scores
    from uipe_core.metrics.composites import auc

    scores = {}
    for name in ("forget", "holdout"):
        items = inputs.scored.sets[name]
        scores[name] = membership_scores(read_token_scores(loaded, items), [item.answer for item in items])
    return {f"{name}_auc": float(auc(own, scores["holdout"][name])) for name, own in scores["forget"].items()}


def _prompts(loaded: "LoadedModel", inputs: AuditInputs) -> dict[str, float]:
    from uipe_core.audits.prompts import WAYS, answers, choose_shots, reverse_answers
    from uipe_core.audits.texts import judge

    items = inputs.scored.sets["forget"]
    shots = choose_shots(inputs.corpus.retain_train or inputs.scored.sets["retain"], seed=inputs.seed)
    scores = judge([item.answer for item in items], answers(loaded, items, list(WAYS), inputs.longest, shots), inputs.unicode)
    found = {"prompts_rouge": scores.mean_highest_recall, "prompts_contained": scores.contained_share}
    gold, texts = reverse_answers(loaded, items, inputs.longest)
    return {**found, "prompts_reverse": judge(gold, texts, inputs.unicode).contained_share} if gold else found


def _sampling(loaded: "LoadedModel", inputs: AuditInputs) -> dict[str, float]:
    from uipe_core.audits.texts import judge
    from uipe_core.scoring.sampling import samples

    items = inputs.scored.sets["forget"]
    prompts = [loaded.prompts.item_prompt_ids(item) for item in items]
    texts = samples(loaded, prompts, inputs.settings.samples, inputs.longest, seed=inputs.seed)
    scores = judge([item.answer for item in items], texts, inputs.unicode)
    return {"sampling_rouge": scores.mean_highest_recall, "sampling_contained": scores.contained_share}


def _fluency(loaded: "LoadedModel", inputs: AuditInputs) -> dict[str, float]:
    from uipe_core.audits.fluency import fluency, fluency_limits
    from uipe_core.errors import UserError

    own, initial = inputs.scorer.score(loaded), inputs.initial
    assert isinstance(initial, ScoreReport)
    names = [name for name, scores in own.sets.items() if scores.generated is not None]
    if any(initial.sets[name].generated is None for name in names):
        raise UserError("the texts of the initial model were not kept, and its texts set the limits")
    gold = [item.answer for name in names for item in inputs.scored.sets[name]]
    limits = fluency_limits([text for name in names for text in initial.sets[name].generated or ()], gold)
    kept = [text for name in names if name != "forget" for text in own.sets[name].generated or ()]
    forget = fluency(own.sets["forget"].generated or (), limits)
    return {
        "faulty_forget": forget.faulty,
        "empty_forget": forget.empty,
        "repeated_forget": forget.repeated,
        "garbled_forget": forget.garbled,
        "faulty_kept": fluency(kept, limits).faulty,
    }


_FORMS = {
    "int8": ("weights in 8 bits", "per output channel"),
    "int4": ("weights in 4 bits (int4)", "in groups of 128, to the nearest"),
    "nf4": ("weights in 4 bits (NF4)", "in blocks of 64, as QLoRA does"),
}

_TRAININGS = {
    "relearn_forget": ("forget", "relearned: forget set", "the forget set is trained on again"),
    "relearn_few": ("few", "relearned: a few items", "a few forget items are trained on again, and all are asked"),
    "relearn_retain": (
        "benign",
        "relearned: retain items",
        "only items to keep are trained on, as a user who tunes the model does",
    ),
}

AUDITS: dict[str, Audit] = {
    **{
        kind: Audit(
            title,
            f"Does it come back when weights are rounded {how}?",
            "Methods that look at data (GPTQ, AWQ), rounded activations.",
            tasks=(FREE_TEXT, MULTIPLE_CHOICE),
            changed=_rounded(kind),
        )
        for kind, (title, how) in _FORMS.items()
    },
    **{
        kind: Audit(
            title,
            f"Does it come back when {how}?",
            "Longer training, other data, another learning rate.",
            changed=_relearned(training),
            settings=_relearning_settings(training),
            steps=_relearning_steps(training),
        )
        for kind, (training, title, how) in _TRAININGS.items()
    },
    "membership": Audit(
        "membership",
        "Is it seen that the model was trained on the forget set?",
        "Attacks that train models of their own.",
        scorings=0.5,
        needs=("holdout",),
        measured=_membership,
        numbers=(
            Number("loss_auc", "AUC of LOSS (0.5: not seen)"),
            Number("zlib_auc", "AUC of ZLib"),
            Number("min_k_auc", "AUC of Min-K%"),
            Number("min_k_plus_plus_auc", "AUC of Min-K%++"),
            Number("privleak", "PrivLeak against {reference}, %", 1),
        ),
    ),
    "prompts": Audit(
        "other prompts",
        "Does the answer come when it is begun, asked in other words, after other turns, or the other way round?",
        "Searched prompts, other languages.",
        scorings=2.0,
        measured=_prompts,
        numbers=(
            Number("prompts_rouge", "highest ROUGE-L recall of all ways"),
            Number("prompts_contained", "share of answers given in any way"),
            Number("prompts_reverse", "share answered the other way round"),
        ),
    ),
    "sampling": Audit(
        "samples",
        "Does the answer come in one of k samples (leak@k)?",
        "Leaks rarer than one in k, other prompts.",
        scorings=0.3,
        each_sample=True,
        measured=_sampling,
        numbers=(
            Number("sampling_rouge", "highest ROUGE-L recall of {samples} samples"),
            Number("sampling_contained", "share of answers given in any of {samples} samples"),
        ),
        settings=lambda section: {"samples": section.samples},
    ),
    "fluency": Audit(
        "fluency",
        "Does the model still write text?",
        "Whether the text is true, or answers the question.",
        measured=_fluency,
        numbers=(
            Number("faulty_forget", "faulty texts, forget set"),
            Number("empty_forget", "empty texts, forget set"),
            Number("repeated_forget", "repeated texts, forget set"),
            Number("garbled_forget", "garbled texts, forget set"),
            Number("faulty_kept", "faulty texts, kept sets"),
        ),
    ),
}
"""Audits by the kind of their control."""
