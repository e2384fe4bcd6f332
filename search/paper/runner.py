"""Run what the experiments lack on the cores of this machine and keep every finished part, so that a run can be resumed."""

import hashlib
import json
import multiprocessing
import os
import queue
import signal
import warnings
from pathlib import Path
from typing import Any

from search.paper.attacks import AttackSettings, run_attacks
from search.paper.experiment import run_task
from search.paper.settings import PaperSettings, Task
from search.report.progress import Bars
from search.spec.errors import require_number_asked
from search.spec.models import TinyModel
from search.spec.plugins import load_plugins
from search.spec.study import load_study
from uipe_core.errors import StudyInterrupted, UserError
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import cache_folder, read_json, write_atomic

PARTS = "parts"
"""Folder of finished parts within the output folder."""


def run_paper(
    seeds: int,
    out: Path,
    settings: PaperSettings | None = None,
    attacks: AttackSettings | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run what the experiments lack and write their page.

    Args:
        seeds, out, workers: As for `run_parts`.
        settings: Of UIPE's experiments; None is the paper's world.
        attacks: Of the experiment on attacks; None is the quickstart's world.

    Returns:
        The content of ``results.json`` without its points, and the path of the ``page``.

    Raises:
        UserError, StudyInterrupted: As `run_parts`.
    """
    from search.paper.page import write_page

    chosen, attacked = settings or PaperSettings.small(), attacks or AttackSettings.small()
    with Bars() as bars:
        results = run_parts(chosen, seeds, out, bars, workers)
        parts = run_parts(attacked, seeds, out, bars, workers)
        bars.say("drawing ...")
        page, summary = write_page(out, attacked, parts, (chosen, results))
    return {"page": str(page), **summary}


def run_study_attacks(study: Path, seeds: int, out: Path) -> dict[str, Any]:
    """Run the experiment on attacks with the corpus, models and methods of a study, and write a page of its own.

    Models that exist or are fine-tuned take all cores and the memory of one process: their parts run one after another.

    Args:
        study: A study file; of its search nothing is used but the range of alpha.
        seeds: How many seeds, from the study's own on.
        out: As for `run_parts`.

    Returns, raises: As `run_paper`; and UserError for a study file that is wrong or does not fit (`AttackSettings.of_study`).
    """
    from search.paper.page import write_page

    settings = AttackSettings.of_study(load_study(study))
    with Bars() as bars:
        workers = None if isinstance(settings.study.model, TinyModel) else 1
        parts = run_parts(settings, seeds, out, bars, workers)
        bars.say("drawing ...")
        page, summary = write_page(out, settings, parts)
    return {"page": str(page), **summary}


Settings = PaperSettings | AttackSettings


def run_parts(settings: Settings, seeds: int, out: Path, bars: Bars, workers: int | None = None) -> list[dict[str, Any]]:
    """The results of every task of so many seeds; what is kept in the folder is not run again.

    Args:
        settings: What to run.
        seeds: How many seeds, 1 to 1000.
        out: Output folder; made if it is missing.
        bars: Where progress is shown.
        workers: Processes; None is one per core that this process may use. Models that are not small share out the other
            cores as threads.

    Raises:
        UserError: No seed or too many, a folder that cannot be written, or a kept part that is damaged or of other settings.
        StudyInterrupted: On Ctrl-C; finished parts stay, and the same command goes on from there.
    """
    require_number_asked("--seeds", seeds)
    folder = out / PARTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}; choose another folder") from error
    wanted = settings.tasks(seeds)
    kept = {task: found for task in wanted if (found := read_part(settings, task, folder)) is not None}
    missing = [task for task in wanted if task not in kept]
    if missing:
        if kept:
            bars.say(f"{len(kept)} of {len(wanted)} parts are there from before")
        if isinstance(settings, AttackSettings):
            bars.say(settings.cost(len(missing)))
        _run_missing(settings, missing, folder, bars, workers)
    return [kept.get(task) or _finished(settings, task, folder) for task in wanted]


def read_part(settings: Settings, task: Task, folder: Path) -> dict[str, Any] | None:
    """The kept result of a task, or None where there is none.

    Raises:
        UserError: If the file is damaged or belongs to other settings.
    """
    path = folder / task.file_name
    try:
        content = read_json(path)
        known, checksum, result = content["settings"], content["checksum"], content["result"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged; delete it and run the same command again: only this part runs again") from error
    if checksum != _checksum(result):
        raise UserError(f"{path}: was altered (its checksum does not fit); delete it and run the same command again")
    if known != settings.key:
        raise UserError(f"{path}: was made with other settings or another version; choose another --out, or delete it")
    return dict(result)


def keep_part(settings: Settings, task: Task, folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a task, whole or not at all."""
    content = {"settings": settings.key, "checksum": _checksum(result), "result": result}
    write_atomic(folder / task.file_name, json.dumps(content, allow_nan=False).encode())


def _checksum(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _finished(settings: Settings, task: Task, folder: Path) -> dict[str, Any]:
    found = read_part(settings, task, folder)
    if found is None:
        raise UserError(f"{folder / task.file_name}: vanished while the experiments ran; run the same command again")
    return found


def _run_missing(settings: Settings, missing: list[Task], folder: Path, bars: Bars, workers: int | None) -> None:
    context = multiprocessing.get_context("spawn")
    todo, news = context.Queue(), context.Queue()
    cores = len(os.sched_getaffinity(0))
    count = min(workers or cores, len(missing))
    for task in [*missing, *[None] * count]:
        todo.put(task)
    # Small models want one thread: two under contention are slower (`uipe_core.models.loading.set_threads`).
    large = isinstance(settings, AttackSettings) and not isinstance(settings.study.model, TinyModel)
    threads = max(1, cores // count) if large else 1
    # Daemons: they end with this process however it ends.
    processes = [context.Process(target=_work, args=(settings, folder, todo, news, threads), daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            try:
                _hear(news.get(timeout=0.5), bars)
            except queue.Empty:
                _check(processes)
        while not news.empty():
            _hear(news.get(), bars)
        _check(processes)
    except KeyboardInterrupt:
        raise StudyInterrupted(f"finished parts are in {folder}; run the same command again to go on") from None
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
        todo.cancel_join_thread()


def _hear(message: Any, bars: Bars) -> None:
    """Return what a worker says: how far a task is, or why it cannot go on."""
    if isinstance(message, UserError):
        raise message
    bars.show(*message)


def _check(processes: list[Any]) -> None:
    failed = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
    if failed:
        raise RuntimeError(f"a worker process ended with exit code {failed[0]}; its error is above, or memory ran out")


def _work(settings: Settings, folder: Path, todo: Any, news: Any, threads: int) -> None:
    """A worker: one task after another until there is none left."""
    import transformers

    load_plugins()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Ctrl-C reaches every process of the terminal; the driver alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parent = multiprocessing.parent_process()
    store = ContentStore(cache_folder("models"))
    while (task := todo.get()) is not None:

        def note(done: int, total: int, name: str = task.name) -> None:
            if parent is not None and not parent.is_alive():
                raise SystemExit(1)
            news.put((name, done, total))

        try:
            if isinstance(settings, AttackSettings):
                result = run_attacks(settings, task, threads, note)
            else:
                result = run_task(settings, task, store, note)
            keep_part(settings, task, folder, result)
        except UserError as error:
            news.put(error)
            return
