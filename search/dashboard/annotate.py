"""Put notes, artifacts and figures into a study for the dashboard, those only that have changed since."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from optuna import Study
from optuna.storages import BaseStorage
from optuna_dashboard import get_note, save_note, save_plotly_graph_object

from search.dashboard.artifacts import FOLDER, Artifacts
from search.dashboard.notes import OURS, controls_note, study_note, trial_note
from search.dashboard.plots import alpha_plot, front_plot
from search.report.data import report_data
from search.results.study_result import StudyResult
from uipe_core.errors import first_line
from uipe_core.storage.scratch import scratch_folder

logger = logging.getLogger(__name__)

MOST_TRIALS = 100
"""Trials with a note and files of their own, those of the front first: the dashboard reads all notes with every look."""

STAMP = "uipe:annotated"
"""Attribute of a study that says what its notes and files were made from."""

VERSION = 1
"""Of what notes and files say; with another they are made again."""


@dataclass(frozen=True)
class _Trial:
    """Stand in for a trial where `save_note` asks for one. One of Optuna's would ask the sampler for parameters."""

    study: Study
    _trial_id: int

    @property
    def storage(self) -> BaseStorage:
        """The study's storage."""
        return self.study._storage


def annotate(result: StudyResult) -> None:
    """Put notes, artifacts and figures into a study. What cannot be written is left out, with a warning.

    A note that its reader has written is kept.
    """
    try:
        text = study_note(result)
        stamp = _stamp(result, text)
        known = result.store.storage.get_study_system_attrs(result.study._study_id)
        if known.get(STAMP) == stamp and (result.out / FOLDER).is_dir():
            return
        for study, note in ((result.study, text), (result.store.controls, controls_note(result))):
            if get_note(study) != note:
                save_note(study, note)
        _plots(result)
        with scratch_folder() as scratch:
            _trials(result, Artifacts(result, scratch))
        result.store.storage.set_study_system_attr(result.study._study_id, STAMP, stamp)
    except Exception as error:  # whatever it is, the study can be shown without them
        logger.warning("the dashboard's notes, files or figures are not all there: %s", first_line(error))


def _stamp(result: StudyResult, note: str) -> str:
    parts = [VERSION, note, result.store.counts(), len(result.controls)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _plots(result: StudyResult) -> None:
    view = report_data(result)
    for name, figure in (("front", front_plot(view)), ("alpha-curves", alpha_plot(view))):
        save_plotly_graph_object(result.study, figure, graph_object_id=name)


def _trials(result: StudyResult, artifacts: Artifacts) -> None:
    rows = {int(row["trial"]): row for row in _chosen(result)}
    for trial in result.store.trials(names=()):
        if trial.number in rows:
            held = _Trial(result.study, trial._trial_id)
            now, new = get_note(held), trial_note(result, rows[trial.number])
            if now != new and (not now or now.endswith(OURS)):
                save_note(held, new)
            artifacts.put(trial, rows[trial.number])


def _chosen(result: StudyResult) -> Iterator[dict[Any, Any]]:
    """Yield the rows of the trials that get notes and files: the front, what training gave, then the latest."""
    trials = result.trials.assign(given=result.trials["alpha"] == 0)
    order = trials.sort_values(["on_front", "given", "trial"], ascending=False).head(MOST_TRIALS)
    assert isinstance(order, pd.DataFrame)
    yield from order.to_dict("records")
