"""Bound every number of a study: no sane study passes these limits, and a slip of the keyboard must not cost a machine."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field, PlainSerializer, WrapValidator

Seed = Annotated[int, Field(ge=0, lt=2**32)]

MOST = 1_000_000
"""Of whatever is counted: items, rows of a batch, tokens of an answer; options of the command line have it too."""

Count = Annotated[int, Field(ge=1, le=MOST)]

MOST_RANK = 65_536
"""Rank of a low-rank update; beyond the width of every model."""

Positive = Annotated[float, Field(gt=0, le=1e9)]

Epochs = Annotated[int, Field(ge=1, le=10_000)]

LearningRate = Annotated[float, Field(gt=0, le=1000)]

Temperature = Annotated[float, Field(ge=0.01, le=100)]


def _word_or_number(value: object, number: Callable[[object], float]) -> float | str:
    """Leave words to the method's own bound, so that a number that is wrong has one error and not one of each kind."""
    return value if isinstance(value, str) else number(value)


Weight = Annotated[
    float,
    Field(ge=-1e9, le=1e9),
    WrapValidator(_word_or_number),
    PlainSerializer(lambda value: value, return_type=float | str),
]
"""A hyperparameter of a method, a number or a word, before the method's own bound."""

MOST_CONTROLS = 100
"""Entries of a list that each become a model to train or to score."""

MOST_ASKED = 1000
"""Finalists, or seeds of trainings, that one command may ask for."""

MOST_BASE_RUNS = 1000
"""Base runs of one study: lists multiply, and a slip must not ask for a million trainings."""

MOST_BASE_EPOCHS = 100_000
"""Epochs of all base runs of one study: each is kept as an update vector, and scored at alpha = 0."""

NARROWEST_ALPHA = 1e-6
"""Least width of the range of alpha: below it all points of a sampler are one point in fp32."""
