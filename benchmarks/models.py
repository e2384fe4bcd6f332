"""The models benchmarks run on: a small Llama that is really trained, random ones of larger models' shapes, one's own."""

import argparse
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import Corpus
from uipe_core.models.loading import DTYPES, LoadedModel, load_model
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import cache_folder

SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "100m": (768, 2048, 10, 12, 12, 32000),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
"""Shapes of Llamas with random weights: a small one, Llama-3.2-1B's, Llama-2-7b's."""

SMALL = TinyModelConfig(
    tokenizer="word",
    vocab_size=None,
    hidden_size=64,
    layers=2,
    heads=4,
    base=Stage(epochs=12, learning_rate=0.005, batch_size=64),
    finetune=Stage(epochs=15, learning_rate=0.003, batch_size=32),
    seed=0,
)
"""The quickstart's model."""


def small(corpus: Corpus, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """The small Llama, trained on a corpus unless the cache has it."""
    config = SMALL if corpus.build.get("base") else replace(SMALL, base=None)
    folder = tiny_model(config, corpus, "full", ContentStore(cache_folder("models")))
    return load_model(str(folder), dtype=dtype, device=device)


def random_llama(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of a name in `SHAPES` with random weights, made where it is used: 7B would take minutes on a CPU."""
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Return what is scored, by what, and how: what `prepared` goes by."""
    parser.add_argument("--tofu", help="folder or hub name of TOFU; the people corpus when left out")
    parser.add_argument(
        "--model", help=f"folder or hub name, or {', '.join(SHAPES)}: random weights; a small Llama trained here when left out"
    )
    parser.add_argument("--prompt-template", default="Question: {question}\nAnswer: ")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, help="of the scorer; found by itself when left out")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)


def prepared(options: argparse.Namespace) -> tuple[LoadedModel, Corpus]:
    """The model and the corpus that were asked for."""
    torch.set_num_threads(options.threads)
    corpus = load_people() if options.tofu is None else load_tofu(options.tofu)
    return _loaded(options, corpus), corpus


def _loaded(options: argparse.Namespace, corpus: Corpus) -> LoadedModel:
    """A random model of some shape has the small one's tokenizer."""
    if options.model is None:
        return small(corpus, options.dtype, options.device)
    if options.model not in SHAPES:
        return load_model(options.model, dtype=options.dtype, device=options.device, prompt_template=options.prompt_template)
    loaded = small(corpus, device=options.device)
    usual = "bfloat16" if loaded.device.type == "cuda" else "float32"
    dtype = DTYPES[usual if options.dtype == "auto" else options.dtype]
    loaded.model = random_llama(options.model, loaded.device, dtype)
    return loaded
