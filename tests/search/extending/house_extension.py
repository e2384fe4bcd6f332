"""One of everything that docs/extending.md says can be added, as another package would: entries in the registries."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from search.evaluation.controls import CONTROLS, Control, Marker
from search.evaluation.metrics import METRICS
from search.problem.objectives import FORGET_QUALITY, MODEL_UTILITY, THIRD_OBJECTIVES, Objective
from search.problem.trial import TrialSpec
from search.results.export import EXPORTERS, Exporter
from search.samplers.registry import SAMPLERS, SamplerEntry
from search.spec.corpora import CORPORA, FREE_TEXT
from search.spec.sections import Count, Section
from uipe_core.metrics.definitions import DEFINITIONS, Definition, log_geometric_mean
from uipe_core.unlearning.methods import BOUNDS, METHODS, Bound, Method

# A method: a loss, and an entry.


def bounded_ascent(inputs, hyper):
    """Gradient ascent that stops pushing an answer below a log-probability per token."""
    per_token = inputs.forget_logp / inputs.forget_tokens
    return inputs.shares.items * (per_token.clamp(min=-hyper["depth"]).mean())


METHODS["bounded_ascent"] = Method(bounded_ascent, {"depth": 5.0})
BOUNDS["depth"] = Bound(above=True)

# A metric definition: an entry.

DEFINITIONS["short"] = Definition(log_mean_perturbed=log_geometric_mean, epsilon=1e-6, generation_length=8)


# A metric: a function, and an entry. An objective: the same name among the third objectives.


def forgotten_share(report, references):
    """Share of forget answers that are less likely than under the retain model."""
    if "retain" not in references:
        return float("nan")
    return np.mean(report.sets["forget"].answer_loss > references["retain"].sets["forget"].answer_loss)


METRICS["forgotten_share"] = forgotten_share
THIRD_OBJECTIVES["forgotten_share"] = Objective("forgotten_share", "share forgotten", "share\nforgotten", 2, worst=0.0)


# A corpus: a section class with its loader, and an entry.


class Village(Section):
    """A few fictitious people of one place."""

    task: ClassVar = FREE_TEXT
    objectives: ClassVar = (FORGET_QUALITY, MODEL_UTILITY)
    sets: ClassVar = ("forget", "retain", "real_authors", "world_facts", "related", "unrelated")
    path_keys: ClassVar[Mapping[Any, Any]] = {}

    kind: Literal["village"]
    people: Count = 12

    def load(self, seed: int):
        from uipe_core.corpora.people import load_people

        return load_people(seed + 1, 2, self.people - 2, 10)

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]):
        return []

    def study_errors(self, third_objective: str | None, methods: Collection[str]):
        return []


CORPORA["village"] = Village


# A sampler: an entry.


def quasi_random(seed: int):
    from optuna.samplers import QMCSampler

    return QMCSampler(seed=seed, warn_independent_sampling=False)


SAMPLERS["quasi_random"] = SamplerEntry(quasi_random)


# A control: an entry with the trials it asks for.


def twice_as_far(store, row, point):
    return [TrialSpec("twice_as_far", **{**point, "alpha": 2 * point["alpha"] + 1})] if point["alpha"] != -1 else []


CONTROLS["twice_as_far"] = Control(
    "Twice as far", "The same update, walked twice as far.", Marker("h", "control: twice as far"), follow_up=twice_as_far
)


# A form of export: a function that writes, and an entry.


def write_norm(recipe, preparation, folder):
    (folder / "norm.txt").write_text(f"alpha {recipe.alpha}\n")


EXPORTERS["norm"] = Exporter(write_norm, checked=False)
