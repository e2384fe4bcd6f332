"""The search service: studies over (method, base epoch, alpha) on Ray and Optuna.

>>> import search
>>> result = search.run_study(search.load_study("studies/quickstart.yaml"))  # doctest: +SKIP
>>> result.front  # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

__all__ = ["StudyResult", "StudySpec", "load_study", "parse_study", "run_study"]

_HOMES = {
    "StudyResult": "search.results.study_result",
    "StudySpec": "search.spec.study",
    "load_study": "search.spec.study",
    "parse_study": "search.spec.study",
    "run_study": "search.execution.run",
}


def __getattr__(name: str) -> Any:
    # Ray, Optuna and torch take seconds to import, so they are loaded with the first use of what needs them.
    if name not in _HOMES:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
