"""Scoring a model: this scorer against the straightforward way, on the same model and items, with the same numbers.

The straightforward way is a loop over transformers as most evaluation scripts have it: every answer a row of its own, batches
of 32 in the order of the items, padded, logits everywhere; and `generate` for every question, 32 at a time. Both are timed on
weights that are healthy, half unlearned and collapsed (moved by 0, 0.5 and 3 times their own spread in a random direction),
and must agree. Then rates: floating-point operations of reading answers against those of a large matrix product in the same
dtype on the same device, and tokens per second of generation without drafts against `generate`. Prints one JSON object; a ratio
is the time of the straightforward way over that of the scorer. Needs `uipe_core` alone.

    python benchmarks/scoring.py                                          # a small Llama trained on the people corpus
    python benchmarks/scoring.py --tofu data/tofu --device cuda --dtype bfloat16
    python benchmarks/scoring.py --model FOLDER --tofu data/tofu          # a model of your own
    python benchmarks/scoring.py --model 7b --device cuda                 # 7B-shaped, random weights, bf16
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine
from models import add_options, prepared

from uipe_core.corpora.types import Corpus
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import IGNORED, pad_batch
from uipe_core.scoring.batch_sizes import BatchSize
from uipe_core.scoring.generation import GreedyText, complete
from uipe_core.scoring.scorer import GENERATED_SETS, GENERATION, Scorer, ScoringConfig

BATCH = 32
STATES = {"healthy": 0.0, "half unlearned": 0.5, "collapsed": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(benchmark(*prepared(options), options), indent=1))


def benchmark(loaded: LoadedModel, corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    config = ScoringConfig(options.batch_size, options.new_tokens)
    scorer = Scorer(corpus, loaded.prompts, config)
    initial = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    results = {}
    for state, scale in STATES.items():
        move(loaded.model, initial, scale)
        scorer.score(loaded)
        ours, theirs, kept = [], [], []
        for _ in range(options.repeats):
            scorer.forget_texts()
            report, seconds = timed(loaded, lambda: scorer.score(loaded))
            generation = report.seconds[GENERATION]
            ours.append({"all": seconds, "losses": sum(report.seconds.values()) - generation, "generation": generation})
            # The text of the last scoring as a draft: the same weights, so the best a neighbour can be.
            kept.append(timed(loaded, lambda: scorer.score(loaded))[1])
            losses, texts, parts = plain_scores(loaded, corpus, options.new_tokens)
            theirs.append({"all": sum(parts.values()), **parts})
        results[state] = {
            "seconds": {key: round(median(ours, key), 4) for key in ours[0]},
            "seconds_with_own_texts_as_drafts": round(statistics.median(kept), 4),
            "straightforward_seconds": {key: round(median(theirs, key), 4) for key in theirs[0]},
            "ratio": {key: round(median(theirs, key) / median(ours, key), 2) for key in ours[0]},
            "largest_difference_in_nats": largest_difference(report, losses),
            "texts_that_differ": sum(
                ours_ != theirs_
                for name in texts
                for ours_, theirs_ in zip(report.sets[name].generated or (), texts[name], strict=True)
            ),
        }
    model = loaded.model
    return {
        "benchmark": "scoring",
        "baseline": "every answer a row of its own, padded batches of 32, all logits; generate for every question",
        "model": {"class": type(model).__name__, "parameters": model.num_parameters(), "dtype": str(model.dtype)},
        "items": {name: len(items) for name, items in corpus.sets.items()},
        "answers": len(scorer.examples),
        "batch_size": scorer.batch_size,
        "repeats": options.repeats,
        "states": results,
        "rates": rates(loaded, scorer, initial, options),
        "machine": machine(loaded.device),
    }


def rates(loaded: LoadedModel, scorer: Scorer, initial: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Measure reading against the device's matrix rate, and generation without drafts."""
    move(loaded.model, initial, 0.0)
    counted = Counted(loaded, scorer.prompts.pad_id)
    last_of_losses(scorer, loaded)
    counted.stop()
    reading = statistics.median(sum(last_of_losses(scorer, loaded).seconds.values()) for _ in range(options.repeats))
    matrix = matrix_rate(loaded, options.repeats)
    texts = [scorer.prompts.prompt_ids(item.question) for name in GENERATED_SETS for item in scorer.sets.get(name, ())]
    texts.sort(key=len)
    ours = statistics.median(generated(loaded, texts, options.new_tokens, 4 * (scorer.batch_size or BATCH)) for _ in range(3))
    theirs = statistics.median(generated_by_transformers(loaded, texts, options.new_tokens) for _ in range(3))
    return {
        "matrix_teraflops": round(matrix / 1e12, 3),
        "reading_teraflops": round(counted.operations / reading / 1e12, 3),
        "reading_share_of_matrix_rate": round(counted.operations / reading / matrix, 3),
        "padding_share_of_tokens_read": round(1 - counted.real / counted.tokens, 3),
        "tokens_read_per_second": round(counted.real / reading),
        "generated_tokens_per_second": round(ours),
        "generated_tokens_per_second_by_transformers": round(theirs),
        "generation_ratio": round(ours / theirs, 2),
    }


def last_of_losses(scorer: Scorer, loaded: LoadedModel) -> Any:
    """The report after the last stage of losses; no text is generated."""
    for report in scorer.stages(loaded):
        if GENERATION not in report.seconds and len(report.sets) == len(scorer.sets):
            return report
    raise AssertionError("there are losses before there are texts")


class Counted:
    """Count what a model reads while losses are taken, and the operations of its matrix products, padding included."""

    def __init__(self, loaded: LoadedModel, pad_id: int) -> None:
        model, config = loaded.model, loaded.model.config
        self.tokens = self.real = self.operations = 0
        body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)

        def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            ids = named["input_ids"]
            rows, length = ids.shape
            kept = named.get("logits_to_keep") or length
            self.tokens += ids.numel()
            self.real += int((ids != pad_id).sum())
            attention = 4 * config.num_hidden_layers * config.hidden_size * rows * length * length
            self.operations += 2 * body * ids.numel() + 2 * config.hidden_size * config.vocab_size * rows * kept + attention

        self._handle = model.register_forward_pre_hook(note, with_kwargs=True)

    def stop(self) -> None:
        self._handle.remove()


def matrix_rate(loaded: LoadedModel, repeats: int) -> float:
    """Floating-point operations per second of a product of two large square matrices in the model's dtype."""
    size = 8192 if loaded.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=loaded.device).to(loaded.model.dtype) for _ in range(2))
    left @ right
    times = [timed(loaded, lambda: left @ right)[1] for _ in range(4 * repeats)]
    return 2 * size**3 / statistics.median(times)


@torch.inference_mode()
def generated(loaded: LoadedModel, prompts: list[list[int]], new_tokens: int, rows: int) -> float:
    """Tokens per second, all texts as long as they may be."""
    texts = [GreedyText(prompt, new_tokens, []) for prompt in prompts]
    _, seconds = timed(loaded, lambda: complete(loaded.model, texts, (), loaded.prompts.pad_id, BatchSize(rows)))
    return sum(len(text.tokens) for text in texts) / seconds


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


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def timed(loaded: LoadedModel, work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = work()
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


@torch.no_grad()
def move(model: Any, initial: dict[str, torch.Tensor], scale: float) -> None:
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        start = initial[name]
        noise = torch.randn(start.shape, generator=draws).to(start)
        parameter.copy_(start + scale * start.float().std().to(start) * noise)


@torch.inference_mode()
def plain_scores(
    loaded: LoadedModel, corpus: Corpus, new_tokens: int
) -> tuple[dict[str, list[list[float]]], dict[str, list[str]], dict[str, float]]:
    """Losses of every answer by set and item, a text for every question, and seconds by stage, without the scorer's ideas."""
    model, prompts, device = loaded.model, loaded.prompts, loaded.device
    started = time.perf_counter()
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
    middle = time.perf_counter()
    texts: dict[str, list[str]] = {}
    for name in GENERATED_SETS:
        texts[name] = []
        questions = [item.question for item in corpus.sets.get(name, ())]
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
    return losses, texts, {"losses": middle - started, "generation": time.perf_counter() - middle}


def largest_difference(report: Any, losses: dict[str, list[list[float]]]) -> float:
    found = 0.0
    for name, rows in losses.items():
        scores = report.sets[name]
        for row, values in enumerate(rows):
            ours = [scores.answer_loss[row], scores.paraphrase_loss[row], *scores.perturbed_loss[row]]
            found = max(found, *(abs(a - b) for a, b in zip(ours, values, strict=True)))
    return found


if __name__ == "__main__":
    main()
