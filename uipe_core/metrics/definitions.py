"""Define truth ratio and probability as each code base does.

With q the (n, k) mean losses of the perturbed answers and p the (n,) mean loss of the paraphrase:

    name               mean perturbed probability   denominators
    tofu               exp(-mean q), geometric      as they are
    tofu-utils         mean exp(-q), arithmetic     as they are
    open-unlearning    exp(-mean q), geometric      1e-10 added
    tofu-unicode       as tofu; ROUGE over words of any script

Forget quality compares geometric truth ratios in all of them: `get_forget_quality` in ``utils.py`` of locuslab/tofu averages
losses, though its model utility averages probabilities, as the paper's equation 1 does.

Sources: ``aggregate_eval_stat.py`` (tofu) and ``utils.py`` (tofu-utils) of locuslab/tofu; ``src/evals/metrics/memorization.py``
of locuslab/open-unlearning; TOFU (arXiv 2401.06121, section 2.2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from uipe_core.errors import UserError, did_you_mean
from uipe_core.metrics.scores import FloatArray


def log_geometric_mean(losses: FloatArray) -> FloatArray:
    """Return (n,) log of the geometric mean of the probabilities of (n, k) losses in nats."""
    return -losses.mean(axis=-1)


def log_arithmetic_mean(losses: FloatArray) -> FloatArray:
    """Return (n,) log of the arithmetic mean of the probabilities of (n, k) losses in nats; finite for any losses."""
    return np.logaddexp.reduce(-losses, axis=-1) - np.log(losses.shape[-1])


@dataclass(frozen=True)
class Definition:
    """Truth ratio and probability of one code base.

    Attributes:
        log_mean_perturbed: (n, k) perturbed losses to (n,) log of the mean perturbed probability, for the truth ratios of
            utility and forget sets; forget quality always takes `log_geometric_mean`.
        epsilon: Added to each denominator.
        generation_length: Longest generation in tokens.
        generation_counts_prompt: Whether that includes the prompt: ``max_length: 200`` of locuslab/tofu
            (``config/eval_everything.yaml``), not ``max_new_tokens: 200`` of open-unlearning (``configs/generation``).
        unicode_rouge: ROUGE counts words of any script, not runs of a-z and 0-9 alone (`rouge`).
    """

    log_mean_perturbed: Callable[[FloatArray], FloatArray]
    epsilon: float = 0.0
    generation_length: int = 200
    generation_counts_prompt: bool = False
    unicode_rouge: bool = False


DEFINITIONS: dict[str, Definition] = {
    "tofu": Definition(log_mean_perturbed=log_geometric_mean, generation_counts_prompt=True),
    "tofu-utils": Definition(log_mean_perturbed=log_arithmetic_mean, generation_counts_prompt=True),
    "open-unlearning": Definition(log_mean_perturbed=log_geometric_mean, epsilon=1e-10),
    "tofu-unicode": Definition(log_mean_perturbed=log_geometric_mean, generation_counts_prompt=True, unicode_rouge=True),
}


def definition_named(name: str) -> Definition:
    """Return the definition of that name; raise UserError with the known names for an unknown one."""
    if name not in DEFINITIONS:
        known = ", ".join(sorted(DEFINITIONS))
        raise UserError(f"unknown metric definition {name!r}; known: {known}.{did_you_mean(name, DEFINITIONS)}")
    return DEFINITIONS[name]
