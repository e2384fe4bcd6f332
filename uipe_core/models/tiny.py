"""Build and train small Llamas with their own tokenizers, cached by content."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from uipe_core.corpora.types import Corpus, ItemSet
from uipe_core.models.likelihood import mean_answer_nll
from uipe_core.models.loading import Progress, load_model
from uipe_core.models.prompts import PromptFormat, pad_batch
from uipe_core.storage.content_store import ContentStore

TINY_SCHEMA = 2
"""Raised with every change in this file that alters the tiny models, so that older cached ones are not reused."""

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
"""Prompts of tiny models end in a newline, so that prompt and answer never tokenize together."""


@dataclass(frozen=True)
class Stage:
    """Training stage of a tiny model: passes over its texts, peak learning rate, sequences per step."""

    epochs: int
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class TinyModelConfig:
    """Shape and training of a small Llama.

    Attributes:
        tokenizer: ``word`` (one token per word of the corpus) or ``bpe`` (byte-level, trained on the corpus).
        vocab_size: Entries of the BPE vocabulary; None for ``word``.
        hidden_size, layers, heads: Shape; the feed-forward width is 8/3 of `hidden_size`, as in Llama.
        base: Stage before fine-tuning; None for corpora without base texts.
        finetune: Stage of the full (initial) and of the retain model.
        seed: Seed of initial weights and order of training texts.
        finetune_seed: Seed of fine-tuning; None is `seed`.
        extra_texts: Further texts for the vocabulary, which the model is not trained on.
    """

    tokenizer: str
    vocab_size: int | None
    hidden_size: int
    layers: int
    heads: int
    base: Stage | None
    finetune: Stage
    seed: int
    finetune_seed: int | None = None
    extra_texts: tuple[str, ...] = ()


def tiny_model_inputs(config: TinyModelConfig, corpus: Corpus, stage: str) -> dict[str, Any]:
    """Return everything that determines a tiny model: the inputs of its cache key."""
    settings = asdict(config)
    if not config.extra_texts:
        del settings["extra_texts"]  # keys without extra texts are older than the setting
    return {"kind": "tiny-llama", "schema": TINY_SCHEMA, "config": settings, "corpus": corpus.hash, "stage": stage}


def tiny_model(
    config: TinyModelConfig, corpus: Corpus, stage: str, store: ContentStore, progress: Progress | None = None
) -> Path:
    """Return the folder of the tiny model of a stage (``base``, ``full`` or ``retain``), trained if it is not cached.

    ``full`` and ``retain`` are fine-tuned from ``base`` if the configuration has one, else trained from scratch.
    """

    def make(folder: Path) -> None:
        start = None
        if stage != "base" and config.base is not None:
            start = tiny_model(replace(config, finetune_seed=None), corpus, "base", store)
        _train_tiny(config, corpus, stage, start, folder, progress)

    return store.get_or_make(tiny_model_inputs(config, corpus, stage), make)


def _train_tiny(
    config: TinyModelConfig, corpus: Corpus, stage: str, start: Path | None, folder: Path, progress: Progress | None
) -> None:
    seed = config.seed if config.finetune_seed is None else config.finetune_seed
    if start is not None:
        loaded = load_model(str(start), device="cpu")
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, tokenizer = _new_model(config, corpus)
    settings = config.base if stage == "base" and config.base is not None else config.finetune
    _fit_answers(model, PromptFormat(tokenizer), corpus.build[stage], settings, seed, progress)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_skeleton(config: TinyModelConfig, corpus: Corpus) -> Any:
    """Return the small model on torch's meta device, without weights."""
    with torch.device("meta"):
        return _new_model(config, corpus)[0]


def _new_model(config: TinyModelConfig, corpus: Corpus) -> tuple[Any, Any]:
    """Return the small model with random weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = _texts(corpus, config.extra_texts)
    tokenizer = _word_tokenizer(texts) if config.tokenizer == "word" else _bpe_tokenizer(texts, config.vocab_size)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * round(2 * config.hidden_size / 3),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, tokenizer


def _fit_answers(model: Any, prompts: PromptFormat, items: ItemSet, stage: Stage, seed: int, progress: Progress | None) -> None:
    """Train on answer tokens: AdamW, short linear warm-up, cosine decay, gradient clipping."""
    from transformers import get_cosine_schedule_with_warmup

    examples = [prompts.encode_item(item) for item in items]
    generator = torch.Generator().manual_seed(seed)
    steps = stage.epochs * -(-len(examples) // stage.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=max(1, steps // 20), num_training_steps=steps)
    model.train()
    done = 0
    for _ in range(stage.epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), stage.batch_size):
            batch = pad_batch([examples[i] for i in order[start : start + stage.batch_size]], prompts.pad_id)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = mean_answer_nll(logits, batch.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            if progress is not None:
                progress(done, steps)


def _texts(corpus: Corpus, extra: Iterable[str]) -> Iterator[str]:
    """Yield every text a model of this corpus may read or write, questions with a newline as in prompts."""
    # Not those of implied sets: the vocabulary must follow from what the model's key is made of.
    groups = [*corpus.build.values(), *(items for name, items in corpus.sets.items() if name not in corpus.implied)]
    for item in (item for group in groups for item in group):
        yield item.question + "\n"
        yield item.answer
        yield item.paraphrase
        yield from item.perturbed_answers
    yield from extra


def _word_tokenizer(texts: Iterator[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=_SPECIAL, show_progress=False))
    return _finish_tokenizer(tokenizer)


def _bpe_tokenizer(texts: Iterator[str], vocab_size: int | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or 3000,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish_tokenizer(tokenizer)


_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def _finish_tokenizer(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    pad, unk, bos, eos = _SPECIAL
    finished = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unk, bos_token=bos, eos_token=eos)
    finished.chat_template = CHAT_TEMPLATE
    return finished
