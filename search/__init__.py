"""The search service: studies over (method, base epoch, alpha) on Ray and Optuna.

>>> import search
>>> result = search.run_study(search.load_study("studies/quickstart.yaml"))  # doctest: +SKIP
>>> result.front  # doctest: +SKIP
"""

from functools import reduce
from importlib import import_module
from typing import Any

__all__ = [
    "StudyFileError",
    "StudyInterrupted",
    "StudyResult",
    "StudySpec",
    "UserError",
    "audit_study",
    "confirm_study",
    "dial_study",
    "load_study",
    "open_study",
    "parse_study",
    "run_study",
    "write_report",
]

_HOMES = {
    "StudyFileError": "search.spec.errors:StudyFileError",
    "StudyInterrupted": "uipe_core.errors:StudyInterrupted",
    "StudyResult": "search.results.study_result:StudyResult",
    "StudySpec": "search.spec.study:StudySpec",
    "UserError": "uipe_core.errors:UserError",
    "audit_study": "search.execution.run:audit_study",
    "confirm_study": "search.execution.run:confirm_study",
    "dial_study": "search.execution.run:dial_study",
    "load_study": "search.spec.study:load_study",
    "open_study": "search.results.study_result:StudyResult.open",
    "parse_study": "search.spec.study:parse_study",
    "run_study": "search.execution.run:run_study",
    "write_report": "search.report.html:write_report",
}


def __getattr__(name: str) -> Any:
    # Ray, Optuna and torch take seconds to import, so they are loaded with the first use of what needs them.
    if name not in _HOMES:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    module, _, path = _HOMES[name].partition(":")
    return reduce(getattr, path.split("."), import_module(module))
