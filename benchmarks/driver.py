"""Measure what a trial costs its driver as a study grows: storage, sampler, Ray. Prints one JSON object.

Storage: the real `StudyStore` with the evidence of a real trial (28 facts) and item scores of 21 kB. Trials 1 to N are asked
for and completed while so many others run; milliseconds are medians over the 100 trials before each mark, `cpu` of this
thread alone: the difference is what other programs take. Its baseline is plain Optuna on the same database as it is at the
end: ask, one `set_user_attr` per fact, tell; with SQLite's own settings, and as many others running. Sampler:
what an ask takes longer with it than with random, at the same marks. Ray: `benchmarks/many_workers.py`.

    python benchmarks/driver.py                       # 10,000 trials, about 4 minutes on two idle cores
    python benchmarks/driver.py --trials 500          # a small one
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from machine import machine
from optuna.distributions import BaseDistribution

from search.problem.trial import TrialSpec
from search.samplers.registry import SAMPLERS as REGISTRY
from search.spec.study import parse_study
from search.store.study_store import StudyStore

STUDY = {
    "schema_version": 1,
    "name": "driver",
    "corpus": {"kind": "people"},
    "model": {
        "kind": "tiny",
        "base": {"epochs": 1, "learning_rate": 0.01, "batch_size": 32},
        "finetune": {"epochs": 1, "learning_rate": 0.01, "batch_size": 32},
    },
    "unlearning": {
        "methods": {"grad_ascent": {}, "grad_diff": {}, "kl_min": {}, "npo": {}},
        "epochs": 5,
        "learning_rate": 0.001,
    },
    "search": {"alpha": {"low": -1, "high": 3}, "trials": 10000},
}
EVIDENCE: dict[str, Any] = {  # of a trial of the quickstart study
    "logit_scale": 1.0001798151224948,
    "definition": "tofu",
    "forget_quality": 7.610805516337407e-07,
    "ks_statistic": 0.75,
    "components": {
        "Prob Retain": 0.9881503635187988,
        "ROUGE Retain": 1.0,
        "Truth Ratio Retain": 0.41729419846982774,
        "Prob Real Authors": 0.8233457366209862,
        "ROUGE Real Authors": 1.0,
        "Truth Ratio Real Authors": 0.9318199368352688,
        "Prob Real World": 0.7652971568203297,
        "ROUGE Real World": 1.0,
        "Truth Ratio Real World": 0.910145357450963,
    },
    "forget_components": {"Prob Forget": 0.9907358332698154, "ROUGE Forget": 1.0, "Truth Ratio Forget": 0.5594464602927322},
    "forget_exact_memorization": 1.0,
    "forget_extraction_strength": 1.0,
    "retain_exact_memorization": 1.0,
    "retain_extraction_strength": 1.0,
    "related_log10_forget_quality": -10.15515835247012,
    "unrelated_log10_forget_quality": -0.044600819802020276,
    "paired_p": 0.0001,
    "flagged": False,
    "update_norm": 0.04977989832293415,
    "dtype": "float32",
    "device": "cpu",
    "seconds": 0.14611921200048528,
    "seconds_by_stage": {
        "apply": 0.0003980009987571975,
        "forget": 0.01538831899975776,
        "general": 0.03047218399996083,
        "retain": 0.04010925100010354,
        "others": 0.01941855999993568,
        "generation": 0.033294722001301125,
    },
}
ITEM_BYTES = 21_000
MARKS = (100, 1000, 5000, 10000)
SAMPLERS = ("nsga2", "tpe")
ASKS = 5
Seconds = tuple[float, float]
"""Wall-clock and CPU."""
Cost = tuple[Seconds, Seconds]
"""Of asking for a trial and of completing it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10000)
    parser.add_argument("--running", type=int, default=64, help="trials that run meanwhile")
    parser.add_argument("--dir", type=Path, help="where to write the study; a temporary folder when left out")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="driver-", dir=options.dir))
    try:
        print(json.dumps(benchmark(options.trials, options.running, folder), indent=1))
    finally:
        shutil.rmtree(folder)


def benchmark(trials: int, running: int, folder: Path) -> dict[str, Any]:
    spec = parse_study(STUDY, folder)
    store = StudyStore.create(folder / "study", spec, "f" * 32, {})
    space = spec.search_space()
    items = os.urandom(ITEM_BYTES)
    store.use_sampler(REGISTRY["random"].make(0))
    others = [store.ask_point(space) for _ in range(running)]
    marks = sorted({min(mark, trials) for mark in MARKS} | {trials})
    rows: list[dict[str, Any]] = []
    taken: list[Cost] = []
    while len(taken) < marks[-1]:
        taken.append(one(store, space, items))
        if len(taken) not in marks:
            continue
        row: dict[str, Any] = {"trials": len(taken), "resident_mb": resident(), **costs(taken[-100:])}
        for name in SAMPLERS:
            store.use_sampler(REGISTRY[name].make(0))
            found = costs([one(store, space, items) for _ in range(ASKS)])
            row[name] = {clock: round(found["ask"][clock] - row["ask"][clock], 2) for clock in ("wall", "cpu")}
        store.use_sampler(REGISTRY["random"].make(len(taken)))
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    for number, job in others:
        store.fail(job, number, "only ran meanwhile")
    done = len(taken) + len(marks) * len(SAMPLERS) * ASKS
    started = time.perf_counter()
    assert len(store.trials_frame()) == done
    frame = time.perf_counter() - started
    store.close()
    plain = plain_optuna(folder, running)
    first, last = rows[0], rows[-1]
    memory = round(1e6 * (last["resident_mb"] - first["resident_mb"]) / max(last["trials"] - first["trials"], 1))
    return {
        "unit": "milliseconds per trial, medians",
        "trials": done,
        "rows": rows,
        "table_of_all_trials_ms": round(1e3 * frame, 1),
        "database_bytes_per_trial": round((folder / "study" / "study.db").stat().st_size / done),
        "memory_bytes_per_trial": memory,
        "baseline": {"name": "plain Optuna: ask, set_user_attr each, tell, on the same database", "storage": plain},
        "ratio_to_baseline": {clock: round(last["storage"][clock] / plain[clock], 3) for clock in ("wall", "cpu")},
        "machine": machine(),
        "versions": {name: version(name) for name in ("optuna", "sqlalchemy")} | {"sqlite": sqlite3.sqlite_version},
    }


def one(store: StudyStore, space: dict[str, BaseDistribution], items: bytes) -> Cost:
    """A trial from its question to its end."""
    (number, job), asking = timed(lambda: store.ask_point(space))
    evidence = evidence_of(job)
    _, completing = timed(lambda: store.complete(job, number, evidence, items))
    return asking, completing


def costs(taken: list[Cost]) -> dict[str, dict[str, float]]:
    """Medians of asking, completing, and both, which is the storage's part with a sampler that takes no time."""
    both = [(asking[0] + completing[0], asking[1] + completing[1]) for asking, completing in taken]
    parts = {"ask": [asking for asking, _ in taken], "complete": [completing for _, completing in taken], "storage": both}
    return {name: milliseconds(found) for name, found in parts.items()}


def evidence_of(job: TrialSpec) -> dict[str, Any]:
    """Evidence whose objectives pull in opposite directions, as in a study: a front of many points."""
    assert job.alpha is not None and job.epoch is not None
    walked = (1 + job.alpha) * job.epoch / 5
    return {
        "kind": job.kind,
        "base": job.base,
        "method": job.base,
        "epoch": job.epoch,
        "alpha": job.alpha,
        "walk": "extrapolation" if job.alpha > 0 else "interpolation",
        **EVIDENCE,
        "log10_forget_quality": -20 * 2.718281828**-walked,
        "model_utility": 0.9 - 0.1 * walked - 0.05 * len(str(job.base)) / 10,
    }


def plain_optuna(folder: Path, running: int) -> dict[str, float]:
    """Median milliseconds of a trial as Optuna alone would write it."""
    copy = folder / "plain.db"
    source, target = sqlite3.connect(folder / "study" / "study.db"), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.close()
    sqlite3.connect(copy).execute("PRAGMA journal_mode=DELETE")
    study = optuna.load_study(study_name="driver", storage=f"sqlite:///{copy}", sampler=optuna.samplers.RandomSampler(seed=0))
    space = parse_study(STUDY, folder).search_space()

    def trial() -> None:
        asked = study.ask(fixed_distributions=space)
        job = TrialSpec("search", asked.params["base"], asked.params["epoch"], asked.params["alpha"])
        evidence = evidence_of(job)
        for key, value in evidence.items():
            asked.set_user_attr(key, value)
        study.tell(asked, [evidence["log10_forget_quality"], evidence["model_utility"]])

    for _ in range(running):
        study.ask(fixed_distributions=space)
    return milliseconds([timed(trial)[1] for _ in range(20)])


def timed(action: Callable[[], Any]) -> tuple[Any, Seconds]:
    """Return what it returns, and its wall-clock and CPU seconds."""
    started, cpu = time.perf_counter(), time.thread_time()
    result = action()
    return result, (time.perf_counter() - started, time.thread_time() - cpu)


def milliseconds(found: list[Seconds]) -> dict[str, float]:
    """Medians."""
    return {
        name: round(1e3 * statistics.median(part), 2)
        for name, part in zip(("wall", "cpu"), zip(*found, strict=True), strict=True)
    }


def resident() -> float:
    """Memory of this process that is not shared with others and not of files, in MB (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(fields["RssAnon"].split()[0]) / 1e3, 1)


if __name__ == "__main__":
    main()
