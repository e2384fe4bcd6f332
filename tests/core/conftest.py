"""A very small world and models really trained on it, shared by the tests of the science."""

import pytest

from uipe_core.corpora.people import load_people
from uipe_core.corpora.types import REFUSALS
from uipe_core.models.loading import load_model
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model
from uipe_core.storage.content_store import ContentStore

TINY = TinyModelConfig(
    tokenizer="word",
    vocab_size=None,
    hidden_size=32,
    layers=1,
    heads=2,
    base=Stage(epochs=4, learning_rate=1e-2, batch_size=32),
    finetune=Stage(epochs=12, learning_rate=1e-2, batch_size=16),
    seed=0,
    extra_texts=REFUSALS,
)


@pytest.fixture(scope="session")
def world():
    return load_people(seed=0, forget_people=2, retain_people=12, pretraining_people=10)


@pytest.fixture(scope="session")
def tiny_folder(world, tmp_path_factory):
    """Folder of the small model that knows everything."""
    return tiny_model(TINY, world, "full", ContentStore(tmp_path_factory.mktemp("models")))


@pytest.fixture
def load_tiny(tiny_folder):
    """Loads a fresh copy of that model."""

    def load(dtype="auto"):
        return load_model(str(tiny_folder), device="cpu", dtype=dtype)

    return load
