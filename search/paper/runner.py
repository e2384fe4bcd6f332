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

from search.paper.experiment import run_task
from search.paper.settings import PaperSettings, Task, tasks
from search.report.progress import Bars
from search.spec.errors import require_number_asked
from uipe_core.errors import StudyInterrupted, UserError
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import cache_folder, read_json, write_atomic

PARTS = "parts"
"""Folder of finished parts within the output folder."""


def run_paper(seeds: int, out: Path, settings: PaperSettings | None = None, workers: int | None = None) -> dict[str, Any]:
    """Run what the experiments lack and write their page.

    Args:
        seeds, out, settings, workers: As for `run_parts`; settings None are those of the paper's world.

    Returns:
        The content of ``results.json`` without its points, and the path of the ``page``.

    Raises:
        UserError, StudyInterrupted: As `run_parts`.
    """
    from search.paper.page import write_page

    chosen = settings or PaperSettings()
    with Bars() as bars:
        results = run_parts(chosen, seeds, out, bars, workers)
        bars.say("drawing ...")
        page, summary = write_page(chosen, results, out)
    return {"page": str(page), **summary}


def run_parts(settings: PaperSettings, seeds: int, out: Path, bars: Bars, workers: int | None = None) -> list[dict[str, Any]]:
    """The results of every task of seeds 0 to seeds - 1; what is kept in the folder is not run again.

    Args:
        settings: What to run.
        seeds: How many seeds, 1 to 1000.
        out: Output folder; made if it is missing.
        bars: Where progress is shown.
        workers: Processes; None is one per core that this process may use.

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
    wanted = tasks(seeds)
    kept = {task: found for task in wanted if (found := read_part(settings, task, folder)) is not None}
    missing = [task for task in wanted if task not in kept]
    if missing:
        if kept:
            bars.say(f"{len(kept)} of {len(wanted)} parts are there from before")
        _run_missing(settings, missing, folder, bars, workers or len(os.sched_getaffinity(0)))
    return [kept.get(task) or _finished(settings, task, folder) for task in wanted]


def read_part(settings: PaperSettings, task: Task, folder: Path) -> dict[str, Any] | None:
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


def keep_part(settings: PaperSettings, task: Task, folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a task, whole or not at all."""
    content = {"settings": settings.key, "checksum": _checksum(result), "result": result}
    write_atomic(folder / task.file_name, json.dumps(content, allow_nan=False).encode())


def _checksum(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _finished(settings: PaperSettings, task: Task, folder: Path) -> dict[str, Any]:
    found = read_part(settings, task, folder)
    if found is None:
        raise UserError(f"{folder / task.file_name}: vanished while the experiments ran; run the same command again")
    return found


def _run_missing(settings: PaperSettings, missing: list[Task], folder: Path, bars: Bars, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    todo, news = context.Queue(), context.Queue()
    count = min(workers, len(missing))
    for task in [*missing, *[None] * count]:
        todo.put(task)
    # Daemons: they end with this process however it ends.
    processes = [context.Process(target=_work, args=(settings, folder, todo, news), daemon=True) for _ in range(count)]
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


def _work(settings: PaperSettings, folder: Path, todo: Any, news: Any) -> None:
    """A worker: one task after another until there is none left."""
    import transformers

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
            keep_part(settings, task, folder, run_task(settings, task, store, note))
        except UserError as error:
            news.put(error)
            return
