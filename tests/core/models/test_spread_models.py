"""Models spread over devices by accelerate: here over the CPU alone, with the hooks that carry activations between GPUs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel, load_model
from uipe_core.scoring.scorer import Scorer, ScoringConfig
from uipe_core.unlearning.training import AdapterConfig, UnlearningConfig, train_base_run

PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def spread(loaded):
    """The model with a hook on every part that moves what comes in to the part's device."""
    model = dispatch_model(loaded.model, device_map=PARTS, main_device="cpu", force_hooks=True)
    assert all(hasattr(model.get_submodule(part), "_hf_hook") for part in PARTS)
    return replace(loaded, model=model)


@pytest.fixture
def scorer(load_tiny, world):
    return Scorer(world, load_tiny().prompts, ScoringConfig(batch_size=16, generation_length=5))


@pytest.mark.parametrize("adapter", [None, AdapterConfig(2, 4.0, ("q_proj", "v_proj"))], ids=["full", "lora"])
def test_a_spread_model_walks_and_scores_as_a_whole_one(adapter, load_tiny, world, scorer):
    settings = UnlearningConfig("grad_ascent", {}, epochs=1, learning_rate=1e-2, adapter=adapter)
    (result,) = train_base_run(load_tiny(), world, settings)
    found = []
    for loaded in (load_tiny(), spread(load_tiny())):
        walker = Extrapolator(loaded.model)
        walked = scorer.score(replace(loaded, model=walker.apply(result.update, 0.5)))
        back = scorer.score(replace(loaded, model=walker.reset()))
        found.append((walked.arrays(), back.arrays()))
    for whole, parts in zip(*found, strict=True):
        assert whole.keys() == parts.keys()
        assert all(np.array_equal(whole[name], parts[name], equal_nan=whole[name].dtype.kind == "f") for name in whole)
    assert not np.array_equal(found[0][0]["forget/answer_loss"], found[0][1]["forget/answer_loss"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs they are used")
@pytest.mark.parametrize("device_map", [PARTS, "auto"], ids=["parts", "auto"])
def test_a_map_of_devices_that_is_the_cpu_loads_what_loading_there_does(device_map, tiny_folder, load_tiny):
    loaded = load_model(str(tiny_folder), device_map=device_map)
    assert loaded.device == torch.device("cpu")
    plain = load_tiny().model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.model.state_dict().items())


def test_inputs_go_where_the_embeddings_are(load_tiny):
    loaded = load_tiny()
    loaded.model.lm_head = nn.Linear(32, 7, device="meta")
    assert LoadedModel(loaded.model, loaded.tokenizer, loaded.prompts).device.type == "cpu"
    loaded.model.set_input_embeddings(nn.Embedding(7, 32, device="meta"))
    assert loaded.device.type == "meta"


def test_a_model_that_its_devices_cannot_hold_is_refused(tiny_folder):
    # On the disk a weight is read anew for every pass, so that what is written into it is lost.
    with pytest.raises(UserError, match=r"does not fit into its \d+ GPUs; raise resources.trial.gpus"):
        load_model(str(tiny_folder), device_map={**PARTS, "model.layers.0": "disk"})
