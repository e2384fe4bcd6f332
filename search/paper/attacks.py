"""One part of the experiment on attacks: a base run of a study, its walks and controls, each scored and attacked.

An attack changes the weights of a scored model: rounding to 4 bits, and fine-tuning on the forget set, on a few of its items,
or on items to keep (`uipe_core.audits`). Forgetting is the memorisation score, which is continuous and needs no retain model.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from search.evaluation.controls import CONTROLS
from search.evaluation.evaluator import load_for_scoring
from search.evaluation.prepared import PreparedStudy, prepare
from search.evaluation.task import Comparison, task_of
from search.paper.settings import Task
from search.problem.objectives import MEMORIZATION, TRUTH_RATIO
from search.problem.trial import INITIAL, RETAIN
from search.spec.corpora import FREE_TEXT
from search.spec.models import TinyModel
from search.spec.runtime import Audit, Relearning
from search.spec.study import StudySpec, load_study, quickstart_path
from uipe_core.corpora.types import KEPT_SETS
from uipe_core.errors import UserError
from uipe_core.metrics.collapse import collapse_reason
from uipe_core.metrics.composites import composite
from uipe_core.metrics.scores import ScoreReport
from uipe_core.storage.content_store import content_key

if TYPE_CHECKING:
    from uipe_core.deltas.store import BaseRun, EpochResult
    from uipe_core.deltas.update_vectors import UpdateVector
    from uipe_core.models.loading import LoadedModel, Progress

ATTACKS_SCHEMA = 1
"""Raised whenever a change in this file alters what a part yields, so that kept parts are not taken for new."""

FOUR_BITS = ("nf4", "int4")
ATTACKS = {
    "nf4": "4 bits: NF4",
    "int4": "4 bits: int4",
    "relearn_forget": "relearned: forget set",
    "relearn_few": "relearned: a few forget items",
    "relearn_retain": "relearned: retain items",
}
"""Attacks by the kind of their audit (`search.evaluation.controls.CONTROLS`), with their names in figures."""

LEAST = 0.05
"""Points that forgot less of the memorisation score are not attacked: a share of nothing is noise."""

WALK, PUSHED, RANDOM = "walk", "pushed", "random"
"""Kinds of point: theta(alpha); an epoch as trained and a random step that takes it as far as a walk; a random step alone."""

SMALL_RELEARNING = Relearning(learning_rate=5e-4, batch_size=8)
"""The quickstart's models learned at 0.003, where 2e-5, the default of audits, moves nothing in an epoch."""


@dataclass(frozen=True)
class AttackSettings:
    """Everything that determines the experiment, but for the seed.

    Attributes:
        study: Corpus, models, methods and their training; its section ``audit`` says how knowledge is trained back. All items
            are scored, and nothing is searched.
        walks: By epoch that is walked from, the alphas, without 0; every trained epoch is scored at alpha = 0.
        far: The alpha, above 0, whose distance from theta_init the random steps have; they start where walks go above 0.
    """

    study: StudySpec
    walks: Mapping[int, tuple[float, ...]]
    far: float = 1.0

    @classmethod
    def small(cls) -> "AttackSettings":
        """Return those of the quickstart's world and models: every epoch, six values of alpha other than 0."""
        study = load_study(quickstart_path()).model_copy(update={"audit": Audit(relearning=SMALL_RELEARNING)})
        return cls(study, dict.fromkeys(range(1, study.base_epochs()["grad_ascent"] + 1), (-0.75, -0.5, -0.25, 0.5, 1.0, 2.0)))

    @classmethod
    def of_study(cls, study: StudySpec) -> "AttackSettings":
        """Return those of a study: above 0 from its first epoch, below 0 from its last, within the alphas of its search.

        Raises:
            UserError: The study scores letters, trains nothing, maximises a utility that is no mean over items, allows no alpha
                above 0, or runs code that comes with its model.
        """
        _require_fit(study)
        assert study.unlearning is not None
        above = tuple(alpha for alpha in (0.5, 1.0) if alpha <= study.search.alpha.high)
        below = tuple(alpha for alpha in (-0.5, -0.25) if alpha >= study.search.alpha.low)
        if not above:
            high = study.search.alpha.high
            raise UserError(f"search.alpha.high: {high:g} leaves no walk beyond a trained epoch; give 0.5 or more")
        last = study.unlearning.epochs
        return cls(study, {1: above, last: below} if last > 1 else {1: (*below, *above)}, far=max(above))

    @cached_property
    def key(self) -> str:
        """Identity of the settings: results with another one are other experiments."""
        prepared = prepare(self.study)
        inputs = prepared.base_run_inputs(prepared.unlearning(self.study.variants()[0]))["unlearning"]
        # Results from before the last step of an epoch had its share are those of other base runs.
        trained = {"last_step": inputs["last_step"]} if "last_step" in inputs else {}
        return content_key({"fingerprint": prepared.fingerprint, "schema": ATTACKS_SCHEMA, **trained, **self.as_dict()})

    @property
    def audit(self) -> Audit:
        """Section ``audit`` of the study, or its defaults: how knowledge is trained back."""
        return self.study.audit or Audit()

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-able form of what is not in the study's fingerprint."""
        return {
            "study": self.study.name,
            "walks": {str(epoch): list(alphas) for epoch, alphas in self.walks.items()},
            "far": self.far,
            "least": LEAST,
            "relearning": self.audit.relearning.model_dump(mode="json"),
        }

    def tasks(self, seeds: int) -> list[Task]:
        """Return the tasks of so many seeds, from the study's own on; those of one seed, which share models, lie apart."""
        bases = [run.label for run in self.study.variants()]
        return [Task(self.study.seed + step, base, attacks=True) for base in bases for step in range(seeds)]

    @property
    def pushes(self) -> bool:
        """Return True where random steps are taken: a sum of low-rank updates is none of their rank."""
        return self.study.unlearning is not None and self.study.unlearning.adapter is None

    def points(self, trained: int) -> list[tuple[str, int, float]]:
        """Return the (kind, epoch, alpha) of a part, every trained epoch first; of random steps alpha gives the distance."""
        found = [(WALK, epoch, 0.0) for epoch in range(1, trained + 1)]
        for epoch, alphas in self.walks.items():
            found += [(WALK, epoch, alpha) for alpha in alphas]
            pushed = self.pushes and max(alphas, default=0.0) > 0
            found += [(PUSHED, epoch, self.far), (RANDOM, epoch, self.far)] if pushed else []
        return found

    def cost(self, parts: int) -> str:
        """Say what so many parts cost at most, in models."""
        assert self.study.unlearning is not None
        points = self.points(self.study.unlearning.epochs + 1)
        attacked = parts * sum(kind != RANDOM for kind, _, _ in points)
        return (
            f"attacks: {parts} base runs to train and {parts * len(points)} models to score, of which up to {attacked} are "
            "rounded twice and fine-tuned three times"
        )


def _require_fit(study: StudySpec) -> None:
    if study.corpus.task != FREE_TEXT:
        raise UserError(
            f"corpus.kind: {study.corpus.kind} scores letters, and attacks are on answers that are texts; give another"
        )
    if study.unlearning is None:
        raise UserError("unlearning: the study trains no method, and its checkpoints have no further epochs; add the section")
    if not study.maximised[1].components:
        raise UserError(
            f"objectives.utility: {study.maximised[1].name} is no mean over items; give model_utility or retain_utility"
        )
    if not isinstance(study.model, TinyModel) and study.model.trust_remote_code:
        raise UserError("model.trust_remote_code: this command runs no code that comes with a model; set it to false")


def run_attacks(settings: AttackSettings, task: Task, threads: int, progress: "Progress | None" = None) -> dict[str, Any]:
    """Return everything measured of one base run and its walks.

    Args:
        settings: What to run.
        task: Which seed, which base run.
        threads: Torch's threads.
        progress: Called with (steps done, steps in all); a step is a model that is scored, with the attacks on it.

    Returns:
        Strict JSON: ``items`` (how many, by set), ``initial`` and ``retain`` (numbers of these models; null without one),
        ``points`` (a row for each of `AttackSettings.points`: ``kind``, ``epoch``, ``alpha``, ``distance`` from theta_init,
        ``forgetting``, ``utility``, ``after``: forgetting after each attack, null where ``problems`` says why there is none),
        ``problem`` (why there are no points: training diverged; null otherwise), ``seconds``.

    Raises:
        UserError: A model or an item is missing or broken, or the cache cannot be written.
    """
    from uipe_core.models.loading import set_threads

    set_threads(threads)
    part = _Part(settings, task)
    started = time.perf_counter()
    found = part.run(progress or (lambda done, total: None))
    items = {name: len(chosen) for name, chosen in part.scored.sets.items()}
    return {"seed": task.seed, "base": task.part, "items": items, **found, "seconds": time.perf_counter() - started}


class _Part:
    """The models, items and settings of one task."""

    def __init__(self, settings: AttackSettings, task: Task) -> None:
        self.settings = settings
        self.prepared: PreparedStudy = prepare(settings.study.model_copy(update={"seed": task.seed}))
        self.spec = self.prepared.spec
        self.run_spec = next(run for run in self.spec.variants() if run.label == task.part)
        corpus = self.prepared.corpus
        names = [name for name in ("forget", *KEPT_SETS) if name in corpus.sets]
        self.scored = replace(corpus, sets={name: corpus.sets[name] for name in names})
        self.task = task_of(corpus)

    def run(self, progress: "Progress") -> dict[str, Any]:
        from uipe_core.unlearning.training import DivergedError

        source = self.prepared.models.ready_source(INITIAL)
        planned = self.settings.points(self.prepared.trained_epochs)
        reference = self._retain_model()
        try:
            trained = self._trained()
        except DivergedError as error:
            progress(len(planned), len(planned))
            return {"initial": None, "retain": None, "points": [], "problem": str(error)}
        loaded, walker = load_for_scoring(source)
        self.scorer = self.task.scorer(self.scored, loaded.prompts, self.prepared.scoring)
        self.reference = None if reference is None else self._score(reference)
        initial = self._numbers(self._score(loaded))
        retain = None
        if reference is not None:
            assert self.reference is not None
            retain = {**self._numbers(self.reference), **self._attacked(reference)}
            del reference
        points = []
        last: tuple[int, UpdateVector] | None = None
        for number, (kind, epoch, alpha) in enumerate(planned, 1):
            if last is None or last[0] != epoch:
                last = None  # what it holds in memory may be what the next one needs
                last = epoch, trained.load(epoch)
            update, distance = last[1], (1.0 + alpha) * float(trained.epochs[epoch - 1]["norm"])
            if kind != WALK:
                update = random_step(update, alpha, self.spec.seed, alone=kind == RANDOM)
                distance = update.norm
            model = replace(loaded, model=walker.apply(update, 0.0 if kind != WALK else alpha))
            numbers = self._numbers(self._score(model))
            gone = numbers["forgetting"] - initial["forgetting"]
            after = self._attacked(model) if kind != RANDOM and gone >= LEAST else {"after": {}, "problems": {}}
            points.append({"kind": kind, "epoch": epoch, "alpha": alpha, "distance": distance, **numbers, **after})
            progress(number, len(planned))
        return {"initial": initial, "retain": retain, "points": points, "problem": None}

    def _retain_model(self) -> "LoadedModel | None":
        found = [model for model in self.prepared.models.references() if model.kind == RETAIN and model.log is None]
        return load_for_scoring(self.prepared.models.ready_source(RETAIN))[0] if found else None

    def _trained(self) -> "BaseRun":
        """Return the base run from the delta store, where studies find it too, or train it."""
        from uipe_core.deltas.store import DeltaStore
        from uipe_core.unlearning.training import train_base_run

        config = self.prepared.unlearning(self.run_spec)

        def epochs() -> "Iterator[EpochResult]":  # loads nothing where the store has it
            source = self.prepared.models.ready_source(INITIAL)
            corpus = self.prepared.training_corpus(config.method, source)
            yield from train_base_run(source.load(dtype="auto"), corpus, config)

        return DeltaStore(self.prepared.delta_root).get_or_train(self.prepared.base_run_inputs(config), epochs())

    def _score(self, loaded: "LoadedModel") -> ScoreReport:
        report, _ = self.task.score(self.scorer, loaded, Comparison({}, self.spec.definition, self.spec.maximised))
        assert isinstance(report, ScoreReport)
        return report

    def _numbers(self, report: ScoreReport) -> dict[str, Any]:
        metrics = self.task.evaluate(report, self.reference, self.spec.definition)
        quality = metrics.forget_quality
        return {
            "forgetting": metrics.composites[MEMORIZATION.name],
            "utility": metrics.composites[self.spec.maximised[1].name],
            TRUTH_RATIO.name: metrics.composites[TRUTH_RATIO.name],
            "log10_forget_quality": None if quality is None else quality.log10_p,
            "collapsed": collapse_reason(report),
        }

    def _attacked(self, loaded: "LoadedModel") -> dict[str, Any]:
        """Return forgetting after every attack, and why there is none after some."""
        after: dict[str, float | None] = {}
        problems = {}
        for attack in ATTACKS:
            try:
                with self._after(loaded, attack) as changed:
                    # Losses of the forget set are the first stage, and all that the memorisation score is made of.
                    report = next(iter(self.scorer.stages(changed))).without_overflow()
                    after[attack] = composite(report, MEMORIZATION.components, self.spec.definition)
            except UserError as error:
                after[attack], problems[attack] = None, str(error)
        return {"after": after, "problems": problems}

    def _after(self, loaded: "LoadedModel", attack: str) -> "AbstractContextManager[LoadedModel]":
        """Return the model as an attack leaves it, as a context; it is itself again afterwards, to the bit."""
        audit = CONTROLS[attack].audit
        assert audit is not None and audit.changed is not None
        return audit.changed(loaded, self.prepared.corpus, self.settings.audit, self.spec.seed)


def random_step(update: "UpdateVector", alpha: float, seed: int, alone: bool) -> "UpdateVector":
    """Return a dense update that ends as far from theta_init as theta(alpha), and owes that to chance.

    Args:
        update: delta, dense.
        alpha: Above 0; the distance is (1 + alpha) |delta|, of the sum nearly so: a random direction is nearly orthogonal.
        seed: Of the direction, which has delta's norm in every tensor.
        alone: The random step alone; else delta and a random step: what was forgotten is there, and only distance is added.
    """
    from uipe_core.deltas.update_vectors import UpdateVector, random_direction

    noise = random_direction(update, seed).tensors
    own, other = (0.0, 1.0 + alpha) if alone else (1.0, math.sqrt((1.0 + alpha) ** 2 - 1.0))
    return UpdateVector(update.kind, {name: own * update.tensors[name] + other * noise[name] for name in update.shapes})
