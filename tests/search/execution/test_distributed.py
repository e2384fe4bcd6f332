"""Base runs in several processes, through Ray Train on this machine."""

import json
import os
import signal
import time

import pytest

from search.evaluation.prepared import prepare
from search.spec.study import load_study
from uipe_core.deltas.store import DeltaStore
from uipe_core.models.tiny import tiny_model
from uipe_core.unlearning.training import train_base_run

PROCESSES = {"base_run": {"processes": 2}}
RUNS = {"methods": {"grad_diff": {"retain_weight": 2}, "kl_min": {}}, "epochs": 2}


def difference(update, other):
    squares = [(float((t - other.tensors[n]).norm()), float(t.norm())) for n, t in update.tensors.items()]
    return sum(d**2 for d, _ in squares) ** 0.5 / sum(s**2 for _, s in squares) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"rank": 4, "alpha": 8}], ids=["full", "lora"])
def test_a_study_trained_by_two_processes_has_the_base_runs_of_one(adapter, write_study, launch, tmp_path):
    changes = {
        "unlearning": {**RUNS, "adapter": adapter},
        "search": {"trials": 2},
        "cache": {"deltas": str(tmp_path / "deltas")},
    }
    driver = launch(
        "run", write_study(tmp_path / "2.yaml", **changes, resources=PROCESSES), "--out", tmp_path / "out", "--json"
    )
    assert driver.wait(900) == 0, driver.stderr
    assert json.loads(driver.stdout)["trials"] == {"complete": 4 + 2, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert "unlearning: kl_min" in driver.stderr
    single = prepare(load_study(write_study(tmp_path / "1.yaml", **changes)))
    folder = tiny_model(single.models.config, single.corpus, "full", single.models.store)
    for run in single.spec.variants():
        config = single.unlearning(run)
        # The same address: the number of processes is no input of a base run.
        found = DeltaStore(single.delta_root).find(single.base_run_inputs(config))
        epochs = list(train_base_run(single.models.source("initial", str(folder)).load(), single.corpus, config))
        assert [record["epoch"] for record in found.epochs] == [result.epoch for result in epochs]
        for result, record in zip(epochs, found.epochs, strict=True):
            shared = found.load(result.epoch)
            assert shared.tensors.keys() == result.update.tensors.keys()
            assert difference(shared, result.update) < 1e-4
            assert record["loss"] == pytest.approx(result.loss, rel=1e-4)
            assert record["norm"] == pytest.approx(result.update.norm, rel=1e-4)
    notes = [path for path in (tmp_path / "out" / "ray").glob("train-*/**/*") if path.is_file()]
    assert all(path.stat().st_size < 100_000 and path.suffix != ".safetensors" for path in notes)


@pytest.mark.slow
def test_a_run_that_diverges_in_two_processes_says_so_and_is_not_trained_again(write_study, launch, tmp_path):
    methods = {"unlearning": {**RUNS, "learning_rate": 1e30, "methods": {"grad_ascent": {}}}}
    study = write_study(tmp_path / "study.yaml", **methods, resources=PROCESSES)
    driver = launch("run", study, "--out", tmp_path / "out")
    assert driver.wait(900) == 2
    assert "grad_ascent: grad_ascent with learning rate 1e+30 diverged in epoch" in driver.stderr
    assert "Traceback" not in driver.stderr
    assert len(list((tmp_path / "out" / "ray").glob("train-*"))) == 1


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_trained_anew(write_study, launch, living_processes, tmp_path):
    changes = {"unlearning": {**RUNS, "methods": {"grad_ascent": {}}, "learning_rate": 1e-5, "batch_size": 1, "epochs": 6}}
    changes |= {"resources": PROCESSES, "cache": {"deltas": str(tmp_path / "deltas")}, "search": {"trials": 1}}
    driver = launch("run", write_study(tmp_path / "study.yaml", **changes), "--out", tmp_path / "out")
    until = time.monotonic() + 600
    while "unlearning: grad_ascent" not in driver.stderr:
        assert time.monotonic() < until and driver.process.poll() is None, driver.stderr
        time.sleep(0.2)
    trainers = [pid for pid, command in living_processes(driver.tag).items() if "RayTrainWorker" in command]
    assert len(trainers) == 2
    os.kill(trainers[0], signal.SIGKILL)
    assert driver.wait(900) == 0, driver.stderr
    (record,) = (tmp_path / "deltas").glob("*/run.json")
    assert len(json.loads(record.read_text())) == 7
    assert len(list((tmp_path / "out" / "ray").glob("train-*"))) == 2


@pytest.mark.slow
def test_more_processes_than_the_machine_holds_are_refused(write_study, launch, tmp_path):
    study = write_study(tmp_path / "study.yaml", resources={"base_run": {"processes": 1000}})
    driver = launch("run", study, "--out", tmp_path / "out")
    assert driver.wait(600) == 2
    assert "resources.base_run.processes: 1000 processes train together, but this cluster has room for" in driver.stderr
