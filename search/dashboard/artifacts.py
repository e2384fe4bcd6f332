"""Put files of a trial into Optuna's artifact store: the curves of its base run, its item table and its recipe."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from search.dashboard.notes import TEXTS
from search.problem.trial import INITIAL
from search.report.data import ReportData, report_data
from search.report.figures import alpha_figure
from search.report.style import picture
from search.results.recipe import RECIPE_FILE, recipe_of
from search.results.study_result import StudyResult

FOLDER = "artifacts"
"""Where they lie in a study's folder."""

ITEMS_FILE = "items.csv"

MIME = {".png": "image/png", ".csv": "text/csv", ".yaml": "text/plain"}

OF_TRIAL = "dashboard:artifacts:"
"""Start of the attributes of a study that name artifacts of its trials."""


@dataclass(frozen=True)
class _OfStudy:
    """Takes the names of artifacts into attributes of the study: a trial that has ended takes no more of its own.

    The dashboard looks in both places.
    """

    storage: BaseStorage
    study_id: int

    def set_trial_system_attr(self, trial_id: int, key: str, value: str) -> None:
        """Keep the name of an artifact."""
        self.storage.set_study_system_attr(self.study_id, f"{OF_TRIAL}{trial_id}:{key.partition(':')[2]}", value)


class Artifacts:
    """Files of a study's trials.

    Args:
        result: The study.
        scratch: An empty folder for files on their way into the store.
    """

    def __init__(self, result: StudyResult, scratch: Path) -> None:
        self._result = result
        self._scratch = scratch
        self._folder = result.out / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._store = FileSystemArtifactStore(self._folder)
        self._known = _known(result)
        self._curves: Callable[[str], bytes] = lru_cache(maxsize=None)(_curves_of(report_data(result)))

    def put(self, trial: FrozenTrial, row: Mapping[str, Any]) -> None:
        """Store the files of a trial, those that have changed only.

        Args:
            trial: The trial.
            row: It as a row of `StudyResult.trials`.
        """
        for name, content in self._files(row).items():
            identifier = self._known.get((trial._trial_id, name))
            if identifier is None:
                self._upload(trial, name, content)
            elif not (path := self._folder / identifier).is_file() or path.read_bytes() != content:
                self._store.write(identifier, io.BytesIO(content))

    def _files(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        base = str(row["base"])
        record, spec = self._result.store.record, self._result.spec
        found = {f"alpha-curves-{re.sub(r'[^A-Za-z0-9_.-]+', '_', base)}.png": self._curves(base)}
        if (items := item_table(self._result, int(row["trial"]))) is not None:
            found[ITEMS_FILE] = items
        found[RECIPE_FILE] = recipe_of(record, spec, row).as_yaml().encode()
        return found

    def _upload(self, trial: FrozenTrial, name: str, content: bytes) -> None:
        names: Any = _OfStudy(self._result.store.storage, self._result.study._study_id)
        path = self._scratch / name
        path.write_bytes(content)
        upload_artifact(
            artifact_store=self._store, file_path=str(path), study_or_trial=trial, storage=names, mimetype=MIME[path.suffix]
        )


def _known(result: StudyResult) -> dict[tuple[int, str], str]:
    """Return the ids of the artifacts that trials have, by the storage's id of the trial and file name."""
    found = {}
    for key, value in result.store.storage.get_study_system_attrs(result.study._study_id).items():
        facts = json.loads(value) if key.startswith(OF_TRIAL) else None
        if facts is not None:  # an artifact that was deleted leaves its name with nothing
            found[int(key.removeprefix(OF_TRIAL).partition(":")[0]), str(facts["filename"])] = str(facts["artifact_id"])
    return found


def _curves_of(view: ReportData) -> Callable[[str], bytes]:
    return lambda base: picture(alpha_figure(replace(view, trials=view.trials[view.trials["base"] == base])))


def item_table(result: StudyResult, number: int) -> bytes | None:
    """Return the scores of a trial's items as CSV, next to the initial model's; None where they were not kept.

    A row per item: its set, its place among the items that trials are scored on, and its measurements.
    """
    after = result.store.items(number)
    control = result.control(INITIAL)
    before = None if control is None else result.store.items(int(control["trial"]), control=True)
    if not after:
        return None
    columns = {name: scores for name, scores in after.items() if scores.ndim == 1 and not name.startswith(f"{TEXTS}/")}
    measurements = list(dict.fromkeys(name.partition("/")[2] for name in columns))
    known = [f"initial_{name}" for name in measurements] if before else []
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["set", "item", *measurements, *known])
    for item_set in dict.fromkeys(name.partition("/")[0] for name in columns):
        names = [f"{item_set}/{measurement}" for measurement in measurements]
        arrays = [columns.get(name) for name in names] + ([before.get(name) for name in names] if before else [])
        for item in range(max(len(array) for array in arrays if array is not None)):
            writer.writerow([item_set, item, *(_cell(array, item) for array in arrays)])
    return stream.getvalue().encode()


def _cell(array: np.ndarray | None, item: int) -> str:
    return "" if array is None or item >= len(array) else f"{array[item]:.6g}"
