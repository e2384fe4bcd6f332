"""A base run in several processes is that of one process: two real ones, over gloo on the CPU.

Run as a script this file is those processes: they start from one import of torch and go through all cases in turn.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from uipe_core.corpora.people import load_people
from uipe_core.corpora.types import Item
from uipe_core.deltas.files import save_update
from uipe_core.errors import UserError
from uipe_core.models.loading import load_model
from uipe_core.models.prompts import Example
from uipe_core.unlearning.distributed import Processes, current_processes
from uipe_core.unlearning.methods import METHODS, Shares
from uipe_core.unlearning.training import AdapterConfig, DivergedError, UnlearningConfig, train_base_run

LORA = AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "o_proj"))
SMALL = {
    "npo": {"retain_weight": 0.5},
    "simnpo": {"beta": 0.5, "retain_weight": 1},
    "rmu": {"layer": 1, "coefficient": 10, "retain_weight": 1},
}
"""Hyperparameters under which every term of a loss counts in a small model."""

CLIPPING = {"npo": 28.0, "idk_dpo": 35.0, "rmu": 2.3}
"""Between the norms of gradients (4.5 elsewhere): AdamW sees no scale common to all of them, clipping some of them does."""

TOLERANCE = 1e-5
"""Norm of the difference of two update vectors, relative to their own: gradients are summed, and rounded, in another order."""


COARSER = {
    "bf16 kl_min": 3e-2,
    **{f"{kind}{name}": 1e-4 for kind in ("", "lora ", "single items ") for name in ("ce_u", "undial")},
}
"""A frozen model in bf16 reads an item a little differently next to others: its rounding depends on how long the batch is. The
gradients of ce_u and undial are differences of two distributions that are nearly alike where an answer is unlikely already."""


def config(method, **changes):
    hyperparameters = {**METHODS[method].hyperparameters, **SMALL.get(method, {})}
    clipping = CLIPPING.get(method, 4.5) * (1.0 if changes.get("adapter") is None else 0.5)
    settings = UnlearningConfig(method, hyperparameters, epochs=2, learning_rate=1e-3, batch_size=5, max_grad_norm=clipping)
    return replace(settings, **changes)


CASES = {
    **{method: config(method) for method in METHODS},
    "lora grad_diff": config("grad_diff", adapter=LORA),
    "lora kl_min": config("kl_min", adapter=LORA),
}
SLOW_CASES = {
    **{f"lora {method}": config(method, adapter=LORA) for method in METHODS},
    **{f"single items {method}": config(method, batch_size=1, gradient_accumulation=4, epochs=1) for method in METHODS},
    "accumulation": config("idk_dpo", batch_size=3, gradient_accumulation=2),
    "checkpointing": config("kl_min", gradient_checkpointing=True),
    "checkpointing lora": config("npo", gradient_checkpointing=True, adapter=LORA),
    "clipped": config("grad_ascent", max_grad_norm=1e-3, schedule="linear", epochs=3),
    "rmu alone": config("rmu", hyperparameters={"layer": 1, "coefficient": 10, "retain_weight": 0}),
    "bf16 npo": config("npo"),
    "bf16 kl_min": config("kl_min"),
}


def small_world():
    """13 items to forget: with batches of 5 every last batch is shorter and no batch is dealt evenly."""
    people = load_people(seed=0, forget_people=2, retain_people=12, pretraining_people=10)
    chosen = people.forget_train[:13]
    return replace(people, forget_train=chosen, alternates=tuple((chosen[place - 1].answer,) for place in range(13)))


def train(model_folder, name, settings):
    """The epochs of a case and the model they were trained on."""
    loaded = load_model(str(model_folder), device="cpu", dtype="bfloat16" if name.startswith("bf16") else "auto")
    return loaded.model, train_base_run(loaded, small_world(), settings)


# What each of several processes does


def write_cases(rank, model_folder, out, cases):
    """Trains every case; the first process saves its update vectors, each one notes its losses."""
    losses = {}
    for name, settings in cases.items():
        model, epochs = train(model_folder, name, settings)
        losses[name] = []
        for result in epochs:
            losses[name].append(result.loss)
            if rank == 0:
                save_update(result.update, out / f"{name} {result.epoch}.safetensors")
            else:
                assert not result.update.tensors
        if name == "kl_min":
            # What is saved and what was trained are the same bits.
            trained = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
            initial = dict(load_model(str(model_folder), device="cpu").model.named_parameters())
            for weight, delta in result.update.tensors.items():
                assert torch.equal(trained[weight], initial[weight] + delta), weight
    return losses


def refusals(model_folder):
    """How runs end that have to fail, in this process."""
    seen = {}
    for name, settings in {
        "diverged": config("grad_ascent", learning_rate=1e30),
        "diverged lora": config("grad_ascent", learning_rate=1e30, adapter=LORA),
        "no layer": config("rmu", hyperparameters={"layer": 7}),
    }.items():
        try:
            list(train(model_folder, name, settings)[1])
        except (DivergedError, UserError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen


def led(processes):
    """What is left of three steps: with a first process that takes them, and with one that does without."""
    outcomes = []
    for take in (list, lambda _: "found"):
        taken = []
        steps = (taken.append(step) or step for step in range(3))
        outcomes.append([processes.run_on_first(steps, take), taken])
    return outcomes


def be_process(rank, count, model_folder, out, cases):
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)})
    distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=count)
    seen = {"losses": write_cases(rank, model_folder, out, cases)}
    seen |= {"refused": refusals(model_folder), "led": led(current_processes()), "threads": torch.get_num_threads()}
    (out / f"rank-{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


# The tests


@pytest.fixture(scope="module")
def model_folder(tiny_folder, tmp_path_factory):
    """A model of three layers with tied embeddings and an odd number of words, so that no shards are even."""
    tokenizer = load_model(str(tiny_folder), device="cpu").tokenizer
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 25, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.2, **shape))
    folder = tmp_path_factory.mktemp("three layers")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_processes(count, model_folder, out, which):
    """Runs the cases in so many processes and returns what each of them saw."""
    command = [sys.executable, __file__, str(count), str(model_folder), str(out), which]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def two(model_folder, tmp_path_factory):
    """What two processes saw, and where the first one saved its update vectors."""
    out = tmp_path_factory.mktemp("two processes")
    return in_processes(2, model_folder, out, "CASES"), out


def assert_same(name, settings, seen, out, model_folder):
    for losses in seen:
        assert losses["losses"][name] == seen[0]["losses"][name]
    for result in train(model_folder, name, settings)[1]:
        shared = load_file(out / f"{name} {result.epoch}.safetensors")
        assert shared.keys() == result.update.tensors.keys()
        squares = [(float((shared[n] - t).norm()), float(t.norm())) for n, t in result.update.tensors.items()]
        difference = sum(d**2 for d, _ in squares) ** 0.5 / sum(s**2 for _, s in squares) ** 0.5
        print(f"{name}, epoch {result.epoch}: {difference:.1e}")
        assert difference < COARSER.get(name, TOLERANCE), (name, result.epoch)
        assert seen[0]["losses"][name][result.epoch - 1] == pytest.approx(result.loss, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_update_vectors_of_one(name, two, model_folder):
    assert_same(name, CASES[name], *two, model_folder)


@pytest.mark.slow
def test_settings_change_nothing_about_that_nor_do_three_processes(model_folder, tmp_path):
    for count in (2, 3):
        out = tmp_path / str(count)
        out.mkdir()
        seen = in_processes(count, model_folder, out, "SLOW_CASES")
        for name, settings in SLOW_CASES.items():
            assert_same(name, settings, seen, out, model_folder)


def test_every_process_ends_a_failing_run_with_its_reason(two):
    seen, _ = two
    assert seen[0]["refused"] == seen[1]["refused"]
    refused = seen[0]["refused"]
    assert refused["diverged"].startswith("DivergedError: grad_ascent with learning rate 1e+30 diverged in epoch")
    assert refused["diverged lora"].startswith("DivergedError: grad_ascent with learning rate 1e+30 diverged in epoch")
    assert refused["no layer"].startswith("UserError: unlearning.methods.rmu.layer: found 7, but the model has 3")


def test_processes_take_steps_together_or_not_at_all(two):
    (first, second), _ = two
    assert first["led"] == [[[0, 1, 2], [0, 1, 2]], ["found", []]]
    assert second["led"] == [[None, [0, 1, 2]], [None, []]]


def test_threads_are_left_as_they_were_set(two):
    assert [seen["threads"] for seen in two[0]] == [1, 1]


def examples(*lengths):
    return [Example(tuple(range(3 + length)), 3) for length in lengths]


def test_a_batch_is_dealt_whole_and_its_shares_add_up():
    forget, retain = examples(1, 2, 3, 4, 5), examples(2, 2, 2, 2, 7)
    refusals = examples(1, 1, 1, 1, 4)
    dealt = [Processes(2, rank).split_batch(forget, retain, refusals) for rank in range(2)]
    assert [positions for positions, _ in dealt] == [[0, 1], [2, 3, 4]]
    assert [shares for _, shares in dealt] == [Shares(2 / 5, 3 / 15, 4 / 15, 2 / 8), Shares(3 / 5, 12 / 15, 11 / 15, 6 / 8)]


def test_a_process_without_an_item_reads_one_to_no_effect():
    dealt = [Processes(3, rank).split_batch(examples(4), [], []) for rank in range(3)]
    assert sorted(dealt, key=lambda deal: deal[1].items) == [([0], Shares(0, 0, 0, 0))] * 2 + [([0], Shares())]


def test_alone_a_process_reads_everything():
    assert current_processes() == Processes()
    assert Processes().split_batch(examples(1, 2), examples(3, 4), []) == ([0, 1], Shares())
    assert Processes().run_on_first(iter([1, 2]), list) == [1, 2]


def test_the_cases_read_batches_that_are_not_even():
    world = small_world()
    assert len(world.forget_train) == 13 and all(isinstance(item, Item) for item in world.forget_train)
    assert {settings.batch_size for settings in CASES.values()} == {5}


if __name__ == "__main__":
    processes, folder, target = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    chosen = globals()[sys.argv[4]]
    forked = torch.multiprocessing.get_context("fork")
    running = [
        forked.Process(target=be_process, args=(number, processes, folder, target, chosen)) for number in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in running))
