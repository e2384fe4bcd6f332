"""Scoring a model: this scorer against the straightforward way and the machine's matrix rate, with the same numbers.

The straightforward way is a loop over transformers as most evaluation scripts have it: every answer a row of its own, batches
of 32 in the order of the items, padded, logits everywhere; and `generate` for every question, 32 at a time. Both are timed on
weights that are healthy, half unlearned and collapsed (moved by 0, 0.5 and 3 times their own spread in a random direction), one
after the other in pairs, and must agree. Seconds are the processor's, on a GPU the clock's; a ratio is the median over the
pairs, with the least and the largest.

The bound is what reading the answers costs at the rate of a large matrix product in the model's dtype, measured in the same
run: every different beginning once, logits where an answer is predicted, attention to what came before. With `--against` a
recorded figure of other code on this machine, same model and items, is a baseline too:

    {"name": "open-unlearning", "cpu": "AMD EPYC", "processor_seconds": [67.2, 69.9, 68.4]}

Prints one JSON object. Needs `uipe_core` alone.

    python benchmarks/scoring.py                                          # a small Llama trained on the people corpus
    python benchmarks/scoring.py --tofu data/tofu --device cuda --dtype bfloat16
    python benchmarks/scoring.py --model FOLDER --tofu data/tofu --items 4 --states healthy --other-dtype bfloat16
    python benchmarks/scoring.py --model 7b --device cuda                 # 7B-shaped, random weights, bf16
"""

import argparse
import json
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine
from models import add_options, prepared
from straightforward import BATCH, generated_by_transformers, plain_scores, timed

from uipe_core.corpora.types import Corpus
from uipe_core.models.loading import DTYPES, LoadedModel, cast_weights
from uipe_core.scoring.batch_sizes import BatchSize
from uipe_core.scoring.generation import GreedyText, complete
from uipe_core.scoring.half_precision import fast_products
from uipe_core.scoring.scorer import GENERATED_SETS, GENERATION, Scorer, ScoringConfig

STATES = {"healthy": 0.0, "half unlearned": 0.5, "collapsed": 3.0}
BASELINE = "every answer a row of its own, padded batches of 32, all logits; generate for every question"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=5, help="pairs in each state")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--items", type=int, help="score only so many items of each set")
    parser.add_argument("--sets", nargs="+", help="score only these sets")
    parser.add_argument("--against", type=Path, help="JSON file with figures of other code, for healthy weights")
    parser.add_argument("--other-dtype", choices=DTYPES, help="read the answers in this dtype too")
    options = parser.parse_args()
    recorded = None if options.against is None else read_recorded(options.against, parser)
    loaded, corpus = prepared(options)
    names = [name for name in corpus.sets if name not in corpus.implied] if options.sets is None else options.sets
    chosen = {name: corpus.sets[name] for name in names}
    corpus = replace(corpus, sets={name: items[: options.items] for name, items in chosen.items()})
    print(json.dumps(benchmark(loaded, corpus, options, recorded), indent=1))


def read_recorded(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a recorded figure; end the program if it is none, or of another processor."""
    try:
        found = json.loads(path.read_text())
        seconds = [float(value) for value in found["processor_seconds"]]
        name, cpu = str(found["name"]), str(found["cpu"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--against: {path} is no recorded figure ({type(error).__name__}: {error}); see --help for what it holds")
    if not seconds or not all(0 < value < float("inf") for value in seconds):
        parser.error(f"--against: processor_seconds of {path} are {seconds}; give seconds above 0")
    if cpu != machine()["cpu"]:
        parser.error(f"--against: {path} is of {cpu!r}, this processor is {machine()['cpu']!r}; record it here")
    return {"name": name, "processor_seconds": seconds}


def benchmark(
    loaded: LoadedModel, corpus: Corpus, options: argparse.Namespace, recorded: dict[str, Any] | None
) -> dict[str, Any]:
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(options.batch_size, options.new_tokens))
    initial = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    results = {state: compared(loaded, corpus, scorer, initial, STATES[state], options) for state in options.states}
    move(loaded.model, initial, 0.0)
    found: dict[str, Any] = {
        "benchmark": "scoring",
        "baseline": BASELINE,
        "model": {
            "class": type(loaded.model).__name__,
            "parameters": loaded.model.num_parameters(),
            "dtype": str(loaded.model.dtype),
        },
        "items": {name: len(items) for name, items in corpus.sets.items()},
        "answers": len(scorer.examples),
        "batch_size": scorer.batch_size,
        "repeats": options.repeats,
        "states": results,
        "reading": reading(loaded, scorer, options),
        "generating": generating(loaded, scorer, options),
    }
    if recorded is not None and "healthy" in results:
        ours = results["healthy"]["seconds"]["all"]
        found["against"] = {**recorded, "ratio": round(statistics.median(recorded["processor_seconds"]) / ours, 2)}
    if options.other_dtype is not None:
        found["other_dtype"] = other_dtype(loaded, scorer, DTYPES[options.other_dtype], options)
    return {**found, "machine": machine(loaded.device)}


def compared(
    loaded: LoadedModel,
    corpus: Corpus,
    scorer: Scorer,
    initial: dict[str, torch.Tensor],
    scale: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time the scorer and the straightforward way in turn, in one state of the weights."""
    move(loaded.model, initial, scale)
    report = scorer.score(loaded)
    ours, theirs, kept = [], [], []
    for _ in range(options.repeats):
        scorer.forget_texts()
        ours.append(scored(loaded, scorer))
        # The text of the last scoring as a draft: the same weights, so the best a neighbour can be.
        kept.append(timed(loaded, lambda: scorer.score(loaded))[1])
        losses, texts, parts = plain_scores(loaded, corpus, options.new_tokens)
        theirs.append({"all": sum(parts.values()), **parts})
    return {
        "seconds": {key: round(median(ours, key), 4) for key in ours[0]},
        "seconds_with_own_texts_as_drafts": round(statistics.median(kept), 4),
        "straightforward_seconds": {key: round(median(theirs, key), 4) for key in theirs[0]},
        "ratio": {key: spread([b[key] / a[key] for a, b in zip(ours, theirs, strict=True)]) for key in ours[0]},
        "largest_difference_in_nats": largest_difference(report, losses),
        "texts_that_differ": sum(
            ours_ != theirs_
            for name in texts
            for ours_, theirs_ in zip(report.sets[name].generated or (), texts[name], strict=True)
        ),
    }


def scored(loaded: LoadedModel, scorer: Scorer) -> dict[str, float]:
    """Seconds of a scoring: all, losses, generation."""
    seconds = [0.0, 0.0]
    stages = scorer.stages(loaded)
    while True:
        report, spent = timed(loaded, lambda: next(stages, None))
        if report is None:
            return {"all": sum(seconds), "losses": seconds[0], "generation": seconds[1]}
        seconds[GENERATION in report.seconds] += spent


def reading(loaded: LoadedModel, scorer: Scorer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the losses against the device's matrix rate, in turn with it."""
    counted = Counted(loaded)
    losses_of(loaded, scorer)
    counted.stop()
    seconds, rates, layers = [], [], []
    for _ in range(options.repeats):
        rates.append(matrix_rate(loaded))
        seconds.append(losses_of(loaded, scorer)[1])
        layers.append(counted.passes * linear_seconds(loaded, counted.tokens // counted.passes, counted.kept // counted.passes))
    rates.append(matrix_rate(loaded))
    # A pass is held against the rates just before and after it.
    bounds = [2 * counted.operations / (before + after) for before, after in pairwise(rates)]
    return {
        "tokens_fed": counted.tokens,
        "gigaflop": round(counted.operations / 1e9, 1),
        "matrix_gigaflops": round(statistics.median(rates) / 1e9, 1),
        "bound_seconds": round(statistics.median(bounds), 4),
        "seconds": round(statistics.median(seconds), 4),
        "times_the_bound": spread([spent / bound for spent, bound in zip(seconds, bounds, strict=True)]),
        "share_of_matrix_rate": spread([bound / spent for spent, bound in zip(seconds, bounds, strict=True)]),
        "share_of_linear_layers_alone": spread([alone / spent for spent, alone in zip(seconds, layers, strict=True)]),
        "tokens_per_second": round(counted.tokens / statistics.median(seconds)),
    }


def generating(loaded: LoadedModel, scorer: Scorer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure generation without drafts against `generate`, in turn."""
    texts = [scorer.prompts.prompt_ids(item.question) for name in GENERATED_SETS for item in scorer.sets.get(name, ())]
    texts.sort(key=len)
    if not texts:
        return {}
    rows = 4 * (scorer.batch_size or BATCH)
    pairs = [
        (generated(loaded, texts, options.new_tokens, rows), generated_by_transformers(loaded, texts, options.new_tokens))
        for _ in range(min(3, options.repeats))
    ]
    return {
        "tokens_per_second": round(statistics.median(ours for ours, _ in pairs)),
        "tokens_per_second_by_transformers": round(statistics.median(theirs for _, theirs in pairs)),
        "ratio": spread([ours / theirs for ours, theirs in pairs]),
    }


def other_dtype(loaded: LoadedModel, scorer: Scorer, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Read the answers in the model's dtype and in another, in turn; how far the losses differ."""
    usual = loaded.model.dtype
    seconds: dict[torch.dtype, list[float]] = {usual: [], dtype: []}
    losses: dict[torch.dtype, torch.Tensor] = {}
    for _ in range(options.repeats):
        for each in seconds:
            cast_weights(loaded.model, each)
            report, spent = losses_of(loaded, scorer)
            seconds[each].append(spent)
            losses[each] = torch.cat([torch.from_numpy(scores.answer_loss) for scores in report.sets.values()])
    cast_weights(loaded.model, usual)
    difference = (losses[dtype] - losses[usual]).abs()
    return {
        "dtype": str(dtype),
        "seconds": {str(each): round(statistics.median(found), 4) for each, found in seconds.items()},
        "ratio": spread([before / after for before, after in zip(seconds[usual], seconds[dtype], strict=True)]),
        "largest_difference_in_nats": float(difference.max()),
        "mean_difference_in_nats": float(difference.mean()),
        "mean_loss_in_nats": float(losses[usual].mean()),
    }


def losses_of(loaded: LoadedModel, scorer: Scorer) -> tuple[Any, float]:
    """The report after the last stage of losses, and its seconds; no text is generated."""

    def read() -> Any:
        for report in scorer.stages(loaded):
            if GENERATION not in report.seconds and len(report.sets) == len(scorer.sets):
                return report
        raise AssertionError("there are losses before there are texts")

    return timed(loaded, read)


class Counted:
    """Count what a model reads while losses are taken, and the operations its matrix products need."""

    def __init__(self, loaded: LoadedModel) -> None:
        model, config = loaded.model, loaded.model.config
        self.passes = self.tokens = self.kept = self.operations = 0
        body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)
        per_key = 4 * config.num_hidden_layers * config.hidden_size

        def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            ids, places = named["input_ids"], named.get("position_ids")
            rows, length = ids.shape
            kept = named.get("logits_to_keep") or length
            keys = rows * length * (length + 1) // 2 if places is None else int((places + 1).sum())
            predicting = rows * (kept if isinstance(kept, int) else len(kept))
            self.passes += 1
            self.tokens += ids.numel()
            self.kept += predicting
            head = 2 * config.hidden_size * config.vocab_size * predicting
            self.operations += 2 * body * ids.numel() + head + per_key * keys

        self._handle = model.register_forward_pre_hook(note, with_kwargs=True)

    def stop(self) -> None:
        self._handle.remove()


@torch.inference_mode()
def linear_seconds(loaded: LoadedModel, tokens: int, predicting: int) -> float:
    """Seconds that a pass takes in its linear layers alone: products of the model's own shapes, which may be slower."""
    head = loaded.model.get_output_embeddings()
    layers = [layer for layer in loaded.model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {
        (rows, layer.in_features): torch.randn(rows, layer.in_features, device=loaded.device).to(loaded.model.dtype)
        for layer in layers
        for rows in (tokens, predicting)
    }
    rows = [inputs[predicting if layer is head else tokens, layer.in_features] for layer in layers]
    with fast_products(loaded.model.dtype, loaded.device):
        return timed(loaded, lambda: [layer(values) for layer, values in zip(layers, rows, strict=True)])[1]


def matrix_rate(loaded: LoadedModel) -> float:
    """Floating-point operations per second of a product of two large square matrices in the model's dtype."""
    size = 8192 if loaded.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=loaded.device).to(loaded.model.dtype) for _ in range(2))
    with fast_products(loaded.model.dtype, loaded.device):
        F.linear(left, right)
        return 2 * size**3 / statistics.median(timed(loaded, lambda: F.linear(left, right))[1] for _ in range(9))


@torch.inference_mode()
def generated(loaded: LoadedModel, prompts: list[list[int]], new_tokens: int, rows: int) -> float:
    """Tokens per second, all texts as long as they may be."""
    texts = [GreedyText(prompt, new_tokens, []) for prompt in prompts]
    _, seconds = timed(loaded, lambda: complete(loaded.model, texts, (), loaded.prompts.pad_id, BatchSize(rows)))
    return sum(len(text.tokens) for text in texts) / seconds


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": round(statistics.median(values), 3), "least": round(min(values), 3), "largest": round(max(values), 3)}


@torch.no_grad()
def move(model: Any, initial: dict[str, torch.Tensor], scale: float) -> None:
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        start = initial[name]
        noise = torch.randn(start.shape, generator=draws).to(start)
        parameter.copy_(start + scale * start.float().std().to(start) * noise)


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
