"""Trials that raise, return NaN, hang or want too much memory, once, in the middle of a study; the same command mends it.

The failures are a model's own: its code comes with it and steps into a trap, a file, while the file is there.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from search.evaluation.prepared import prepare
from search.spec.study import load_study
from uipe_core.models.tiny import tiny_model

pytestmark = pytest.mark.faults

CODE = '''
"""A Llama that goes wrong in the way that the name of a file says."""
import os
import re
from pathlib import Path

import torch
from transformers import LlamaForCausalLM


def before(model, arguments, inputs):
    rows = inputs["input_ids"].shape[0]
    if sprung(model, "hungry", rows > 1) or trap("greedy").exists():
        torch.empty(rows, 2**46)
    if sprung(model, "raises"):
        raise ValueError("this point cannot be scored")
    if sprung(model, "hangs"):
        re.match("(a+)+$", "a" * 64 + "b")  # never ends, and never gives Python's lock back


def after(model, arguments, inputs, output):
    if sprung(model, "not a number"):
        output.logits = output.logits * float("nan")
    return output


def trap(name):
    return Path(os.environ.get("UIPE_TEST_TRAPS", "none"), name)


def sprung(model, name, wanted=True):
    """Whether this is the one who steps into a trap."""
    try:
        if wanted:
            trap(name).unlink()
        return wanted
    except FileNotFoundError:
        return False


class TrapForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_forward_pre_hook(before, with_kwargs=True)
        self.register_forward_hook(after, with_kwargs=True)
'''


@pytest.fixture(scope="session")
def trapped(undisturbed, grid_study, write_study, run_command, tmp_path_factory):
    """A grid study over given checkpoints of a model with such code, and its front and length when left in peace."""
    root = tmp_path_factory.mktemp("trapped")
    preparation = prepare(load_study(grid_study(root)))
    models = {
        role: tiny_model(preparation.models.config, preparation.corpus, role, preparation.models.store)
        for role in ("full", "retain")
    }
    full, retain = (load_file(folder / "model.safetensors") for folder in models.values())
    shares = {"initial": 0.0, "near": 0.4, "nearer": 0.7, "nearest": 1.0}
    for name, share in shares.items():
        shutil.copytree(models["full"], root / name)
        (root / name / "modeling_trap.py").write_text(CODE)
        config = root / name / "config.json"
        names = {"architectures": ["TrapForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_trap.TrapForCausalLM"}}
        config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
        weights = {key: tensor + share * (retain[key] - tensor) for key, tensor in full.items()}
        save_file(weights, root / name / "model.safetensors", {"format": "pt"})
    shutil.copytree(models["retain"], root / "retain")

    def write(folder):
        return write_study(
            folder / "trapped.yaml",
            name="trapped",
            model={
                "kind": "pretrained",
                "initial": str(root / "initial"),
                "retain": str(root / "retain"),
                "trust_remote_code": True,
            },
            unlearning=None,
            checkpoints={name: [str(root / name)] for name in list(shares)[1:]},
            scoring={"batch_size": 4},
            search={"sampler": "grid", "trials": 24, "alpha": {"low": -0.8, "high": 1.5}},
            budget={"failure_rate": 1, "trial_minutes": 0.5},
            cache={"deltas": str(folder / "deltas")},
        )

    return write


WAYS = {
    "raises": "ValueError: this point cannot be scored",
    "not a number": None,
    "hangs": "ran past its time limit of 0.5 minutes",
    "hungry": None,
    "greedy": "out of memory",
}


@pytest.mark.parametrize("way", WAYS)
def test_trial(watch, trapped, hold, tmp_path, way, repeat):
    study = watch(trapped)
    study.command = (*study.command, "--trust-remote-code")
    study.variables["UIPE_TEST_TRAPS"] = str(tmp_path)
    driver = study.start()
    wanted = study.random.randrange(8, 20)
    driver.until(lambda: study.complete() >= wanted)
    (tmp_path / way).touch()
    driver.until(lambda: study.failed() or not (tmp_path / way).exists())
    (tmp_path / way).unlink(missing_ok=True)
    study.finish(driver)
    study.look()
    why = study.reasons()
    if WAYS[way] is None:
        assert why == []
    else:
        assert why and all(WAYS[way] in reason for reason in why)
    study.finish(study.start())
    hold(f"a trial: {way}", study)
