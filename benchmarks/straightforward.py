"""The straightforward way to score a model, as most evaluation scripts have it, and the clock that benchmarks go by."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from uipe_core.corpora.types import Corpus
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import IGNORED, pad_batch
from uipe_core.scoring.scorer import GENERATED_SETS

BATCH = 32


@torch.inference_mode()
def plain_scores(
    loaded: LoadedModel, corpus: Corpus, new_tokens: int
) -> tuple[dict[str, list[list[float]]], dict[str, list[str]], dict[str, float]]:
    """Losses of every answer by set and item, a text for every question, and seconds by stage, without the scorer's ideas."""
    model, prompts, device = loaded.model, loaded.prompts, loaded.device
    started = now(loaded)
    losses: dict[str, list[list[float]]] = {}
    for name, items in corpus.sets.items():
        answers = [[item.answer, item.paraphrase, *item.perturbed_answers] for item in items]
        examples = [prompts.encode(item.question, text) for item, texts in zip(items, answers, strict=True) for text in texts]
        found: list[float] = []
        for start in range(0, len(examples), BATCH):
            batch = pad_batch(examples[start : start + BATCH], prompts.pad_id, device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
            targets = batch.labels[:, 1:]
            nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
            found += (nll.sum(dim=1) / (targets != IGNORED).sum(dim=1)).tolist()
        rest = iter(found)
        losses[name] = [[next(rest) for _ in texts] for texts in answers]
    middle = now(loaded)
    texts: dict[str, list[str]] = {}
    for name in (name for name in GENERATED_SETS if name in corpus.sets):
        texts[name] = []
        questions = [item.question for item in corpus.sets[name]]
        for start in range(0, len(questions), BATCH):
            known = [prompts.prompt_ids(question) for question in questions[start : start + BATCH]]
            ids, mask = left_padded(known, prompts.pad_id, device)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=prompts.pad_id,
                eos_token_id=prompts.stop_ids,
            )
            texts[name] += loaded.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return losses, texts, {"losses": middle - started, "generation": now(loaded) - middle}


@torch.inference_mode()
def generated_by_transformers(loaded: LoadedModel, prompts: list[list[int]], new_tokens: int) -> float:
    """The same with `generate`, 32 prompts at a time."""
    seconds = 0.0
    for start in range(0, len(prompts), BATCH):
        known = prompts[start : start + BATCH]
        ids, mask = left_padded(known, loaded.prompts.pad_id, loaded.device)
        never = loaded.model.config.vocab_size  # no token: nothing ends early
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": never}
        pad = loaded.prompts.pad_id
        call = partial(loaded.model.generate, input_ids=ids, attention_mask=mask, pad_token_id=pad, **settings)
        seconds += timed(loaded, call)[1]
    return len(prompts) * new_tokens / seconds


def left_padded(known: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, known))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in known], device=device)
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in known], device=device)


def now(loaded: LoadedModel) -> float:
    """Seconds of the processor, which others on the machine do not use up; on a GPU the clock's, after its work."""
    if loaded.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(loaded: LoadedModel, work: Callable[[], Any]) -> tuple[Any, float]:
    started = now(loaded)
    found = work()
    return found, now(loaded) - started
