"""Experiment trackers, one entry each: how a run, its trials, its front and its report are written there."""

import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from search.store.study_store import StudyStore
from uipe_core.errors import UserError

_POINT = (
    *("kind", "base", "method", "epoch", "alpha", "walk", "of_trial", "model", "seed", "temperature", "definition"),
    *("dtype", "device", "collapsed", "flagged", "reason", "settings"),
)
"""Evidence that says which trial it is and what became of it; the other numbers are measurements."""

_TABLE = "front.json"
"""The front among the artifacts of MLflow."""

_STATES = {"failed": "FAILED", "interrupted": "KILLED"}
"""States of MLflow's runs by how a trial or a study ended; otherwise they are finished."""

_LONGEST = 500
"""Characters of a text that trackers take."""


@dataclass(frozen=True)
class Study:
    """Describe a study to trackers.

    Attributes:
        name, fingerprint, out: Its name, its fingerprint, its folder.
        spec: The study file, as JSON values, without what says how it is run.
    """

    name: str
    fingerprint: str
    out: Path
    spec: Mapping[str, Any]

    @classmethod
    def of(cls, store: StudyStore) -> "Study":
        """Describe an open study."""
        spec = store.spec.model_dump(mode="json", exclude={"storage", "tracking", "cache"})
        return cls(store.record.name, store.record.fingerprint, store.out, spec)


@dataclass(frozen=True)
class Entry:
    """A trial that has ended.

    Attributes:
        name: ``trial 12`` or ``control 3``.
        number: Its number.
        state: ``complete``, ``pruned`` or ``failed``.
        point: What it is: base run, epoch, alpha, kind and others.
        numbers: What was measured, finite.
    """

    name: str
    number: int
    state: str
    point: Mapping[str, str | int | float | bool]
    numbers: Mapping[str, float]

    @classmethod
    def of(cls, control: bool, number: int, state: str, evidence: Mapping[str, Any]) -> "Entry":
        """Sort the evidence of a trial; numbers inside of mappings are named ``outer/inner``."""
        flat: dict[str, Any] = {}
        for key, value in evidence.items():
            flat |= {f"{key}/{inner}": each for inner, each in value.items()} if isinstance(value, Mapping) else {key: value}
        point = {key: flat[key] for key in _POINT if isinstance(flat.get(key), str | int | float | bool)}
        numbers = {
            key: float(value)
            for key, value in flat.items()
            if key not in _POINT and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        return cls(f"{'control' if control else 'trial'} {number}", number, state, point, numbers)


class Tracker(Protocol):
    """A run of a tracker. Its class is called with the section of the study file, the study, and the id of an earlier run.

    Attributes:
        run: The id by which a later run of the study finds it.
    """

    run: str

    def log(self, entry: Entry) -> None:
        """Add a trial."""

    def finish(self, front: Sequence[Mapping[str, Any]], numbers: Mapping[str, float], report: Path) -> None:
        """Add the front as a table, summary numbers, and the report as an artifact."""

    def close(self, ended: str) -> None:
        """End the run: ``finished``, ``interrupted`` or ``failed``."""


class Mlflow:
    """A run of MLflow with a nested run per trial. MLflow's global state is left alone: a script may have a run of its own."""

    def __init__(self, section: Any, study: Study, run: str | None) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=section.uri)
        name = section.experiment or study.name
        found = self._client.get_experiment_by_name(name)
        self._experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        if run is not None:
            self.run = run
            self._client.update_run(run, status="RUNNING")
            return
        tags = {"uipe.study": study.name, "uipe.fingerprint": study.fingerprint}
        self.run = self._client.create_run(self._experiment, run_name=study.name, tags=tags).info.run_id
        self._client.log_dict(self.run, dict(study.spec), "study.yaml")

    def log(self, entry: Entry) -> None:
        """Add a nested run: what the trial is as parameters, what was measured as metrics."""
        tags = {"mlflow.parentRunId": self.run, "uipe.state": entry.state}
        nested = self._client.create_run(self._experiment, run_name=entry.name, tags=tags).info.run_id
        self._write(nested, entry.numbers, {key: str(value)[:_LONGEST] for key, value in entry.point.items()})
        self._client.set_terminated(nested, _STATES.get(entry.state, "FINISHED"))

    def finish(self, front: Sequence[Mapping[str, Any]], numbers: Mapping[str, float], report: Path) -> None:
        """Write over those of an earlier run of the study."""
        import pandas as pd

        self._write(self.run, numbers, {})
        table = pd.DataFrame(list(front))
        if any(each.path == _TABLE for each in self._client.list_artifacts(self.run)):
            self._client.log_dict(self.run, table.to_dict(orient="split"), _TABLE)  # `log_table` would append
        else:
            self._client.log_table(self.run, table, _TABLE)
        self._client.log_artifact(self.run, str(report), "report")

    def close(self, ended: str) -> None:
        self._client.set_terminated(self.run, _STATES.get(ended, "FINISHED"))

    def _write(self, run: str, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(key), value, now, 0) for key, value in numbers.items()]
        self._client.log_batch(run, metrics, [Param(key, value) for key, value in texts.items()])


def _allowed(name: str) -> str:
    """Return a name of the characters that MLflow allows."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


class _Logged:
    """A run of wandb, or of trackio, which has its interface: a step per trial.

    Args:
        library: The module.
        begun: Its run.
        run: Id of the run.
        study: The study.
    """

    def __init__(self, library: Any, begun: Any, run: str, study: Study) -> None:
        self._library, self._begun, self.run, self._study = library, begun, run, study

    def log(self, entry: Entry) -> None:
        """Add a step."""
        texts = {key: value[:_LONGEST] if isinstance(value, str) else value for key, value in entry.point.items()}
        self._begun.log({"trial": entry.number, "name": entry.name, "state": entry.state, **texts, **entry.numbers})

    def finish(self, front: Sequence[Mapping[str, Any]], numbers: Mapping[str, float], report: Path) -> None:
        """Add a last step with the front, and the report."""
        import pandas as pd

        self._begun.log({**numbers, "front": self._library.Table(dataframe=pd.DataFrame(list(front)))})
        artifact = self._library.Artifact(f"{self._study.name}-report", type="report")
        artifact.add_file(str(report))
        self._begun.log_artifact(artifact)

    def close(self, ended: str) -> None:
        with redirect_stdout(sys.stderr):  # trackio talks, and standard output may be read as JSON
            self._begun.finish(**({"exit_code": int(ended != "finished")} if self._library.__name__ == "wandb" else {}))


def _wandb(section: Any, study: Study, run: str | None) -> _Logged:
    import wandb

    # It would ask for a key on the terminal, and wait.
    if os.environ.get("WANDB_MODE", "online") == "online" and not (os.environ.get("WANDB_API_KEY") or _has_login()):
        raise UserError("no login of wandb; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
    identity = run or uuid.uuid4().hex[:8]
    given = {"project": section.project, "name": study.name, "id": identity, "config": dict(study.spec)}
    begun = wandb.init(**given, dir=str(study.out), resume="allow", settings=wandb.Settings(silent=True, console="off"))
    return _Logged(wandb, begun, identity, study)


def _has_login() -> bool:
    """Return True if the machine's netrc has a login of wandb, where `wandb login` puts it."""
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc(os.environ.get("NETRC")).hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _trackio(section: Any, study: Study, run: str | None) -> _Logged:
    import trackio

    name = run or f"{study.name}-{uuid.uuid4().hex[:8]}"
    quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    with redirect_stdout(sys.stderr):
        begun = trackio.init(section.project or study.name, name=name, config=dict(study.spec), resume="allow", **quiet)
    return _Logged(trackio, begun, name, study)


TRACKERS: dict[str, Callable[[Any, Study, str | None], Tracker]] = {"mlflow": Mlflow, "wandb": _wandb, "trackio": _trackio}
"""Trackers by their key in section ``tracking``: called with its section, the study, and the id of an earlier run."""
