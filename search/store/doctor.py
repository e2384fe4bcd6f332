"""Run all checks of a study's folder and its caches, and repair what can be repaired."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from optuna.trial import TrialState

from search.spec.errors import without_password
from search.store import checks as findings
from search.store.checks import ADVICE, FIXED, OK, PROBLEM, Finding, Repairable
from search.store.folder import LOCK, is_running
from search.store.record import StudyRecord, read_record
from search.store.sqlite_reading import storage_url
from search.store.study_store import StudyStore
from uipe_core.deltas.checkpoints import checkpoint_inputs
from uipe_core.errors import UserError, first_line
from uipe_core.storage.content_store import ContentStore, content_key
from uipe_core.storage.files import cache_folder, try_lock

MB = 10**6


def examine(out: Path, fix: bool) -> list[Finding]:
    """Check a study, and repair what can be repaired.

    Args:
        out: Its folder. While a run is under way it is only read.
        fix: Repair it.

    Returns:
        The findings, in the order of the checks.

    Raises:
        UserError: If the folder holds no study, or is to be repaired while a run writes its trials from another folder.
    """
    record = read_record(out)
    found: list[Finding] = []
    with contextlib.ExitStack() as stack:
        try:
            running = not stack.enter_context(try_lock(out / LOCK)) if fix else is_running(out)
        except OSError as error:
            raise UserError(f"{out / LOCK}: {error.strerror}; give a folder that can be written") from error
        running = _trials_are_written(out, record, fix, stack) or running
        found.append(
            Finding("lock", OK, "a run of this study is under way", "it is only read; repairs wait until it has ended")
            if running
            else Finding("lock", OK, "no run of this study is under way", "the lock file of a dead process locks nothing")
        )
        # One after the other, so that each check sees what the repairs before it have done.
        for result in _checks(out, record, running):
            finding = _repaired(result, running) if fix and isinstance(result, Repairable) else _plain(result)
            if finding not in found:
                found.append(finding)
    return found


def _trials_are_written(out: Path, record: StudyRecord, fix: bool, stack: contextlib.ExitStack) -> bool:
    """Return whether a run writes the study's trials from another folder or machine; to repair, keep any from doing so.

    Raises:
        UserError: They are to be repaired, and are being written.
    """
    if record.spec.get("storage") is None:
        return False
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from search.store.database import STORAGE_ERRORS, WriterLock

    try:
        lock = WriterLock(make_url(storage_url(out, record)), record.name)
        if not fix:
            return not lock.is_free()
        lock.take()
    except (OSError, ArgumentError, ImportError, *STORAGE_ERRORS):
        return False  # what cannot be reached is found by the checks
    stack.callback(lock.release)
    return False


def _guarded(name: str, check: Iterable[Finding | Repairable]) -> Iterator[Finding | Repairable]:
    """Yield what a check finds; what cannot be read is a finding, too."""
    from search.store.database import STORAGE_ERRORS, explain_storage_error

    try:
        yield from check
    except (UserError, OSError, *STORAGE_ERRORS) as error:
        yield Finding(name, PROBLEM, explain_storage_error(error, ""), "this cannot be checked any further", findings.COPY)


def _plain(result: Finding | Repairable) -> Finding:
    return result.finding if isinstance(result, Repairable) else result


def _repaired(result: Repairable, running: bool) -> Finding:
    finding = result.finding
    if running and result.needs_study:
        return finding
    try:
        done = result.repair()
    except Exception as error:  # a damaged database fails in SQLAlchemy, Optuna or its driver
        why = f"could not be repaired: {first_line(error)}"
        return Finding(finding.check, PROBLEM, finding.found, finding.meaning, why)
    return Finding(finding.check, FIXED, finding.found, finding.meaning, f"fixed: {done}")


def _checks(out: Path, record: StudyRecord, running: bool) -> Iterator[Finding | Repairable]:
    spec = record.study_spec
    try:
        store = StudyStore.open(out)
    except UserError as error:
        remedy = "put the database back, or run the study into another folder"
        yield Finding("record", PROBLEM, str(error), "the trials cannot be read", remedy)
        store = None
    yield from findings.identity(record)
    if store is not None:
        yield from _guarded("database", findings.integrity(store))
        yield from _guarded("record", findings.agreement(store))
        yield from _guarded("trials", findings.orphans(store, running))
        yield from _guarded("item scores", findings.item_scores(store))
    yield from findings.reference_logs(record, out)
    place = spec.cache.deltas or str(cache_folder("deltas"))
    elsewhere = "://" in place
    deltas = ContentStore(cache_folder("node") if elsewhere else Path(place))
    if elsewhere:
        meaning = "every node checks the checksums of what it fetches"
        yield Finding("base runs", ADVICE, f"at {without_password(place)}, not looked at", meaning, "nothing to do")
    else:
        yield from base_runs(deltas, record)
        yield from unfinished(deltas)
    if store is not None:
        yield from _guarded("bounds", findings.bounds(store))
        yield from _guarded("repeats", findings.repeats(store))
        yield from _guarded("failures", findings.failures(store))
    yield from findings.last_stop(record)
    if store is not None:
        yield from _guarded("disk", disk(store, deltas))
        store.close()
    yield from findings.ray_folders(out, running)


def base_runs(deltas: ContentStore, record: StudyRecord) -> Iterator[Finding | Repairable]:
    """Find update vectors of the study that are torn, altered or gone."""
    gone, whole = [], 0
    for label, key in entries(record):
        try:
            flaw = deltas.flaw(key)
        except FileNotFoundError:
            gone.append(label)
            continue
        if flaw is None:
            whole += 1
            continue
        yield Repairable(
            Finding(
                "base runs",
                PROBLEM,
                f"{label}: {flaw} ({deltas.root / key})",
                "its update vectors are not those that were trained",
                "--fix moves the entry to quarantine; the next run that needs it trains it again",
            ),
            lambda key=key: _quarantine(deltas, key),  # type: ignore[misc]
            needs_study=False,
        )
    if gone:
        yield Finding(
            "base runs",
            ADVICE,
            f"{', '.join(gone)}: not in the cache {deltas.root}",
            "it was emptied or is another one",
            "what is needed is trained again: by `uipe run` for more trials, by `uipe export` for a model",
        )
    if whole:
        yield Finding("base runs", OK, f"{whole} entries of the cache match their checksums")


def _quarantine(deltas: ContentStore, key: str) -> str:
    deltas.find(key)
    return f"{key} is in {deltas.root / 'quarantine'}"


def entries(record: StudyRecord) -> list[tuple[str, str]]:
    """Return label and key of every entry of the delta store that belongs to a study."""
    given = record.checkpoints
    initial = record.models["initial"]
    found = [(label, run.delta) for label, run in record.base_runs.items() if label not in given]
    for label, identities in given.items():
        keys = (content_key(checkpoint_inputs(initial, identity)) for identity in identities)
        found += [(f"{label}, checkpoint {number}", key) for number, key in enumerate(keys, 1)]
    return found


def unfinished(deltas: ContentStore) -> Iterator[Finding | Repairable]:
    """Find unfinished entries that killed processes left in the cache."""
    keys = deltas.unfinished()
    if not keys:
        yield Finding("cache", OK, f"no unfinished entries in {deltas.root}")
        return

    def clear() -> str:
        return f"{sum(deltas.clear_unfinished(key) for key in keys)} removed"

    what = f"{len(keys)} unfinished entries in {deltas.root / 'tmp'}"
    finding = Finding("cache", PROBLEM, what, "their makers were killed; they only take space", "--fix removes them")
    yield Repairable(finding, clear, needs_study=False)


def disk(store: StudyStore, deltas: ContentStore) -> Iterator[Finding]:
    """Compare the free space with what the rest of the study needs."""
    needs = {store.out: _rest_of_trials(store), deltas.root: _rest_of_base_runs(store, deltas)}
    for folder, needed in needs.items():
        if not folder.is_dir():
            continue
        free = shutil.disk_usage(folder).free
        if needed > free:
            remedy = "free some space, or have the cache elsewhere (cache.deltas, UIPE_CACHE)"
            what = f"{folder}: {free / MB:.0f} MB are free, and the rest of the study needs {needed / MB:.0f} MB"
            yield Finding("disk", PROBLEM, what, "the study would stop there", remedy)
        else:
            yield Finding("disk", OK, f"{folder}: {free / MB:,.0f} MB are free, {needed / MB:,.0f} MB are still needed")


def _rest_of_trials(store: StudyStore) -> int:
    """Return the bytes of the missing trials, by the average of those that exist."""
    kinds = [trial.user_attrs.get("kind") for trial in store.trials((TrialState.COMPLETE,), ("kind",))]
    missing = max(store.spec.search.trials - kinds.count("search"), 0)
    return missing * (_size(store.out / "items") + _size(store.out / "study.db")) // max(len(kinds), 1)


def _rest_of_base_runs(store: StudyStore, deltas: ContentStore) -> int:
    """Return the bytes of the missing base runs, each as large as the largest that exists."""
    known = store.record.base_runs
    missing = [label for label in store.spec.base_epochs() if label not in known]
    sizes = [_size(deltas.root / key) for _, key in entries(store.record)]
    return len(missing) * max(sizes, default=0)


def _size(place: Path) -> int:
    paths: Iterable[Path] = place.rglob("*") if place.is_dir() else (place,)
    return sum(path.stat().st_size for path in paths if path.is_file())
