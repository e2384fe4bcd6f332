"""Base runs in several processes, through Ray Train on this machine."""

import json
import os
import signal
import time

import pytest

from uipe_core.delta_store import DeltaStore

PROCESSES = {"base_run": {"processes": 2}}
RUNS = {"methods": {"grad_diff": {"retain_weight": 2}, "kl_min": {}}, "epochs": 2}


def deltas_of(folder):
    """The base runs of a delta store by content address: their epochs' update vectors."""
    store = DeltaStore(folder)
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    runs = {key: store.find(manifest["inputs"]) for key, manifest in manifests.items()}
    return {key: [run.load(record["epoch"]) for record in run.epochs] for key, run in runs.items()}


def difference(update, other):
    squares = [(float((t - other.tensors[n]).norm()), float(t.norm())) for n, t in update.tensors.items()]
    return sum(d**2 for d, _ in squares) ** 0.5 / sum(s**2 for _, s in squares) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"rank": 4, "alpha": 8}], ids=["full", "lora"])
def test_a_study_trained_by_two_processes_has_the_base_runs_of_one(adapter, write_study, run_command, tmp_path):
    found = {}
    for count in (1, 2):
        changes = {
            "unlearning": {**RUNS, "adapter": adapter},
            "resources": {"base_run": {"processes": count}},
            "cache": {"deltas": str(tmp_path / f"deltas-{count}")},
            "search": {"trials": 2},
        }
        study, out = write_study(tmp_path / f"{count}.yaml", **changes), tmp_path / f"out-{count}"
        summary = json.loads(run_command("run", study, "--out", out, "--json"))
        assert summary["trials"]["complete"] == 4 + 2 and summary["trials"]["failed"] == 0
        found[count] = deltas_of(tmp_path / f"deltas-{count}")
    # The same addresses: the number of processes is no input of a base run.
    assert found[1].keys() == found[2].keys() and len(found[1]) == 2
    for key, updates in found[1].items():
        for update, other in zip(updates, found[2][key], strict=True):
            assert update.tensors.keys() == other.tensors.keys()
            assert difference(update, other) < 1e-4
    notes = [path for path in (tmp_path / "out-2" / "ray").glob("train-*/**/*") if path.is_file()]
    assert all(path.stat().st_size < 100_000 and path.suffix != ".safetensors" for path in notes)


@pytest.mark.slow
def test_a_run_that_diverges_in_two_processes_says_so_and_is_not_trained_again(write_study, launch, tmp_path):
    methods = {"unlearning": {**RUNS, "learning_rate": 1e30, "methods": {"grad_ascent": {}}}}
    study = write_study(tmp_path / "study.yaml", **methods, resources=PROCESSES)
    driver = launch("run", study, "--out", tmp_path / "out")
    assert driver.wait(300) == 2
    assert "grad_ascent: grad_ascent with learning rate 1e+30 diverged in epoch 1" in driver.stderr
    assert "Traceback" not in driver.stderr
    assert len(list((tmp_path / "out" / "ray").glob("train-*"))) == 1


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_trained_anew(write_study, launch, living_processes, tmp_path):
    changes = {"unlearning": {**RUNS, "epochs": 40, "methods": {"grad_ascent": {}}, "learning_rate": 1e-5}}
    changes |= {"resources": PROCESSES, "cache": {"deltas": str(tmp_path / "deltas")}, "search": {"trials": 1}}
    driver = launch("run", write_study(tmp_path / "study.yaml", **changes), "--out", tmp_path / "out")
    until = time.monotonic() + 200
    while "unlearning: grad_ascent" not in driver.stderr:
        assert time.monotonic() < until and driver.process.poll() is None, driver.stderr
        time.sleep(0.2)
    trainers = [pid for pid, command in living_processes(driver.tag).items() if "RayTrainWorker" in command]
    assert len(trainers) == 2
    os.kill(trainers[0], signal.SIGKILL)
    assert driver.wait(300) == 0, driver.stderr
    assert [len(updates) for updates in deltas_of(tmp_path / "deltas").values()] == [40]


@pytest.mark.slow
def test_more_processes_than_the_machine_holds_are_refused(write_study, launch, tmp_path):
    study = write_study(tmp_path / "study.yaml", resources={"base_run": {"processes": 1000}})
    driver = launch("run", study, "--out", tmp_path / "out")
    assert driver.wait(120) == 2
    assert "resources.base_run.processes: 1000 processes train together, but this cluster has room for" in driver.stderr
