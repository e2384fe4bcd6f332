"""Write and read results on multiple-choice questions as a JSON file, question by question.

The object has ``definition``, ``seconds``, ``metadata`` and ``sets``. A set has ``item_hash`` and, in the order of its
questions, ``log_likelihood`` (a list per question, a number per choice), ``answers``, ``correct`` and ``logit_spread`` (null
where logits overflowed).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uipe_core.errors import UserError
from uipe_core.logs.parts import is_number
from uipe_core.metrics.scores import CHOICE_DEFINITION, ChoiceReport, ChoiceScores
from uipe_core.storage.files import read_json, write_atomic


def write_choice_log(report: ChoiceReport, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a report atomically, replacing what was there; missing folders are made.

    Args:
        report: All log-likelihoods finite.
        path: Target file.
        metadata: JSON-able description of the scored model, for readers.

    Raises:
        UserError: A log-likelihood is not finite, or the file cannot be written.
    """
    path = Path(path)
    content = {
        "definition": CHOICE_DEFINITION,
        "seconds": dict(report.seconds),
        "metadata": dict(metadata or {}),
        "sets": {name: _written(scores) for name, scores in report.sets.items()},
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise UserError(f"cannot write {path}: it has numbers that are not finite; has the model collapsed?") from error
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give a file in a writable folder") from error


def read_choice_log(path: str | Path) -> ChoiceReport:
    """Read a log of `write_choice_log`.

    Raises:
        UserError: No such file, broken JSON, or a missing or wrong value; names file, key and remedy.
    """
    try:
        content = read_json(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that `uipe score --log` wrote") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write it again with `uipe score --log`") from error
    sets = content.get("sets") if isinstance(content, dict) else None
    if not isinstance(sets, dict) or not sets:
        raise _broken(path, "sets", "is missing or holds nothing")
    seconds = content.get("seconds", {})
    if not isinstance(seconds, dict):
        raise _broken(path, "seconds", "is no object")
    return ChoiceReport({name: _read(path, name, part) for name, part in sets.items()}, seconds)


def is_choice_log(path: str | Path) -> bool:
    """Return True if a file is a log of `write_choice_log`, False also if it cannot be read."""
    try:
        content = read_json(Path(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("definition") == CHOICE_DEFINITION


def _written(scores: ChoiceScores) -> dict[str, Any]:
    rows = zip(scores.log_likelihood.tolist(), scores.choices.tolist(), strict=True)
    return {
        "item_hash": scores.item_hash,
        "log_likelihood": [row[:count] for row, count in rows],
        "answers": scores.answers.tolist(),
        "correct": scores.correct.tolist(),
        "logit_spread": None if scores.logit_spread is None else scores.logit_spread.tolist(),
    }


def _read(path: str | Path, name: str, part: Any) -> ChoiceScores:
    where = f"sets/{name}"
    if not isinstance(part, dict):
        raise _broken(path, where, "is no object")
    rows, answers, item_hash = part.get("log_likelihood"), part.get("answers"), part.get("item_hash")
    if not isinstance(rows, list) or not rows:
        raise _broken(path, f"{where}/log_likelihood", "is missing or has no questions")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) < 2 or not all(map(is_number, row)):
            raise _broken(path, f"{where}/log_likelihood/{index}", "is not a list of at least two finite numbers")
    if not isinstance(answers, list) or len(answers) != len(rows):
        raise _broken(path, f"{where}/answers", f"is not a list of {len(rows)} indexes, one per question")
    for index, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(row):
            raise _broken(path, f"{where}/answers/{index}", f"is {answer!r}, expected an index from 0 to {len(row) - 1}")
    spread = part.get("logit_spread")
    known = isinstance(spread, list) and len(spread) == len(rows) and all(map(is_number, spread))
    if not known and not ("logit_spread" in part and spread is None):
        raise _broken(path, f"{where}/logit_spread", f"is not a list of {len(rows)} finite numbers, one per question")
    if item_hash is not None and not isinstance(item_hash, str):
        raise _broken(path, f"{where}/item_hash", f"is {item_hash!r}, expected a text or null")
    most = max(map(len, rows))
    return ChoiceScores(
        log_likelihood=np.array([row + [-math.inf] * (most - len(row)) for row in rows], dtype=np.float64),
        answers=np.array(answers, dtype=np.int64),
        choices=np.array([len(row) for row in rows], dtype=np.int64),
        logit_spread=None if spread is None else np.array(spread, dtype=np.float64),
        item_hash=item_hash,
    )


def _broken(path: str | Path, key: str, problem: str) -> UserError:
    return UserError(f"{path}: {key} {problem}; write the results again with `uipe score --corpus choices:FOLDER --log`")
