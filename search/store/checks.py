"""Check a study, one function per check. Checks change nothing; some offer a repair."""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from search.spec.corpora import MULTIPLE_CHOICE
from search.store.item_scores import ITEMS_HASH, content_hash, read_arrays
from search.store.optuna_compat import METRIC_NAMES, study_facts
from search.store.record import StudyRecord, fingerprint
from search.store.sqlite_reading import SQLiteFile
from search.store.study_store import StudyStore
from search.store.trials import evidence_flaw, is_interrupted, on_front
from uipe_core.errors import UserError
from uipe_core.logs.multiple_choice import read_choice_log
from uipe_core.logs.tofu import read_log

OK, ADVICE, FIXED, PROBLEM = "ok", "advice", "fixed", "problem"

NEAR_BOUND = 0.02
"""Share of the alpha range within which a point counts as stuck at its end."""

REPEATED_SHARE = 0.1
"""Share of repeated points from which on the sampler is advised against."""

REASONS_SHOWN = 5

Repair = Callable[[], str]
"""Repairs a finding; returns what it did."""


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        check: Name of the check.
        state: `OK`, `ADVICE` (nothing is wrong), `FIXED` or `PROBLEM`.
        found, meaning, remedy: The observation, its consequence, what to do or what was done.
    """

    check: str
    state: str
    found: str
    meaning: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Repairable:
    """A finding that can be repaired.

    Attributes:
        finding: The finding before the repair.
        repair: The repair.
        needs_study: The study must not run meanwhile.
    """

    finding: Finding
    repair: Repair
    needs_study: bool = True


def orphans(store: StudyStore, running: bool) -> Iterator[Finding | Repairable]:
    """Find trials that are RUNNING while no run is under way."""
    open_trials = _trials(store, TrialState.RUNNING, TrialState.WAITING)
    if not open_trials:
        yield Finding("trials", OK, "no trial is left open")
    elif running:
        yield Finding("trials", OK, f"{len(open_trials)} trials are running", "the study is at work")
    else:
        found = Finding(
            "trials",
            PROBLEM,
            f"{len(open_trials)} trials are RUNNING, and no run is under way",
            "the run that started them was killed; samplers keep away from such points",
            "--fix ends them as FAIL with their reason, and so does the next `uipe run`",
        )
        yield Repairable(found, lambda: f"{store.fail_orphaned_trials()} trials ended as FAIL with their reason")


def item_scores(store: StudyStore) -> Iterator[Finding | Repairable]:
    """Find files of item scores that are damaged, missing, or of no trial."""
    missing = []
    damaged: list[tuple[Path, str]] = []
    strays: list[Path] = []
    for name in ("trials", "controls"):
        trials = {trial.number: trial for trial in store.trials(names=(ITEMS_HASH,), controls=name == "controls")}
        states = {number: trial.state for number, trial in trials.items()}
        folder = store.out / "items" / name
        files = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
        for number, state in states.items():
            path = files.pop(f"{number:05d}.npz", None)
            if state not in (TrialState.COMPLETE, TrialState.PRUNED):
                # A trial that ends right now has its file already.
                if path is not None and state == TrialState.FAIL:
                    strays.append(path)
                continue
            if path is None and state == TrialState.COMPLETE:
                missing.append(f"{name}/{number}")
            elif path is not None and (reason := _damage(path, trials[number].user_attrs.get(ITEMS_HASH))):
                damaged.append((path, reason))
        strays += files.values()
    if not (missing or damaged or strays):
        yield Finding("item scores", OK, "every complete trial has its item scores, and they are whole")
    if missing:
        yield Finding(
            "item scores",
            ADVICE,
            f"{len(missing)} complete trials have none, first {missing[0]}",
            "intervals and probabilities of these trials are rougher or missing; their numbers stand",
            "nothing brings them back but scoring the points in another study",
        )
    if damaged:
        path, reason = damaged[0]
        yield Repairable(
            Finding(
                "item scores",
                PROBLEM,
                f"{len(damaged)} files are damaged, first {path.name} ({reason})",
                "report and selection stop at them; the numbers of the trials stand",
                "--fix removes them",
            ),
            lambda: _remove([path for path, _ in damaged]),
        )
    if strays:
        yield Repairable(
            Finding(
                "item scores",
                PROBLEM,
                f"{len(strays)} files belong to no complete trial, first {strays[0].name}",
                "a run was killed while it wrote them, or they were copied here",
                "--fix removes them",
            ),
            lambda: _remove(strays),
        )


def _damage(path: Path, recorded: str | None) -> str | None:
    try:
        content = path.read_bytes()
        if recorded is not None and content_hash(content) != recorded:
            return "not what was written with the trial"
        read_arrays(content)
    except Exception as error:  # a damaged archive fails in zipfile, zlib, numpy or the system
        return type(error).__name__
    return None


def _remove(paths: list[Path]) -> str:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return f"{len(paths)} removed"


def integrity(store: StudyStore) -> Iterator[Finding]:
    """Check the database file by SQLite's own check, and every complete trial for what each has."""
    for what in store.source.flaws() if isinstance(store.source, SQLiteFile) else []:
        yield Finding("database", PROBLEM, what, "trials may be missing or wrong", COPY)
    objectives = [objective.name for objective in store.objectives]
    flaws = [
        f"{title} {trial.number}: {flaw}"
        for title, controls in (("trial", False), ("control", True))
        for trial in store.trials((TrialState.COMPLETE,), controls=controls)
        if (flaw := evidence_flaw(trial, objectives, controls=controls)) is not None
    ]
    if not flaws:
        yield Finding("evidence", OK, "every complete trial has its values and what they come from")
        return
    more = f", and {len(flaws) - REASONS_SHOWN} more" if len(flaws) > REASONS_SHOWN else ""
    found = f"{len(flaws)} complete trials are not as they were written: {'; '.join(flaws[:REASONS_SHOWN])}{more}"
    yield Finding("evidence", PROBLEM, found, "somebody else wrote them, or the database is damaged", COPY)


COPY = "put back a copy of the database; if there is none, run the study into another folder"


def identity(record: StudyRecord) -> Iterator[Finding]:
    """Check that the record describes the study it was made for: what was searched has not been edited since."""
    given = {f"{label}/{epoch}": key for label, keys in record.checkpoints.items() for epoch, key in enumerate(keys, 1)}
    if fingerprint(record.study_spec, record.corpus.hash, {**record.models, **given}) == record.fingerprint:
        return
    yield Finding(
        "record",
        PROBLEM,
        "study.json has another seed, space, corpus, model or objective than its fingerprint was made of",
        "it was edited, so its trials are of another study than it says",
        "put back study.json as `uipe run` wrote it; the same `uipe run` with the first study file does that, too",
    )


def reference_logs(record: StudyRecord, out: Path) -> Iterator[Finding | Repairable]:
    """Find logs of the reference models that cannot be read: the next run would stop at them."""
    choices = record.study_spec.corpus.task == MULTIPLE_CHOICE
    for path in sorted((out / "logs").glob("*.json")):
        try:
            read_choice_log(path) if choices else read_log(path)
        except UserError as error:
            found = Finding(
                "logs",
                PROBLEM,
                str(error),
                "the scores of this reference model are lost; the numbers of the trials stand",
                "--fix removes the file; the next run scores the model again",
            )
            yield Repairable(found, lambda path=path: _remove([path]))  # type: ignore[misc]


def agreement(store: StudyStore) -> Iterator[Finding]:
    """Check that record and database describe the same study."""
    record, spec = store.record, store.spec
    wrong = []
    names = [objective.name for objective in store.objectives]
    for title, controls in ((record.name, False), (f"{record.name}.controls", True)):
        facts, _ = study_facts(store.source.rows, store.study_ids[controls])
        identity = facts.get("fingerprint", record.fingerprint)
        if identity != record.fingerprint:
            wrong.append(f"the database holds {title!r} with the fingerprint {identity}")
    facts, directions = study_facts(store.source.rows, store.study_ids[False])
    if (known := facts.get(METRIC_NAMES, names)) != names:
        wrong.append(f"the database maximises {known}, the record {names}")
    if directions != ["MAXIMIZE"] * len(names):
        wrong.append(f"the database has the directions {', '.join(directions)}, and {len(names)} objectives are maximised")
    unknown = {str(trial.user_attrs.get("base")) for trial in store.trials(names=("base",))}
    unknown -= {*spec.base_epochs(), "None"}
    if unknown:
        wrong.append(f"there are trials of base runs that the study does not have: {', '.join(sorted(unknown))}")
    if not wrong:
        yield Finding("record", OK, "record and database agree")
    for what in wrong:
        yield Finding(
            "record",
            PROBLEM,
            what,
            "study.json or the database is another study's",
            "put back the one that belongs here; if there is none, run the study into another folder",
        )


def bounds(store: StudyStore) -> Iterator[Finding]:
    """Find parameters of the front that are stuck at an end of their range."""
    trials = store.trials_frame(("base", "epoch", "alpha"))
    if trials.empty:
        return
    names = [objective.name for objective in store.objectives]
    front = trials[on_front(trials, store.controls_frame(), names)]
    ranges, epochs = store.spec.alpha_ranges(), store.spec.base_epochs()
    again = "in a new study that begins here (warm_start)"
    stuck: Counter[tuple[str, str, float]] = Counter()
    for row in front[front["base"].isin(list(ranges))].to_dict("records"):
        key, (low, high) = store.spec.range_key(row["base"]), ranges[row["base"]]
        margin = NEAR_BOUND * (high - low)
        if row["alpha"] >= high - margin:
            stuck["raise", f"{key}.high", high] += 1
        if row["alpha"] <= low + margin and low > -1:  # -1 is the initial model: below it the model learns
            stuck["lower", f"{key}.low", low] += 1
    found = bool(stuck)
    for (change, end, value), count in sorted(stuck.items(), reverse=True):
        what = f"{count} of {len(front)} front points have alpha at {end} ({value:g})"
        yield Finding("bounds", ADVICE, what, "better points may exist beyond it", f"{change} {end} {again}")
    last = front[[int(row["epoch"]) == epochs.get(row["base"]) for row in front.to_dict("records")]]
    walked_on = last[last["alpha"] >= 0]
    if len(walked_on) > len(front) / 2:
        found = True
        what = f"{len(walked_on)} of {len(front)} front points are at or beyond the last epoch of their base run"
        yield Finding("bounds", ADVICE, what, "unlearning may not have ended yet", f"raise unlearning.epochs {again}")
    if not found:
        yield Finding("bounds", OK, "the front is not stuck at the ends of its ranges")


def repeats(store: StudyStore) -> Iterator[Finding]:
    """Find points that were scored more than once."""
    trials = store.trials_frame(("base", "epoch", "alpha"))
    if trials.empty:
        return
    places = trials[["base", "epoch", "alpha"]].apply(tuple, axis=1)
    again = len(places) - places.nunique()
    if again <= REPEATED_SHARE * len(places):
        yield Finding("repeats", OK, f"{again} of {len(places)} trials repeated a point")
    else:
        yield Finding(
            "repeats",
            ADVICE,
            f"{again} of {len(places)} trials repeated a point",
            "they added nothing",
            f"choose another search.sampler than {store.spec.search.sampler}, or fewer search.trials",
        )


def failures(store: StudyStore) -> Iterator[Finding]:
    """Count failed trials by their reason; numbers in reasons do not make them differ. Interrupted ones are counted apart."""
    ended = _trials(store, TrialState.FAIL)
    failed = [trial for trial in ended if not is_interrupted(trial)]
    if len(failed) < len(ended):
        what = f"{len(ended) - len(failed)} trials were interrupted by the end of a run"
        yield Finding("interrupted", ADVICE, what, "they have no values", "the same command makes up for them")
    reasons = Counter(re.sub(r"\d+(\.\d+)?", "N", str(trial.user_attrs.get("reason", "unknown"))) for trial in failed)
    if not reasons:
        yield Finding("failures", OK, "no trial failed")
    for reason, count in reasons.most_common(REASONS_SHOWN):
        yield Finding(
            "failures", ADVICE, f"{count} failed: {reason}", "", "the same `uipe run` tries as many again; fix the cause first"
        )
    if len(reasons) > REASONS_SHOWN:
        rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(REASONS_SHOWN))
        yield Finding("failures", ADVICE, f"{rest} failed for {len(reasons) - REASONS_SHOWN} other reasons")


def last_stop(record: StudyRecord) -> Iterator[Finding]:
    """Report why the last run stopped early."""
    reason = record.stopped
    if reason:
        yield Finding("last run", ADVICE, f"it stopped: {reason}", "", "the same `uipe run` goes on, once its budget allows it")


def ray_folders(out: Path, running: bool) -> Iterator[Finding | Repairable]:
    """Find files that Ray and Tune left behind."""
    folder = out / "ray"
    if running or not folder.is_dir():
        return
    # "torch" is a cache of compiled code, which costs time to make again.
    old = [path for path in folder.iterdir() if path.name != "torch"]
    size = sum(path.lstat().st_size for top in old for path in (top, *_below(top)) if not path.is_dir() or path.is_symlink())
    if old:
        yield Repairable(
            Finding(
                "ray",
                ADVICE,
                f"{len(old)} entries of earlier runs in {folder}, {size / 1e6:.1f} MB",
                "logs of Ray and Tune; the study needs none of them",
                "--fix removes them",
            ),
            lambda: _remove(old),
        )


def _below(folder: Path) -> Iterator[Path]:
    return folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else iter(())


def _trials(store: StudyStore, *states: TrialState) -> list[FrozenTrial]:
    return [trial for controls in (False, True) for trial in store.trials(states, ("reason",), controls)]
