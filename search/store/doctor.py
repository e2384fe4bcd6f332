"""The care of a study's folder: what is wrong with it and with what it has in the caches, and the repair of what can be."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from optuna.trial import TrialState

from search.spec.redaction import without_password
from search.spec.study import StudySpec
from search.store import checks as findings
from search.store.checks import ADVICE, FIXED, OK, PROBLEM, Finding, Repairable
from search.store.record import read_record
from search.store.study_store import StudyStore
from uipe_core.deltas.checkpoints import checkpoint_inputs
from uipe_core.errors import UserError
from uipe_core.storage.content_store import ContentStore, content_key
from uipe_core.storage.files import cache_folder

MB = 10**6


def examine(out: Path, fix: bool) -> list[Finding]:
    """Examines a study, and repairs what can be repaired.

    Args:
        out: Its folder. It may be at work: then it is only read, whatever `fix` says.
        fix: Whether to repair.

    Returns:
        What was found, in the order of the checks.

    Raises:
        UserError: If the folder holds no study.
    """
    record = read_record(out)
    found: list[Finding] = []
    with _hold(out, fix) as running:
        found.append(
            Finding("lock", OK, "a run of this study is under way", "it is only read; repairs wait until it has ended")
            if running
            else Finding("lock", OK, "nobody runs this study", "a lock file of a dead process holds nobody up")
        )
        # One after the other, so that each check sees what the repairs before it have done.
        found.extend(
            _repaired(result, running) if fix and isinstance(result, Repairable) else _plain(result)
            for result in _checks(out, record, running)
        )
    return found


@contextmanager
def _hold(out: Path, keep: bool) -> Iterator[bool]:
    """Whether somebody runs the study; otherwise nobody can while the block lasts, if `keep`."""
    path = out / ".lock"
    lock = FileLock(path)
    if not keep and not path.exists():
        yield False
        return
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield True
        return
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder that can be written") from error
    if not keep:
        lock.release()
    try:
        yield False
    finally:
        lock.release()


def _plain(result: Finding | Repairable) -> Finding:
    return result.finding if isinstance(result, Repairable) else result


def _repaired(result: Repairable, running: bool) -> Finding:
    finding = result.finding
    if running and result.needs_study:
        return finding
    try:
        done = result.repair()
    except (OSError, UserError) as error:
        return Finding(finding.check, PROBLEM, finding.found, finding.meaning, f"could not be repaired: {error}")
    return Finding(finding.check, FIXED, finding.found, finding.meaning, f"fixed: {done}")


def _checks(out: Path, record: Mapping[str, Any], running: bool) -> Iterator[Finding | Repairable]:
    spec = StudySpec.recorded(record["spec"])
    try:
        store = StudyStore.open(out)
    except UserError as error:
        remedy = "put the database back, or run the study into another folder"
        yield Finding("record", PROBLEM, str(error), "the trials cannot be read", remedy)
        store = None
    if store is not None:
        yield from findings.agreement(store)
        yield from findings.orphans(store, running)
        yield from findings.item_scores(store)
    place = spec.cache.deltas or str(cache_folder("deltas"))
    elsewhere = "://" in place
    deltas = ContentStore(cache_folder("node") if elsewhere else Path(place))
    if elsewhere:
        meaning = "every node holds what it fetches against its checksums"
        yield Finding("base runs", ADVICE, f"at {without_password(place)}, not looked at", meaning, "nothing to do")
    else:
        yield from base_runs(deltas, record)
        yield from unfinished(deltas)
    if store is not None:
        yield from findings.bounds(store)
        yield from findings.repeats(store)
        yield from findings.failures(store)
    yield from findings.last_stop(record)
    if store is not None:
        yield from disk(store, deltas)
        store.close()
    yield from findings.ray_folders(out, running)


def base_runs(deltas: ContentStore, record: Mapping[str, Any]) -> Iterator[Finding | Repairable]:
    """Update vectors of the study that are torn, altered or gone."""
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
                "--fix moves the entry to quarantine; whoever needs it trains it again",
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


def entries(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and key of every entry of the delta store that belongs to a study."""
    given = record.get("checkpoints", {})
    initial = record["models"]["initial"]
    found = [(label, str(run["delta"])) for label, run in record.get("base_runs", {}).items() if label not in given]
    for label, identities in given.items():
        keys = (content_key(checkpoint_inputs(initial, identity)) for identity in identities)
        found += [(f"{label}, checkpoint {number}", key) for number, key in enumerate(keys, 1)]
    return found


def unfinished(deltas: ContentStore) -> Iterator[Finding | Repairable]:
    """What makers that were killed left in the cache."""
    keys = deltas.unfinished()
    if not keys:
        yield Finding("cache", OK, f"no unfinished entries in {deltas.root}")
        return

    def clear() -> str:
        return f"{sum(deltas.clear_unfinished(key) for key in keys)} removed"

    what = f"{len(keys)} unfinished entries in {deltas.root / 'tmp'}"
    finding = Finding("cache", PROBLEM, what, "whoever wrote them was killed; they only take space", "--fix removes them")
    yield Repairable(finding, clear, needs_study=False)


def disk(store: StudyStore, deltas: ContentStore) -> Iterator[Finding]:
    """Space that is left, against what the rest of the study needs."""
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
    """Bytes of the trials that are still to come, by those that are there."""
    kinds = [trial.user_attrs.get("kind") for trial in store.trials((TrialState.COMPLETE,), ("kind",))]
    missing = max(store.spec.search.trials - kinds.count("search"), 0)
    return missing * (_size(store.out / "items") + _size(store.out / "study.db")) // max(len(kinds), 1)


def _rest_of_base_runs(store: StudyStore, deltas: ContentStore) -> int:
    """Bytes of the base runs that are still to be trained, as large as the largest that is there."""
    known = store.record.get("base_runs", {})
    missing = [label for label in store.spec.base_epochs() if label not in known]
    sizes = [_size(deltas.root / key) for _, key in entries(store.record)]
    return len(missing) * max(sizes, default=0)


def _size(place: Path) -> int:
    paths: Iterable[Path] = place.rglob("*") if place.is_dir() else (place,)
    return sum(path.stat().st_size for path in paths if path.is_file())
