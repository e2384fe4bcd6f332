"""What the sampler that knows the line gets of a study: its objectives, its reference models, its item scores."""

from collections.abc import Callable, Sequence

from optuna.samplers import BaseSampler

from search.evaluation.evaluator import StudyContext
from search.problem.space import distributions
from search.problem.yardstick import forget_quality_cap, reference_point
from search.samplers.line import Lines, LineSampler, LineStudy
from search.samplers.outcomes import Curves
from search.store.study_store import StudyStore
from uipe_core.corpora.split import take_items
from uipe_core.metrics.scores import ScoreReport


def line_sampler(
    store: StudyStore,
    context: StudyContext,
    lines: Callable[[], Lines | None],
    fallback: BaseSampler,
    seed: int,
    say: Callable[[str], None],
) -> LineSampler:
    """The sampler of a study whose trials are scored on free text.

    Args:
        store: The open study.
        context: Its reference models, and which of their items trials are scored on.
        lines: Update vectors that are there, and their inner products.
        fallback: Proposes until there are any.
        seed: Of the draws.
        say: Told of what the sampler must do without.
    """
    spec, rows = store.spec, context.split.select
    hashes = take_items(context.corpus, rows).set_hashes
    reports = {name: report for name, report in context.references.items() if isinstance(report, ScoreReport)}
    initial, retain = (reports[name].take(rows, hashes).arrays() for name in ("initial", "retain"))

    def yardstick() -> tuple[Sequence[float], Sequence[float]]:
        corner, cap = reference_point(store), forget_quality_cap(spec, store.controls_frame())
        names = [objective.name for objective in store.objectives]
        return [corner[name] for name in names], [objective.ceiling(cap) for objective in store.objectives]

    world = LineStudy(
        epochs=spec.base_epochs(),
        alpha=(spec.search.alpha.low, spec.search.alpha.high),
        curves=Curves(spec.definition, [objective.quality_of for objective in store.objectives], retain),
        initial=initial,
        yardstick=yardstick,
        items=store.items,
        lines=lines,
    )
    return LineSampler(world, distributions(spec), fallback, seed, say)
