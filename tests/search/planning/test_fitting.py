"""Which of several ways to run a study fits on a machine, by sizes alone."""

import pytest
import torch

from search.planning.fitting import first_fitting
from search.planning.quantities import GB, Machine
from search.spec.study import parse_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of about 100 million parameters: its configuration is all that is there."""
    from transformers import LlamaConfig

    place = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = LlamaConfig(**shape, vocab_size=8000, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(place)
    return str(place)


def machine(memory, gpus=(), disk=1000):
    return Machine(2, round(memory * GB), 0, tuple(round(each * GB) for each in gpus), disk * GB, disk * GB, True)


def study(folder, adapter, **holds):
    data = {
        "schema_version": 1,
        "name": "fit",
        "corpus": {"kind": "questions", "forget": "a/b", "retain": "a/c"},
        "model": {"kind": "pretrained", "initial": folder, "prompt_format": "chat"},
        "unlearning": {
            "methods": {"npo": {}, "grad_ascent": {}},
            "epochs": 2,
            "learning_rate": 1e-5,
            "adapter": {"rank": 8} if adapter else None,
        },
        "resources": {"trial": holds, "base_run": holds},
    }
    return parse_study(data)


def fitting(folder, place):
    holds = {"gpus": 1} if place.gpus else {}
    ways = [study(folder, False, cpus=1, **holds), study(folder, False, cpus=2, **holds), study(folder, True, **holds)]
    return first_fitting(ways, folder, place)


def test_all_weights_are_trained_where_they_fit(folder):
    assert fitting(folder, machine(20)) == (0, [])
    assert fitting(folder, machine(20, gpus=[4])) == (0, [])


def test_lora_takes_the_place_of_what_does_not_fit(folder):
    # 16 bytes a parameter for weights, gradients and moments, and a fifth of the memory is left to activations.
    assert fitting(folder, machine(20, gpus=[1]))[0] == 2
    assert fitting(folder, machine(1.5))[0] == 2


def test_fewer_at_once_come_before_lora(folder):
    # A base run takes 2.2 GB on the host: 16 bytes a parameter, the weights as stored, and an update vector.
    assert fitting(folder, machine(6))[0] == 0
    assert fitting(folder, machine(4)) == (1, [])


def test_what_fits_in_no_way_is_said(folder):
    number, misfits = fitting(folder, machine(20, gpus=[0.1]))
    assert number == 2 and misfits
    assert "GPU" in misfits[0].what and misfits[0].remedy
    number, misfits = fitting(folder, machine(20, disk=0))
    assert number == 2 and "update vectors need" in misfits[0].what
