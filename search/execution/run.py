"""Run a study on Ray: models and base runs as tasks, trials through Tune with warm, reused actors."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from search.evaluation.inputs import check_items
from search.evaluation.prepared import prepare
from search.execution.base_runs import LOST, problem_of
from search.execution.budget import Stop
from search.execution.ray_compat import IN_A_JOB
from search.execution.study_run import StudyRun
from search.problem.trial import TrialSpec
from search.publishing.tracking import StudyTracking
from search.report.html import write_report
from search.report.progress import Bars
from search.results.constrained import Answer, Dial, answer_of
from search.results.status import StatusLines
from search.results.study_result import StudyResult
from search.spec.errors import require_number_asked
from search.spec.study import StudySpec
from search.store.database import STORAGE_ERRORS, explain_storage_error
from search.store.mirror import working_folder
from search.store.record import RECORD, read_record
from search.store.study_store import StudyStore
from uipe_core.errors import StudyInterrupted, UserError
from uipe_core.storage.signals import ignore_signals


def run_study(
    spec: StudySpec,
    out: Path | str | None = None,
    *,
    quiet: bool = False,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> StudyResult:
    """Run, resume or extend a study.

    Args:
        spec: The study (see `search.spec.study.load_study`).
        out: Output folder, or URL of one (`search.store.mirror`); None is ``runs/<study name>``.
        quiet: No progress bars.
        address: Ray cluster to run on (see `search.execution.ray_cluster.connected`); None is this machine.
        trust_remote_code: Let code run that comes with the models, where the study asks for it.

    Returns:
        The finished study: front, tables, selection, export, report.

    Raises:
        UserError: Bad input; nothing is lost.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    with working_folder(Path("runs", spec.name) if out is None else out) as folder:
        return _at_work(spec, folder, quiet, address, trust_remote_code, StudyRun.finish_all)


def confirm_study(
    out: Path | str, top: int, seeds: int, *, quiet: bool = False, address: str | None = None, trust_remote_code: bool = False
) -> StudyResult:
    """Train the base runs of a study's finalists from other seeds, and score the finalists again on the items for reporting.

    Args:
        out: Folder of a finished study.
        top: How many finalists (`StudyResult.finalists`).
        seeds: How many other seeds: the study's own, or the largest of several, plus 1, 2, ...
        quiet, address, trust_remote_code: As `run_study`.

    Returns:
        The study, with the confirmations among its controls (`StudyResult.confirmations`).

    Raises:
        UserError: As `run_study`; or too few or too many finalists or seeds, or finalists that are all given checkpoints.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    require_number_asked("--top", top)
    require_number_asked("--seeds", seeds)
    result = StudyResult.open(out)
    spec = result.runnable_spec()
    top_points = result.finalists(top)
    if top_points.empty:
        raise UserError(f"{out}: nothing to confirm: no trial beats the initial model, or those that do have collapsed")
    jobs = [
        TrialSpec("confirm", row["base"], int(row["epoch"]), float(row["alpha"]), of_trial=int(row["trial"]))
        for row in top_points.to_dict("records")
        if row["base"] not in spec.checkpoints
    ]
    if not jobs:
        raise UserError(f"{out}: its finalists walk from given checkpoints, which cannot be trained again from other seeds")
    last = max(run.seed for run in spec.variants())
    others = [last + step for step in range(1, seeds + 1)]
    with working_folder(out) as folder:
        return _at_work(spec, folder, quiet, address, trust_remote_code, lambda run: run.confirm(jobs, others))


def audit_study(
    out: Path | str,
    trials: Sequence[int] = (),
    top: int | None = None,
    tests: Sequence[str] = (),
    *,
    quiet: bool = False,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> StudyResult:
    """Hold trials of a study against audits: does the knowledge come back, and is it seen that it was there?

    Args:
        out: Folder of a study.
        trials: Numbers of the trials; none for the finalists (`StudyResult.finalists`).
        top: How many finalists; None is the study's own number (section ``audit``).
        tests: Names of `search.problem.trial.AUDITS`; none for the study's own, or all.
        quiet, address, trust_remote_code: As `run_study`.

    Returns:
        The study, with the audits among its controls (`StudyResult.audits`).

    Raises:
        UserError: As `run_study`; or an audit that does not exist or lacks every item it needs, or nothing to audit.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    result = StudyResult.open(out)
    spec = result.runnable_spec()
    jobs = result.audit_jobs(trials, top, tests)
    with working_folder(out) as folder:
        return _at_work(spec, folder, quiet, address, trust_remote_code, lambda run: run.audit(jobs))


def dial_study(
    out: Path | str,
    floor: float | None = None,
    *,
    quiet: bool = False,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[StudyResult, Answer]:
    """Look for the strongest forgetting that keeps a share of the initial model's utility, by scoring points for just that.

    Args:
        out: Folder of a study.
        floor: Least share of the initial model's utility, above 0 and at most 1; None is the study's own.
        quiet, address, trust_remote_code: As `run_study`.

    Returns:
        The study, with the points among its trials, and what they say (`search.results.constrained`).

    Raises:
        UserError: As `run_study`; or an impossible floor.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    result = StudyResult.open(out)
    share = result.floor if floor is None else floor
    Dial(result.store, share)  # tells what is wrong before anything is opened for writing
    spec = result.runnable_spec()
    with working_folder(out) as folder:
        result = _at_work(spec, folder, quiet, address, trust_remote_code, lambda run: run.dial(share))
    return result, answer_of(result, share)


def _at_work(
    spec: StudySpec,
    folder: Path,
    quiet: bool,
    address: str | None,
    trust_remote_code: bool,
    work: Callable[["StudyRun"], None],
) -> StudyResult:
    """Open a study, work on it, and write its report."""
    with Bars(quiet) as bars:
        record = read_record(folder) if (folder / RECORD).exists() else None
        spec = spec.continuing(None if record is None else record.study_spec)
        preparation = prepare(spec, trust_remote_code)
        if record is not None:
            preparation = replace(preparation, recorded={label: run.delta for label, run in record.base_runs.items()})
        else:
            check_items(spec, preparation.corpus)
        store = StudyStore.create(folder, spec, preparation.fingerprint, preparation.facts())
        try:
            orphans = store.fail_orphaned_trials()
            if orphans:
                bars.say(f"resuming: {orphans} trials of an interrupted run were closed")
            with StudyTracking(store, bars.say) as tracking:
                run = StudyRun(preparation, store, bars, address, track=tracking.ended)
                with StatusLines(store, bars.under_way, IN_A_JOB in os.environ and bars.plain):
                    try:
                        work(run)
                    except BaseException:
                        with ignore_signals():
                            store.end_running()  # before the last status line is written
                        raise
                if run.stopped is not None and (run.stopped.gave_up or not store.counts()["complete"]):
                    raise UserError(_without_result(folder, run.stopped, store))
                bars.say("writing the report ...")
                result = StudyResult.of(store)
                write_report(result)
                tracking.finish(result)
            store.flush()
        except KeyboardInterrupt:
            raise StudyInterrupted(f"what was done is in {folder}; the same command resumes it") from None
        except LOST as error:
            raise problem_of(str(folder), error) from error
        except (OSError, *STORAGE_ERRORS) as error:
            # Not from the error: what a database says may hold what its URL must not show.
            said = explain_storage_error(error, spec.storage or "")
            raise UserError(
                f"output folder {folder} or storage {store.record.storage}: {said}; "
                "correct that (a full disk? lost rights? a database that is locked or gone?), then the same command resumes "
                "the study: what was done is kept, and what could not be written is done again"
            ) from None
        finally:
            with ignore_signals():
                store.close()
    return result


def _without_result(folder: Path, stop: Stop, store: StudyStore) -> str:
    """Why a study ended without what was asked for; what there is of it is in its report."""
    if store.counts()["complete"]:
        write_report(StudyResult.of(store))
    if stop.gave_up:
        return f"{folder}: the study gave up: {stop.reason}; correct the cause, then the same command goes on"
    return f"{folder}: no trial was complete when the study stopped: {stop.reason}; give it more and the same command goes on"
