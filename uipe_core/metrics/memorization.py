"""Measure word-for-word memorisation from one teacher-forced pass: exact memorisation, extraction strength.

Both compare the most likely tokens with the gold answer, its end token left out, as open-unlearning does.
"""

import numpy as np
from numpy.typing import NDArray

Matches = NDArray[np.bool_]
"""(t,) whether the most likely token at each answer position is the answer's."""


def exact_memorization(matches: Matches) -> float:
    """Return the share of answer tokens that are the most likely ones, in [0, 1]; 0 without tokens.

    Source: Tirumala et al. 2022 (arXiv 2205.10770, section 3); for unlearning, Wang et al. 2025 (arXiv 2406.09179).
    """
    return float(matches.mean()) if len(matches) else 0.0


def extraction_strength(matches: Matches) -> float:
    """Return 1 - k / t, where k is the shortest prefix of the answer after which greedy decoding gives the rest; in [0, 1].

    Greedy decoding after k tokens gives the rest exactly if each further token is the most likely one after the true tokens
    before it, so one teacher-forced pass suffices. A total mismatch gives 0, and so does an answer whose last token is missed;
    open-unlearning gives 1 / t there, because its search stops one short of the whole answer.

    Source: Carlini et al. 2021 (arXiv 2012.07805) for extraction by prefix; the measure is that of Wang et al. 2025 (arXiv
    2406.09179, section 3).
    """
    missed = np.flatnonzero(~matches)
    prefix = int(missed[-1]) + 1 if len(missed) else 0
    return (len(matches) - prefix) / len(matches) if len(matches) else 0.0
