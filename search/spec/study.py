"""Validate a study as a whole, before anything is spent."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails

from search.problem.objectives import LM_EVAL, MEMORIZATION, RETAIN_UTILITY, Objective, objective_named
from search.problem.space import Point, Range, distributions, given_points, grid_points
from search.samplers.registry import SAMPLERS
from search.spec.bounds import Seed
from search.spec.corpora import CORPORA, FREE_TEXT, MULTIPLE_CHOICE, CorpusSection, path_sites
from search.spec.errors import KeyPath, Problem, StudyFileError, did_you_mean, explain, forget_keys, key_text, rule
from search.spec.models import FinetunedModel, PretrainedModel, TinyModel
from search.spec.paths import absolute_paths
from search.spec.plugins import load_plugins
from search.spec.runtime import Audit, Budget, Cache, Folders, FoldersOrNone, Resources, Tracking
from search.spec.sections import (
    ByKind,
    Harness,
    Hypervolume,
    Objectives,
    Scoring,
    Search,
    Section,
    Split,
    Values,
    is_local,
)
from search.spec.study_file import LineNumbers, line_of, place_of, read_study_file, with_settings
from search.spec.unlearning import BaseRunSpec, Unlearning
from uipe_core.metrics.composites import ROUGE_F1
from uipe_core.metrics.scores import CHOICE_DEFINITION
from uipe_core.unlearning.methods import FORMER, METHODS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_OVERRIDES = {"trials": "search.trials"}
"""Options of the command line that are named otherwise than the key they stand for."""

MOST_HINTS = 100
"""Errors of a study with a guess at what was meant: with more of them it is another program's file."""

DATABASES = ("sqlite", "postgresql", "mysql", "mariadb")
"""Databases that trials may be kept in, by SQLAlchemy's names: Optuna reads and writes JSON there."""

RUNNING_KEYS = ("audit", "resources", "budget", "warm_start", "storage", "cache", "tracking")
"""How a study runs, which does not make it another study."""


class StudySpec(Section):
    """A whole study. Paths in it are absolute, everything else was checked against the code that will use it."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=64)]
    seed: Seed = 0
    corpus: Annotated[CorpusSection, ByKind(CORPORA)]
    model: Annotated[TinyModel | PretrainedModel | FinetunedModel, Field(discriminator="kind")]
    unlearning: Unlearning | None = None
    checkpoints: dict[str, Folders] = Field(default_factory=dict)
    scoring: Scoring = Field(default_factory=Scoring)
    split: Split | None = None
    objectives: Objectives = Field(default_factory=Objectives)
    lm_eval: Harness | None = None
    search: Search = Field(default_factory=Search)
    hypervolume: Hypervolume = Field(default_factory=Hypervolume)
    audit: Audit | None = None
    resources: Resources = Field(default_factory=Resources)
    budget: Budget = Field(default_factory=Budget)
    warm_start: FoldersOrNone = ()
    storage: str | None = None
    cache: Cache = Field(default_factory=Cache)
    tracking: Tracking | None = None

    @model_validator(mode="before")
    @classmethod
    def _corpus_has_a_definition(cls, data: object) -> object:
        corpus, scoring = (data.get("corpus"), data.get("scoring", {})) if isinstance(data, Mapping) else (None, None)
        kind = CORPORA.get(str(corpus.get("kind"))) if isinstance(corpus, Mapping) else None
        definition = getattr(kind, "definition", None)
        if not isinstance(data, Mapping) or definition is None or not isinstance(scoring, Mapping):
            return data
        return {**data, "scoring": {"definition": definition, **scoring}}

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        if value in (".", ".."):
            raise rule("the name becomes a folder, and this one exists everywhere", "Choose another name.")
        return value

    @field_validator("checkpoints")
    @classmethod
    def _there_are_base_runs(cls, value: dict[str, tuple[str, ...]], info: ValidationInfo) -> dict[str, tuple[str, ...]]:
        if not value and info.data.get("unlearning", value) is None:
            allowed = "a study needs base runs: a section unlearning, a section checkpoints, or both"
            raise rule(allowed, "Write unlearning: with methods to train, or checkpoints: with folders you have.")
        if value and isinstance(info.data.get("model"), TinyModel | FinetunedModel):
            allowed = "checkpoints belong to a model that exists already"
            raise rule(allowed, "Set model.kind: pretrained with model.initial, the model they were unlearned from.")
        errors: list[Any] = []
        for label in value:
            if label in METHODS:
                error = rule(f"{label} is the name of a method", f"Choose another label, for example my_{label}.")
            elif not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", label):
                error = rule("a label is 1 to 64 letters, digits, dots, underscores or hyphens", "Choose such a label.")
            else:
                continue
            errors.append({"type": error, "loc": (label,), "input": label})
        if errors:
            raise ValidationError.from_exception_data("checkpoints", errors)
        # Sorted, so that the order in the file makes no other search space.
        return dict(sorted(value.items()))

    @field_validator("storage")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        # Other storages of Optuna (journals on Redis) keep pickles, which run code when they are read.
        if value is not None and not re.match(rf"({'|'.join(DATABASES)})(\+\w+)?://", value):
            allowed = f"must be the URL of a database: {', '.join(DATABASES)}"
            raise rule(allowed, "Write for example sqlite:////data/study.db, postgresql+psycopg://host/studies, or null.")
        return value

    @model_validator(mode="after")
    def _fits_the_corpus(self) -> "StudySpec":
        methods = {run.method for run in self.variants()}
        found = self.corpus.model_errors(dict(self.model))
        found += self.corpus.study_errors(self.objectives.third or self.search.third_objective, methods)
        found += self._objective_errors()
        found += self._range_errors()
        if found:
            raise ValidationError.from_exception_data("study", found)
        return self

    @model_validator(mode="after")
    def _grid_has_its_points(self) -> "StudySpec":
        if SAMPLERS[self.search.sampler].fixed_points:
            least = 2 * sum(self.base_epochs().values())
            if self.search.trials < least:
                allowed = f"a grid has each of the {least // 2} base epochs at two values of alpha at least"
                error = rule(allowed, f"Give at least {least} trials, or another sampler.")
                detail: InitErrorDetails = {"type": error, "loc": ("search", "trials"), "input": self.search.trials}
                raise ValidationError.from_exception_data("study", [detail])
        return self

    @classmethod
    def recorded(cls, data: object) -> "StudySpec":
        """Validate a study as a record or recipe keeps it (JSON or YAML, where tuples are lists).

        Raises:
            ValidationError: It is no study of this version.
        """
        load_plugins()
        spec = cls.model_validate(data, strict=False)
        former = {key: (value,) for key, value in FORMER.items()}
        methods = () if spec.unlearning is None else spec.unlearning.methods
        return spec._filled(dict.fromkeys(methods, former))

    def continuing(self, earlier: "StudySpec | None") -> "StudySpec":
        """Return the study as a run of it goes on: with the hyperparameters that the file does not name.

        Args:
            earlier: The study as it was recorded by an earlier run, which may be older than some hyperparameters; None if this
                is the first.
        """
        return self._filled(None if earlier is None or earlier.unlearning is None else earlier.unlearning.methods)

    def _filled(self, earlier: Mapping[str, Mapping[str, Values]] | None) -> "StudySpec":
        return self if self.unlearning is None else self.model_copy(update={"unlearning": self.unlearning.filled(earlier)})

    @property
    def definition(self) -> str:
        """Name of the metric definition of every number of the study."""
        return CHOICE_DEFINITION if self.corpus.task == MULTIPLE_CHOICE else self.scoring.definition

    @property
    def has_retain_model(self) -> bool:
        """Return True if a model that never saw the forget set, or its log, is part of the study."""
        return self.corpus.task == FREE_TEXT and (isinstance(self.model, TinyModel) or bool(self.model.retain))

    @property
    def maximised(self) -> tuple[Objective, ...]:
        """The objectives, all maximised: forgetting, utility, and a third where the study names one.

        Where the study names none, a corpus has its own that need a retain model; without one, how much is memorised is held
        against what is retained (OpenUnlearning, arXiv 2506.12618, advises against choosing by retain models).
        """
        compared = any(objective.needs_retain_model for objective in self.corpus.objectives)
        free = self.corpus.task == FREE_TEXT and not self.has_retain_model and compared
        standard = (MEMORIZATION, RETAIN_UTILITY) if free else self.corpus.objectives
        named = self._named_objectives()
        roles = zip(("forgetting", "utility"), standard, strict=True)
        found = [objective_named(role, named[role]) if role in named else default for role, default in roles]
        found += [objective_named("third", named["third"])] if "third" in named else []
        return tuple(objective.on(self.corpus.sets) for objective in found)

    def _named_objectives(self) -> dict[str, str]:
        given = {"third": self.search.third_objective, **self.objectives.model_dump(exclude_none=True, exclude={"floor"})}
        return {role: name for role, name in given.items() if name is not None}

    def _objective_errors(self) -> list[InitErrorDetails]:
        """List named objectives that cannot be computed for this corpus and model."""
        found: list[InitErrorDetails] = []

        def refuse(role: str, why: str, remedy: str) -> None:
            loc = ("search", "third_objective") if role == "third" and self.objectives.third is None else ("objectives", role)
            found.append({"type": rule(why, remedy), "loc": loc, "input": self._named_objectives()[role]})

        if self.objectives.third is not None and self.search.third_objective is not None:
            refuse("third", f"search.third_objective ({self.search.third_objective}) is given too", "Remove one of the two.")
        if (LM_EVAL.name in [each.name for each in self.maximised]) != (self.lm_eval is not None):
            key = "objectives" if self.lm_eval is None else "lm_eval"
            why = "the objective lm_eval and the section lm_eval belong together"
            remedy = "Write lm_eval: {tasks: [arc_easy], limit: 100} and objectives: {utility: lm_eval}, or neither."
            found.append({"type": rule(why, remedy), "loc": (key,), "input": self.objectives.utility})
        for role, name in self._named_objectives().items():
            objective = objective_named(role, name).on(self.corpus.sets)
            missing = [each for each in objective.sets if each not in self.corpus.sets]
            measured = getattr(self.corpus, "measures", ())
            if self.corpus.task == MULTIPLE_CHOICE:
                if role != "third":  # a third one is refused by the corpus
                    refuse(role, "a multiple-choice corpus has objectives of its own", "Remove it.")
            elif missing:
                give = f"Give corpus.{missing[0]}, or choose" if hasattr(self.corpus, missing[0]) else "Choose"
                remedy = f"{give} another objective (uipe objectives)."
                refuse(role, f"the corpus has no {' and no '.join(missing)} items, which it is made of", remedy)
            elif any(each.measure == ROUGE_F1 and ROUGE_F1 not in measured for each in objective.components):
                refuse(role, "it is MUSE's, whose texts end at a given length", "Choose another objective (uipe objectives).")
            elif objective.needs_retain_model and not self.has_retain_model:
                remedy = "Give model.retain, a model or its log, or an objective that needs none (uipe objectives)."
                refuse(role, "it compares with a retain model, and the study has none", remedy)
        return found

    def _range_errors(self) -> list[InitErrorDetails]:
        """List ranges of alpha for methods that the study does not train."""
        trained = [] if self.unlearning is None else list(self.unlearning.methods)
        return [
            {
                "type": rule(f"the study trains no {name}", did_you_mean(name, trained) if trained else "Remove it."),
                "loc": ("search", "alpha_by_method", name),
                "input": self.search.alpha_by_method[name],
            }
            for name in self.search.alpha_by_method
            if name not in trained
        ]

    def search_space(self) -> "dict[str, BaseDistribution]":
        """Return the search space, in the form of ``study.ask(fixed_distributions=...)``."""
        return distributions(self.base_epochs(), self.search.alpha.ends)

    def given_points(self) -> list[Point]:
        """Return every epoch of every base run at alpha = 0."""
        return given_points(self.base_epochs(), self.alpha_ranges())

    def grid_points(self) -> list[Point]:
        """Return the points of ``search.sampler: grid``."""
        return grid_points(self.base_epochs(), self.alpha_ranges(), self.search.trials)

    def alpha_ranges(self) -> dict[str, Range]:
        """Return both ends of alpha by base run: the study's for its method, else the method's own, else `search.alpha`."""
        own = self._own_ranges()
        return {label: own.get(method, self.search.alpha.ends) for label, method in self.methods().items()}

    def range_key(self, base: str) -> str:
        """Return the key of the study file that sets the range of alpha of a base run."""
        method = self.methods()[base]
        return f"search.alpha_by_method.{method}" if method in self._own_ranges() else "search.alpha"

    def _own_ranges(self) -> dict[str, Range]:
        """Return the ranges of methods that have one of their own."""
        given = {name: own.ends for name, own in self.search.alpha_by_method.items()}
        return {} if self.unlearning is None else self.unlearning.own_ranges(given)

    def variants(self) -> list[BaseRunSpec]:
        """Return the base runs to train: by method in the order of the registry, then by value in the order of the file."""
        return [] if self.unlearning is None else self.unlearning.base_runs(self.seed)

    def siblings(self, base: str) -> dict[int, str]:
        """Return the base runs that differ from one in their seed only, itself included: label by seed.

        Empty where every base run has one seed, and for given checkpoints.
        """
        runs = self.variants() if self.unlearning is not None and self.unlearning.seeds else []
        own = [(run.method, run.hyperparameters) for run in runs if run.label == base]
        return {run.seed: run.label for run in runs if (run.method, run.hyperparameters) in own}

    def base_epochs(self) -> dict[str, int]:
        """Return the number of epochs by base run: those to be trained, then those given as checkpoints."""
        trained = {} if self.unlearning is None else {run.label: self.unlearning.epochs for run in self.variants()}
        return {**trained, **{label: len(folders) for label, folders in self.checkpoints.items()}}

    def methods(self) -> dict[str, str]:
        """Method by base run; a given checkpoint goes by its label."""
        return {**{run.label: run.method for run in self.variants()}, **{label: label for label in self.checkpoints}}

    def fingerprint_payload(self) -> dict[str, Any]:
        """Return what identifies the study, ready for JSON.

        Left out: the number of trials and whether some are pruned, the other retain models and the model never fine-tuned
        (controls that may come later), what `RUNNING_KEYS` names, which may change from run to run; local paths, because a
        folder may move: the caller puts hashes of their content in.
        """
        controls = {"other_retain_seeds", "other_retain", "never_finetuned"}
        left_out = {"search": {"trials", "prune"}, "model": controls, "checkpoints": True, **dict.fromkeys(RUNNING_KEYS, True)}
        payload: dict[str, Any] = self.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
        corpus, model = payload["corpus"], payload["model"]
        holders = [(holder, str(key[-1])) for key, holder, _ in path_sites(corpus)]
        for holder, key in [*holders, (model, "initial"), (model, "retain"), (model, "base")]:
            if isinstance(place := holder.get(key), str) and is_local(place):
                del holder[key]
        # Studies from before these could be named stay what they are.
        if "alternates" in corpus and corpus["alternates"] is None:
            del corpus["alternates"]
        if not self.objectives.model_dump(exclude_none=True):
            del payload["objectives"]
        elif self.objectives.floor is None:
            del payload["objectives"]["floor"]
        if self.lm_eval is None:
            del payload["lm_eval"]
        payload["search"]["alpha_by_method"] = {name: list(ends) for name, ends in self._own_ranges().items()}
        if not payload["search"]["alpha_by_method"]:
            del payload["search"]["alpha_by_method"]
        if self.unlearning is not None:
            payload["unlearning"]["methods"] = self.unlearning.identifying_methods()
            if not self.unlearning.seeds:
                del payload["unlearning"]["seeds"]
        if self.checkpoints:
            payload["checkpoints"] = {label: len(folders) for label, folders in self.checkpoints.items()}
        return payload


def parse_study(data: Mapping[str, object], folder: Path | None = None) -> StudySpec:
    """Validate a study given as plain data.

    Args:
        data: What a study file contains.
        folder: What relative paths are relative to; None is the current directory.

    Raises:
        StudyFileError: With everything that is wrong.
    """
    return _build(data, folder or Path.cwd(), "study", {}, {})


def load_study(path: Path | str, overrides: Mapping[str, object] | None = None) -> StudySpec:
    """Read and validate a study file.

    Args:
        path: The YAML file; relative paths in it are relative to its folder.
        overrides: Values given on the command line, by key: ``search.trials``, or ``trials`` for short; None leaves the
            file's value.

    Raises:
        StudyFileError: With everything that is wrong.
    """
    path = Path(path)
    data, lines = read_study_file(path)
    return _build(data, path.resolve().parent, str(path), lines, overrides or {})


def _build(
    data: Mapping[str, object], folder: Path, source: str, lines: LineNumbers, overrides: Mapping[str, object]
) -> StudySpec:
    load_plugins()
    if not isinstance(data, Mapping):
        raise StudyFileError([Problem("", "a study is a mapping of keys to values. Give a dict.")], source)
    given: dict[KeyPath, object] = {
        tuple(_OVERRIDES.get(name, name).split(".")): value for name, value in overrides.items() if value is not None
    }
    study, found = absolute_paths(with_settings(data, given), folder)
    try:
        spec = StudySpec.model_validate(study)
    except ValidationError as error:
        forget_keys()
        details = enumerate(error.errors(include_url=False))
        found.extend(explain(detail, StudySpec, study, hint=number < MOST_HINTS) for number, detail in details)
        found.extend(_hidden_problem(study, {parts for parts, _ in found}))
    else:
        if not found:
            return spec
    found.sort(key=lambda problem: line_of(problem[0], lines))
    raise StudyFileError([Problem(key_text(parts), text, place_of(parts, lines, given)) for parts, text in found], source)


def _hidden_problem(study: Mapping[str, object], known: set[KeyPath]) -> list[tuple[KeyPath, str]]:
    """Run the checks that span sections, which pydantic leaves out as soon as anything else is wrong."""
    corpus, model = study.get("corpus"), study.get("model")
    kind = CORPORA.get(str(corpus.get("kind"))) if isinstance(corpus, Mapping) and isinstance(model, Mapping) else None
    found = []
    for error in [] if kind is None else kind.model_errors(model):
        broken: Any = error["type"]
        detail: Any = {**error, "type": broken.type, "ctx": broken.context}
        if detail["loc"] not in known:
            found.append(explain(detail, StudySpec, study))
    return found
