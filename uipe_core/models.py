"""Causal language models: loaded by name or folder, or small ones built and trained here."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from uipe_core.content_store import ContentStore, file_hash
from uipe_core.corpora.types import Corpus, ItemSet
from uipe_core.errors import UserError
from uipe_core.losses import mean_answer_nll
from uipe_core.prompts import PromptFormat, pad_batch

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

TINY_SCHEMA = 1
"""Raised whenever a change in this file alters the tiny models it builds, so that cached ones are not taken for new."""

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
"""Prompts of tiny models end in a newline, so that prompt and answer never tokenize together."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """A model ready to score or train, with its tokenizer and prompt format."""

    model: Any
    tokenizer: Any
    prompts: PromptFormat

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        UserError: If it is no device's name, or a CUDA device is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise UserError(f"model.device: {name!r} asked for, but this process sees {seen} CUDA devices; use auto or cpu")
    return device


def set_threads(threads: int) -> None:
    """Sets torch's threads for this process. Small models want 1 per worker: two under contention were 5 times slower."""
    torch.set_num_threads(threads)


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    prompt_template: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a causal language model and its tokenizer from the hub or a folder.

    Args:
        source: Hub name or folder.
        revision: Branch, tag or commit on the hub.
        dtype: ``auto`` (as stored) or a key of `DTYPES`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        prompt_template: Text with ``{question}``; None for the tokenizer's chat template.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        UserError: If it cannot be found or read, lacks weights, or no prompt format is known.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    where = resolve_device(device)
    place = str(_local_folder(source) or source)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
        model, loading = AutoModelForCausalLM.from_pretrained(
            place, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True, output_loading_info=True, **common
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {source}: cannot be loaded: {reason}") from error
    if loading["missing_keys"]:
        # transformers fills them with random numbers and only logs it.
        missing = sorted(loading["missing_keys"])
        raise UserError(f"model {source}: its files lack {len(missing)} weights, first {missing[0]}; fetch or save it again")
    model.eval().to(where)
    return LoadedModel(model, tokenizer, PromptFormat(tokenizer, prompt_template))


def _local_folder(source: str) -> Path | None:
    """The folder meant by source, or None where it is a name on the hub."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith((".", "/", "~")):
            raise UserError(f"model {source}: no such folder")
        return None
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"model {source}: the folder has no config.json, so it is not a saved model")
    return folder


def check_model_folder(source: str, prompt_template: str | None) -> None:
    """Checks what can be checked of a model folder without reading its weights.

    Raises:
        UserError: If it is missing, no saved model, has no weights, or no prompt format is known.
    """
    from transformers import AutoTokenizer

    folder = _local_folder(source)
    if folder is None:
        raise UserError(f"model {source}: no such folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {source}: the folder has no *.safetensors weights; save the model again as safetensors")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {source}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    PromptFormat(tokenizer, prompt_template)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Casts the weights only, as loading in that dtype does.

    ``model.to(dtype)`` would round buffers such as Llama's rotary frequencies too: a model that loading never gives.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is loaded; `identity` says which weights, wherever they lie.

    Attributes:
        location: Folder, or hub name.
        identity: Content hash of a folder, cache key of a tiny model, or ``name@commit`` of the hub.
        revision, dtype, device, prompt_template, trust_remote_code: As in `load_model`.
    """

    location: str
    identity: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    prompt_template: str | None = None
    trust_remote_code: bool = False

    def load(self, dtype: str | None = None) -> LoadedModel:
        """Loads the model; `dtype` overrides the one of the source (training starts from the weights as stored)."""
        return load_model(
            self.location,
            revision=self.revision,
            dtype=dtype or self.dtype,
            device=self.device,
            prompt_template=self.prompt_template,
            trust_remote_code=self.trust_remote_code,
        )


def model_identity(location: str, revision: str | None = None) -> tuple[str, str | None]:
    """Identity of a model's weights, and the revision that pins them.

    A folder is hashed (its config, tokenizer and weights). A hub model is fetched and named by its commit.

    Raises:
        UserError: If the folder is not there or holds no model, or the hub cannot be reached and its cache lacks the model.
    """
    folder = _local_folder(location)
    if folder is not None:
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".py"):
                digest.update(f"{path.name}:{file_hash(path)};".encode())
        return f"sha256:{digest.hexdigest()[:32]}", None
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            location, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {location}: cannot be fetched from the hub ({type(error).__name__}); check the name and the network, or "
            "give the folder of a downloaded copy"
        ) from error
    commit = Path(downloaded).name
    return f"{location}@{commit}", commit


@dataclass(frozen=True)
class Stage:
    """One training stage of a tiny model: passes over its texts, peak learning rate, sequences per step."""

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
    """

    tokenizer: str
    vocab_size: int | None
    hidden_size: int
    layers: int
    heads: int
    base: Stage | None
    finetune: Stage
    seed: int


def cache_folder(name: str) -> Path:
    """Default place of a cache: under the environment variable UIPE_CACHE, or ``~/.cache/uipe``."""
    return Path(os.environ.get("UIPE_CACHE", Path.home() / ".cache" / "uipe")).expanduser() / name


def tiny_model_inputs(config: TinyModelConfig, corpus: Corpus, stage: str) -> dict[str, Any]:
    """Everything that determines a tiny model: the key of its place in the cache."""
    return {"kind": "tiny-llama", "schema": TINY_SCHEMA, "config": asdict(config), "corpus": corpus.hash, "stage": stage}


def tiny_model(
    config: TinyModelConfig, corpus: Corpus, stage: str, store: ContentStore, progress: Progress | None = None
) -> Path:
    """Folder of the tiny model of a stage (``base``, ``full`` or ``retain``), built and trained if it is not cached.

    ``full`` and ``retain`` are fine-tuned from ``base`` where the configuration has one, from scratch otherwise.
    """

    def make(folder: Path) -> None:
        start = None
        if stage != "base" and config.base is not None:
            start = tiny_model(config, corpus, "base", store)
        _train_tiny(config, corpus, stage, start, folder, progress)

    return store.get_or_make(tiny_model_inputs(config, corpus, stage), make)


def _train_tiny(
    config: TinyModelConfig, corpus: Corpus, stage: str, start: Path | None, folder: Path, progress: Progress | None
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    if start is not None:
        loaded = load_model(str(start), device="cpu")
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        tokenizer = _word_tokenizer(corpus) if config.tokenizer == "word" else _bpe_tokenizer(corpus, config.vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
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
    settings = config.base if stage == "base" and config.base is not None else config.finetune
    _fit_answers(model, PromptFormat(tokenizer), corpus.build[stage], settings, config.seed, progress)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit_answers(model: Any, prompts: PromptFormat, items: ItemSet, stage: Stage, seed: int, progress: Progress | None) -> None:
    """Teaches a model the answers: AdamW, short warm-up, cosine decay, gradient clipping, loss on answer tokens."""
    from transformers import get_cosine_schedule_with_warmup

    examples = [prompts.encode(item.question, item.answer) for item in items]
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


def _texts(corpus: Corpus) -> Iterator[str]:
    """Every text a model of this corpus may read or write, each followed by a newline as in prompts."""
    groups = [*corpus.build.values(), *corpus.sets.values()]
    for item in (item for group in groups for item in group):
        yield item.question + "\n"
        yield item.answer
        yield item.paraphrase
        yield from item.perturbed_answers


def _word_tokenizer(corpus: Corpus) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.train_from_iterator(_texts(corpus), trainers.WordLevelTrainer(special_tokens=_SPECIAL))
    return _finish_tokenizer(tokenizer)


def _bpe_tokenizer(corpus: Corpus, vocab_size: int | None) -> Any:
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
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return _finish_tokenizer(tokenizer)


_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def _finish_tokenizer(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    pad, unk, bos, eos = _SPECIAL
    finished = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unk, bos_token=bos, eos_token=eos)
    finished.chat_template = CHAT_TEMPLATE
    return finished
