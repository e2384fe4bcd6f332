"""What a model's utility can still become while only some of it is scored."""

import numpy as np

from uipe_core.corpora.types import UTILITY_SETS
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import ScoreReport
from uipe_core.metrics.tofu import item_components, loss_components, model_utility

PARTS = 3
"""Components of model utility per set: probability, ROUGE-L recall and truth ratio."""

SLACK = 1e-9
"""Added to a bound, as a share of it: sums of other numbers are rounded otherwise, by less than this."""


def utility_bound(report: ScoreReport, definition: str = "tofu") -> float:
    """Upper bound, in [0, 1], on the model utility of a model that is scored in part.

    A harmonic mean grows with each of its components, and none of them can exceed 1 in any definition: probabilities and recall
    by nature, relative probabilities because the answer itself is in the denominator, truth ratios as max(0, 1 - R) with
    R >= 0; an epsilon in a denominator lowers probabilities, and lifts a truth ratio to 1 at most. So what is not known
    counts as 1.

    Args:
        report: Any of the utility sets, each with its losses, with or without ROUGE.
        definition: Key of `definitions.DEFINITIONS`.

    Raises:
        UserError: Unknown definition, or losses that are not finite.
    """
    chosen = definition_named(definition)
    components: dict[str, float] = {}
    for name in UTILITY_SETS:
        scores = report.sets.get(name)
        if scores is not None:
            taken = loss_components if scores.rouge_l_recall is None else item_components
            components |= {key: float(np.mean(values)) for key, values in taken(scores, name, chosen).items()}
    unknown = {f"unknown {number}": 1.0 for number in range(PARTS * len(UTILITY_SETS) - len(components))}
    return min(1.0, model_utility({**components, **unknown}) * (1.0 + SLACK))
