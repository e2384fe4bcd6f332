"""Define what a study maximises, and why a point of it is flagged."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from uipe_core.corpora.types import KNOWLEDGE, MEMBERSHIP_SETS, PRIVLEAK_SETS, UTILITY_SETS
from uipe_core.errors import UserError, did_you_mean
from uipe_core.metrics.composites import (
    AGREEMENT,
    CLOSENESS,
    EXACT,
    EXTRACTION,
    OF_LOSSES,
    PARAPHRASE,
    PROBABILITY,
    ROUGE,
    ROUGE_F1,
    TRUTH_SHARE,
    Component,
)
from uipe_core.metrics.scores import SetScores

ROUNDED = "forget_nf4"
"""Scores of the forget set by the model with its weights rounded to NF4, among those of a trial."""

MADE_FROM = {ROUNDED: "forget"}
"""Evaluation set of the corpus behind each that only scores have."""


@dataclass(frozen=True)
class Objective:
    """One number of a trial, maximised.

    Attributes:
        name: Its key in a trial's evidence, column of the tables, and metric name in Optuna.
        title: Its name on axes and in sentences.
        head: Its name at the head of a narrow column; two lines at most.
        places: Decimal places in tables.
        quality_of: The evaluation set whose log10 forget quality it is: then it is never below what so many items can give,
            and differences above the noise ceiling mean nothing. None for every other number.
        p_value: Key of the p-value behind it, shown next to it in the report's tables.
        companions: Further numbers shown with it: key and head of each. Sentences say the first in its place.
        worst: Its coordinate in the reference point of hypervolume, where the study file gives none.
        from_items: Made of item scores: the sampler ``line`` models it, and intervals resample it.
        components: What it is the harmonic mean of (`uipe_core.metrics.composites`); empty for every other number.
        optional: Sets whose components count only where the corpus has the set.
        membership: Of privacy, how little membership in the training data shows (`uipe_core.metrics.composites.privacy`): the
            two sets whose Min-K% it compares, members first. Empty for every other number.
        function: ``package.module:function`` that computes it, for an objective of the user's own.
        about: What it measures and its range, in a line of ``uipe objectives``.
        chance: What a model has that cannot tell true answers from false ones; None where that is not known.
    """

    name: str
    title: str
    head: str
    places: int
    quality_of: str | None = None
    p_value: str | None = None
    companions: tuple[tuple[str, str], ...] = ()
    worst: float | None = None
    from_items: bool = False
    components: tuple[Component, ...] = ()
    optional: tuple[str, ...] = ()
    membership: tuple[str, ...] = ()
    function: str | None = None
    about: str = ""
    chance: float | None = None

    @property
    def needs_retain_model(self) -> bool:
        """Return True if it compares with a retain model."""
        return self.quality_of is not None

    @property
    def sets(self) -> tuple[str, ...]:
        """Evaluation sets of the corpus that it is made of, as far as they are known."""
        return tuple(dict.fromkeys(MADE_FROM.get(name, name) for name in self.scored_sets))

    @property
    def scored_sets(self) -> tuple[str, ...]:
        """Sets of a trial's scores that it is made of: those of the corpus, and `ROUNDED`."""
        own = () if self.quality_of is None else (self.quality_of,)
        return tuple(dict.fromkeys([*own, *(each.item_set for each in self.components), *self.membership]))

    @property
    def scored_on_reference_models(self) -> bool:
        """Return True if the scores of a reference model, which are those of its log, tell it."""
        return not self.compares_with_initial and ROUNDED not in self.scored_sets

    @property
    def compares_with_initial(self) -> bool:
        """Return True if it needs what the initial model says at every token: one more pass per worker."""
        return any(each.measure == AGREEMENT for each in self.components)

    @property
    def reads_text(self) -> bool:
        """Return True if it needs generated text; every other measure is known from losses."""
        return any(each.measure not in OF_LOSSES for each in self.components)

    def on(self, sets: Collection[str]) -> "Objective":
        """Return the objective for a corpus with these evaluation sets."""
        absent = set(self.optional) - set(sets)
        kept = tuple(each for each in self.components if each.item_set not in absent)
        return self if len(kept) == len(self.components) else replace(self, components=kept)

    def ceiling(self, forget_quality_cap: float) -> float:
        """The value above which differences are noise, in this objective's unit; infinity where there is none."""
        return math.inf if self.quality_of is None else math.log10(forget_quality_cap)


FORGET_QUALITY = Objective(
    "log10_forget_quality",
    "log10 forget quality",
    "log10\nFQ",
    2,
    "forget",
    "forget_quality",
    from_items=True,
    about="log10 p of TOFU's test against the retain model, at most 0",
)

_KEPT = (PROBABILITY, ROUGE, CLOSENESS)

MODEL_UTILITY = Objective(
    "model_utility",
    "model utility",
    "MU",
    4,
    worst=0.0,
    from_items=True,
    components=tuple(Component(name, measure) for name in UTILITY_SETS for measure in _KEPT),
    about="TOFU's harmonic mean of nine numbers, in [0, 1]",
)

RELATED_FORGET_QUALITY = Objective(
    "related_log10_forget_quality",
    "log10 forget quality of related facts (K2)",
    "log10\nFQ K2",
    2,
    "related",
    from_items=True,
    about="as log10_forget_quality, of related facts (K2)",
)


def _composite(name: str, title: str, head: str, about: str, *components: Component) -> Objective:
    return Objective(name, title, head, 4, worst=0.0, from_items=True, components=components, about=about)


def _forgotten(name: str, item_set: str, title: str, head: str, *measures: str) -> Objective:
    parts = tuple(Component(item_set, measure, inverted=True) for measure in measures)
    which = "the forget set" if item_set == "forget" else f"{item_set} facts"
    return _composite(name, f"{title} ({item_set})", head, f"{title} of {which}, in [0, 1]", *parts)


MEMORIZATION = _composite(
    "memorization_score",
    "memorisation score (1: nothing memorised)",
    "memo-\nrisation",
    "OpenUnlearning's harmonic mean of 1 - ES, 1 - EM, 1 - paraphrase probability, 1 - truth ratio, in [0, 1]",
    *(Component("forget", measure, inverted=True) for measure in (EXTRACTION, EXACT, PARAPHRASE, TRUTH_SHARE)),
)

ROBUST_FORGETTING = _composite(
    "robust_forgetting",
    "memorisation score after rounding to NF4 (1: nothing memorised)",
    "memo-\nrisation\nNF4",
    "the memorisation score of the model with its weights rounded to NF4, in [0, 1]; one more pass over the forget set",
    *(Component(ROUNDED, measure, inverted=True) for measure in (EXTRACTION, EXACT, PARAPHRASE, TRUTH_SHARE)),
)

PRIVACY = Objective(
    "privacy",
    "privacy (1: membership does not show)",
    "privacy",
    4,
    worst=0.0,
    from_items=True,
    membership=MEMBERSHIP_SETS,
    about="1 - |AUC of Min-K% - the retain model's, or 0.5 without one|, scaled to [0, 1]; the holdout items are scored too",
)

PRIVLEAK = replace(
    PRIVACY,
    name="privleak_privacy",
    title="privacy by MUSE's PrivLeak (1: membership does not show)",
    head="privacy\nPrivLeak",
    companions=(("privleak", "PrivLeak %"),),
    membership=PRIVLEAK_SETS,
    about="as privacy, of MUSE's texts; PrivLeak itself, in percent with 0 as the ideal, is shown with it",
)

_F1 = "mean ROUGE-L F1 of"
VERBMEM = _composite(
    "one_minus_verbmem",
    "1 - VerbMem",
    "1 - Verb-\nMem",
    f"1 - MUSE's VerbMem, {_F1} 128 tokens of continuation of the texts to forget, in [0, 1]",
    Component("forget", ROUGE_F1, inverted=True),
)

KNOWMEM = _composite(
    "one_minus_knowmem",
    "1 - KnowMem",
    "1 - Know-\nMem",
    f"1 - MUSE's KnowMem, {_F1} answers on the texts to forget, behind examples, in [0, 1]",
    Component(KNOWLEDGE, ROUGE_F1, inverted=True),
)

KNOWMEM_RETAIN = _composite(
    "knowmem_retain",
    "KnowMem of the retain set",
    "KnowMem\nretain",
    f"MUSE's utility preservation, {_F1} answers on the texts to keep, behind examples, in [0, 1]",
    Component("retain", ROUGE_F1),
)

RETAIN_UTILITY = replace(
    _composite(
        "retain_utility",
        "retain utility",
        "retain\nutility",
        "harmonic mean of probability and ROUGE on retain and, where the corpus has them, general items, in [0, 1]",
        *(Component(name, measure) for name in ("retain", "general") for measure in (PROBABILITY, ROUGE)),
    ),
    optional=("general",),
)

AGREEMENT_WITH_INITIAL = replace(
    _composite(
        "agreement_with_initial",
        "agreement with the initial model, exp(-KL)",
        "exp(-KL)",
        "exp(-KL from the initial model per answer token) on retain and, where there, general items, in [0, 1]",
        *(Component(name, AGREEMENT) for name in ("retain", "general")),
    ),
    optional=("general",),
)

CHOICE_FORGETTING = Objective(
    "forgetting_to_chance",
    "minus forget accuracy above chance",
    "− above\nchance",
    4,
    companions=(("forget_accuracy", "forget accuracy"), ("forget_accuracy_se", "± s.e.")),
    from_items=True,
    about="minus the accuracy on forget above chance, in [-1, 0]",
    chance=0.0,
)

CHOICE_UTILITY = Objective(
    "utility_accuracy",
    "utility accuracy",
    "utility\nacc.",
    4,
    companions=(("utility_accuracy_se", "± s.e."),),
    from_items=True,
    about="accuracy on utility, in [0, 1]",
)

TRUTH_RATIO = replace(
    _forgotten("one_minus_truth_share", "forget", "1 - truth ratio p / (p + q)", "1 - truth\nratio", TRUTH_SHARE), chance=0.5
)

FORGETTING: dict[str, Objective] = {
    "log10_forget_quality": FORGET_QUALITY,
    "memorization": MEMORIZATION,
    "extraction_strength": _forgotten(
        "one_minus_extraction_strength", "forget", "1 - extraction strength", "1 - ES", EXTRACTION
    ),
    "exact_memorization": _forgotten("one_minus_exact_memorization", "forget", "1 - exact memorisation", "1 - EM", EXACT),
    "answer_probability": _forgotten(
        "one_minus_answer_probability", "forget", "1 - answer probability", "1 - answer\nprob.", PROBABILITY
    ),
    "rouge": _forgotten("one_minus_rouge", "forget", "1 - ROUGE-L recall", "1 - ROUGE", ROUGE),
    "truth_ratio": TRUTH_RATIO,
    "verbmem": VERBMEM,
    "knowmem": KNOWMEM,
}
"""Objectives of forgetting by the name a study file gives (``objectives.forgetting``)."""

LM_EVAL = Objective(
    "lm_eval_accuracy",
    "accuracy in lm-evaluation-harness",
    "harness\nacc.",
    4,
    worst=0.0,
    about="mean accuracy of the tasks in section lm_eval, in [0, 1]; as many further passes as these have items",
)

UTILITY: dict[str, Objective] = {
    "model_utility": MODEL_UTILITY,
    "retain_utility": RETAIN_UTILITY,
    "kl_from_initial": AGREEMENT_WITH_INITIAL,
    "lm_eval": LM_EVAL,
    "knowmem_retain": KNOWMEM_RETAIN,
}
"""Objectives of utility by the name a study file gives (``objectives.utility``)."""

THIRD_OBJECTIVES: dict[str, Objective] = {
    ROBUST_FORGETTING.name: ROBUST_FORGETTING,
    RELATED_FORGET_QUALITY.name: RELATED_FORGET_QUALITY,
    PRIVACY.name: PRIVACY,
    "privleak": PRIVLEAK,
    "related_extraction_strength": _forgotten(
        "one_minus_related_extraction_strength", "related", "1 - extraction strength", "1 - ES\nrelated", EXTRACTION
    ),
    "unrelated_utility": _composite(
        "unrelated_utility",
        "probability of unrelated facts (K0)",
        "prob. K0",
        "mean answer probability of unrelated facts, in [0, 1]",
        Component("unrelated", PROBABILITY),
    ),
}
"""Objectives a study may add, by the name its file gives (``objectives.third``, or ``search.third_objective``)."""

ROLES: dict[str, dict[str, Objective]] = {"forgetting": FORGETTING, "utility": UTILITY, "third": THIRD_OBJECTIVES}
"""Objectives by the key of section ``objectives``, then by the name the file gives."""

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""How an objective of the user's own is named."""


def objective_named(role: str, name: str) -> Objective:
    """Return the objective a study file names in a role; ``package.module:function`` makes one of the user's own.

    Raises:
        UserError: There is none of that name; gives those there are.
    """
    if name in ROLES[role]:
        return ROLES[role][name]
    if FUNCTION.fullmatch(name):
        short = name.rpartition(":")[2]
        return Objective(short, short.replace("_", " "), short[:12], 4, worst=0.0, function=name, about=f"computed by {name}")
    known = ", ".join(ROLES[role])
    raise UserError(f"{name!r} is none of {known}, and no package.module:function.{did_you_mean(name, ROLES[role])}")


def composites(sets: Mapping[str, SetScores]) -> list[Objective]:
    """List the composites that scores tell: numbers of every trial, whatever its study maximises.

    Those of generated text are listed whether it was generated or not, but for ROUGE's F1, which few items have.
    """
    named = {each.name: each.on(sets) for role in ROLES.values() for each in role.values() if each.components}
    return [
        each
        for each in named.values()
        if set(each.scored_sets) <= set(sets)
        and all(part.measure not in (AGREEMENT, ROUGE_F1) or part.is_known(sets[part.item_set]) for part in each.components)
    ]


def chosen_by(objectives: Sequence[Objective]) -> str:
    """Return a sentence: which objectives choose, and whether they look at a retain model."""
    compared = [objective.title for objective in objectives if objective.needs_retain_model]
    looked = f"{' and '.join(compared)} compares with a retain model" if compared else "none looked at a retain model"
    titles = [objective.title for objective in objectives]
    return f"Chosen by {', '.join(titles[:-1])} and {titles[-1]}; {looked}."


@dataclass(frozen=True)
class Flag:
    """Why a point is marked as not to be believed at first sight: what holds of it, and what that may mean."""

    meaning: str
    caution: str


def flag_of(objectives: tuple[Objective, ...]) -> Flag:
    """Return what a flag says of the points of a study with these objectives."""
    if objectives[0].name == CHOICE_FORGETTING.name:
        return Flag("forget accuracy below chance", "which takes knowing the answers and avoiding them: nothing was forgotten")
    return Flag(
        "utility above every reference model's beyond the 95% interval, with a larger logit scale",
        "which sharper logits alone can bring about",
    )
