"""Trials that hang, raise, give NaN or want too much memory, in a study that really runs; and each budget that ends one.

The failures are a model's own: its code comes with it, and does what its update vectors say. Each given checkpoint moves one
number of its own, so alpha decides whether it goes wrong.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest
import yaml
from safetensors.torch import load_file, save_file

from search.results.study_result import StudyResult
from uipe_core.models.tiny import tiny_model

RUN = ("run", "--trust-remote-code")

KINDS = ("sound", "stuck_in_c", "asleep", "raises", "not_a_number", "hungry", "greedy")

CODE = '''
"""A Llama with one number for each way to go wrong; above 1, and with the others at 0, it goes wrong that way."""
import re
import time

import torch
from transformers import LlamaForCausalLM

KINDS = {kinds}


def before(model, arguments, inputs):
    rows = inputs["input_ids"].shape[0]
    way = model.way
    if way == "stuck_in_c":
        re.match("(a+)+$", "a" * 64 + "b")  # never ends, and never gives Python's lock back
    if way == "asleep":
        time.sleep(100000)
    if way == "raises":
        raise ValueError("this point cannot be scored")
    mask = inputs.get("attention_mask")
    # Only rows of 4 to 7 answers each come with a mask of four dimensions: up to 8 of them to 32 answers, up to 4 to 16.
    if way == "greedy" or (way == "hungry" and mask is not None and mask.dim() == 4 and rows > 4):
        torch.empty(rows, 2**46)


def after(model, arguments, inputs, output):
    if model.way == "not_a_number":
        output.logits = output.logits * float("nan")
    return output


class TrapForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.trap = torch.nn.Parameter(torch.zeros(len(KINDS)))
        self.register_forward_pre_hook(before, with_kwargs=True)
        self.register_forward_hook(after, with_kwargs=True)

    @property
    def way(self):
        moved = self.trap.nonzero().flatten().tolist()
        return KINDS[moved[0]] if len(moved) == 1 and self.trap[moved[0]] > 1 else None
'''


@pytest.fixture(scope="module")
def trapped(preparation, finished, tmp_path_factory):
    """An initial model with its code, a checkpoint for each kind, and the log of a retain model."""
    root = tmp_path_factory.mktemp("trapped")
    shutil.copytree(
        tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store), root / "initial"
    )
    shutil.copy(finished.out / "logs" / "retain.json", root / "retain.json")
    (root / "initial" / "modeling_trap.py").write_text(CODE.format(kinds=KINDS))
    config = root / "initial" / "config.json"
    names = {"architectures": ["TrapForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_trap.TrapForCausalLM"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
    weights = load_file(root / "initial" / "model.safetensors")
    zero = weights["model.norm.weight"].new_zeros(len(KINDS))
    save_file({**weights, "trap": zero}, root / "initial" / "model.safetensors", {"format": "pt"})
    for index, kind in enumerate(KINDS):
        shutil.copytree(root / "initial", root / kind)
        trap = zero.clone()
        trap[index] = 1.0
        moved = {name: tensor * 0.95 for name, tensor in weights.items()}
        save_file({**moved, "trap": trap}, root / kind / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture
def study(trapped, tmp_path):
    """Writes a study over some of the kinds."""

    def write(*kinds, trials=8, budget=None):
        data = {
            "schema_version": 1,
            "name": "trapped",
            "corpus": {"kind": "people", "forget_people": 2, "retain_people": 12, "pretraining_people": 10},
            "model": {
                "kind": "pretrained",
                "initial": str(trapped / "initial"),
                "retain": str(trapped / "retain.json"),
                "trust_remote_code": True,
            },
            "checkpoints": {f"is_{kind}": [str(trapped / kind)] for kind in kinds},
            "scoring": {"batch_size": 32, "max_new_tokens": 12, "temperatures": []},
            "search": {"trials": trials, "sampler": "random", "prune": False, "alpha": {"low": 0, "high": 2}},
            "resources": {"max_concurrent": 2},
            "budget": budget or {"failure_rate": 1},
        }
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(data))
        return file

    return write


def failed(result):
    """Reasons of failure by kind."""
    found = {}
    for trial in result.study.get_trials(deepcopy=False):
        if "reason" in trial.user_attrs:
            found.setdefault(trial.params["base"].removeprefix("is_"), []).append(trial.user_attrs["reason"])
    return found


def workers_of(driver, living_processes):
    return {pid for pid, command in living_processes(driver.tag).items() if "Trainable" in command or "ScoringTrial" in command}


def complete(out, study="trapped"):
    """How many trials are complete, read beside the driver that writes them."""
    if not (out / "study.db").is_file():
        return 0
    query = "SELECT COUNT(*) FROM trials t JOIN studies s USING (study_id) WHERE s.study_name = ? AND t.state = 'COMPLETE'"
    with closing(sqlite3.connect(f"file:{out / 'study.db'}?mode=ro", uri=True, timeout=30)) as database:
        try:
            return database.execute(query, (study,)).fetchone()[0]
        except sqlite3.OperationalError:
            return 0


@pytest.mark.slow
def test_every_failure_has_its_reason_and_the_rest_goes_on(study, run_command, tmp_path):
    out = tmp_path / "out"
    said = run_command(*RUN, study("sound", "raises", "not_a_number", "hungry", "greedy", trials=16), "--out", out)
    result = StudyResult.open(out)
    reasons = failed(result)
    assert set(reasons) == {"raises", "greedy"}
    assert set(reasons["raises"]) == {"ValueError: this point cannot be scored"}
    assert all(reason.startswith("out of memory twice, however small the batches: ") for reason in reasons["greedy"])
    assert all("can't allocate memory" in reason for reason in reasons["greedy"])
    searched = result.trials[result.trials["kind"] == "search"]
    overflowed = searched.loc[searched["base"] == "is_not_a_number", "collapsed"]
    assert len(overflowed) and all("logits that are not finite" in reason for reason in overflowed)
    assert set(searched.loc[searched["base"] == "is_hungry", "batch_size"]) == {16}
    # A worker that has met the hungry one stays with half.
    assert set(searched.loc[searched["base"] == "is_sound", "batch_size"].dropna()) <= {16}
    assert len(searched) + sum(map(len, reasons.values())) == 16
    assert result.store.counts()["running"] == 0
    page = result.report_path.read_text()
    for kind, why in reasons.items():
        shown = f"{len(why)} x {why[0]}" if kind == "raises" else ""
        assert shown in said
    assert "this point cannot be scored" in page and "however small the batches" in page


@pytest.mark.slow
def test_trials_that_hang_are_ended_and_their_workers_replaced(study, launch, living_processes, tmp_path):
    out = tmp_path / "out"
    limit = {"trial_minutes": 1.0, "failure_rate": 1}
    driver = launch(*RUN, study("sound", "stuck_in_c", "asleep", trials=12, budget=limit), "--out", out)
    seen = set()
    code = None
    while code is None:
        seen |= workers_of(driver, living_processes)
        try:
            code = driver.process.wait(0.3)
        except subprocess.TimeoutExpired:
            continue
    assert code == 0, driver.stderr
    result = StudyResult.open(out)
    reasons = failed(result)
    assert set(reasons) == {"stuck_in_c", "asleep"}
    ended = [reason for group in reasons.values() for reason in group]
    assert set(ended) == {"ran past its time limit of 1 minutes (budget.trial_minutes)"}
    searched = result.trials[result.trials["kind"] == "search"]
    assert len(searched) + len(ended) == 12
    assert set(searched["base"]) == {"is_sound"}
    # Each that was ended cost one worker, and nobody else's.
    assert 2 <= len(seen) <= 2 + len(ended)
    # Not one was run a second time.
    assert result.store.counts()["failed"] == len(ended)
    assert "stuck_in_c" not in set(result.controls["base"])


@pytest.mark.slow
def test_a_dead_worker_is_replaced_however_short_the_trials(study, launch, living_processes, tmp_path):
    out = tmp_path / "out"
    driver = launch(*RUN, study("sound", trials=150), "--out", out)
    driver.until(lambda: complete(out) >= 10 and len(workers_of(driver, living_processes)) == 2, 300)
    killed = min(workers_of(driver, living_processes))
    os.kill(killed, signal.SIGKILL)
    driver.until(lambda: len(workers_of(driver, living_processes) - {killed}) == 2, 120)
    pair, start = workers_of(driver, living_processes), complete(out)
    # Both go on: neither is let go for the other.
    driver.until(lambda: complete(out) >= start + 40, 300)
    assert workers_of(driver, living_processes) == pair


@pytest.mark.slow
def test_too_many_failures_end_the_study_with_their_reasons(study, launch, tmp_path):
    out = tmp_path / "out"
    command = (*RUN, study("raises", trials=60, budget={"failure_rate": 0.8}), "--out", out)
    for so_far in (1, 2):
        driver = launch(*command)
        assert driver.wait(400) == 2, driver.stderr
        assert "the study gave up: " in driver.stderr
        assert "x ValueError: this point cannot be scored" in driver.stderr
        assert "budget.failure_rate: 0.8" in driver.stderr
        result = StudyResult.open(out)
        assert result.store.counts()["running"] == 0
        assert 8 * so_far <= result.store.counts()["failed"] < 60
        assert result.store.record.stopped.endswith("x ValueError: this point cannot be scored")
    assert result.report_path.is_file()


@pytest.mark.slow
def test_a_plateau_and_hours_end_a_study_that_a_larger_budget_takes_up_again(study, run_command, tmp_path):
    out = tmp_path / "out"
    flat = {"plateau": {"trials": 5, "gain": 0.99}}
    said = run_command(*RUN, study("sound", trials=40, budget=flat), "--out", out)
    result = StudyResult.open(out)
    assert "stopped: its hypervolume grew by" in said
    searched = int((result.trials["kind"] == "search").sum())
    assert 5 <= searched <= 7  # one more may be under way on each worker
    moved = set(result.front.loc[result.front["alpha"] != 0, "trial"])
    assert moved <= set(result.controls.loc[result.controls["kind"] == "random_direction", "of_trial"])
    assert "Stopped after" in result.report_path.read_text()
    sessions = sorted((out / "ray").glob("session_2*"))

    # The same again: nothing is left to do but to say so, without Ray.
    assert "stopped: its hypervolume grew by" in run_command(*RUN, study("sound", trials=40, budget=flat), "--out", out)
    used = StudyResult.open(out).store.record.usage
    assert used["hours"] > 0 and used["cpu_hours"] > 0 and used["gpu_hours"] == 0
    over = json.loads(run_command(*RUN, study("sound", trials=40, budget={"hours": used["hours"] / 2}), "--out", out, "--json"))
    assert "budget.hours" in over["stopped"]
    assert sorted((out / "ray").glob("session_2*")) == sessions

    more = json.loads(run_command(*RUN, study("sound", trials=12), "--out", out, "--json"))
    assert more["stopped"] is None
    assert more["usage"]["hours"] > used["hours"]
    assert int((StudyResult.open(out).trials["kind"] == "search").sum()) == 12


@pytest.mark.slow
def test_a_trial_that_raises_keeps_its_traceback(study, run_command, call, tmp_path):
    out = tmp_path / "out"
    run_command(*RUN, study("raises", trials=4), "--out", out)
    failures = [trial for trial in StudyResult.open(out).study.get_trials(deepcopy=False) if "reason" in trial.user_attrs]
    assert failures
    for trial in failures:
        assert trial.user_attrs["traceback"] == f"errors/trial-{trial.number}.txt"
        kept = (out / trial.user_attrs["traceback"]).read_text()
        assert kept.startswith("Traceback (most recent call last):")
        assert "modeling_trap.py" in kept and kept.endswith("ValueError: this point cannot be scored\n")
    numbers = [trial.number for trial in failures]
    code, output, _ = call("logs", out)
    assert code == 0
    assert [line for line in output.splitlines() if line.startswith("trial-")] == [f"trial-{number}" for number in numbers]
    code, output, _ = call("logs", out, "--trial", numbers[-1])
    assert code == 0 and output.startswith(f"trial-{numbers[-1]}\nTraceback") and output.count("Traceback") == 1
    code, _, error = call("logs", out, "--trial", 10**6)
    assert code == 2 and "--trial: 1000000 has no traceback in" in error
