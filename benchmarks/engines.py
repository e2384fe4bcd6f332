"""Time the texts of a scoring: this scorer's draft and verify against the engines transformers has for it.

The same greedy texts, of every question that is generated for, on weights that are healthy, half unlearned and collapsed (as
in scoring.py). By ``drafts``: the scorer's last stage, for which the losses have shown how the gold answers begin;
``neighbour``: the same with the texts of the model before as second drafts, here its own, the best a neighbour can be;
``no drafts``: the scorer's loop from nothing; ``generate``: 32 at a time, the baseline; ``continuous batching``: transformers'
own (`generate_batch`) with all texts at once, its manager and its cache kept from call to call; and assisted generation, which
takes one text at a time: ``prompt lookup``, and ``assisted`` by the initial model. Prints one JSON object with medians of
seconds, ratios over the baseline's, and how many texts differ from its. Needs `uipe_core` alone.

    python benchmarks/engines.py                                          # a small Llama trained on the people corpus
    python benchmarks/engines.py --model 100m --repeats 1 --engines "no drafts" "continuous batching"   # random weights
    python benchmarks/engines.py --model 7b --device cuda                 # 7B-shaped, random weights, bf16
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from machine import machine
from models import add_options, prepared
from scoring import STATES, move
from straightforward import BATCH, left_padded, timed
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from uipe_core.models.loading import LoadedModel
from uipe_core.scoring.batch_sizes import BatchSize
from uipe_core.scoring.generation import GreedyText, complete
from uipe_core.scoring.scorer import GENERATED_SETS, GENERATION, Scorer, ScoringConfig

LOOKED_UP = 4
"""Tokens a look-up in the prompt proposes at a time."""
PAGE = 16
"""Tokens in a page of continuous batching's cache: prompts and texts are short."""

Tokens = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="compared with the baseline")
    options = parser.parse_args()
    loaded, corpus = prepared(options)
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(options.batch_size, options.new_tokens))
    print(json.dumps(benchmark(loaded, scorer, options), indent=1))


def benchmark(loaded: LoadedModel, scorer: Scorer, options: argparse.Namespace) -> dict[str, Any]:
    model = loaded.model
    healthy = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assistant = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).to(loaded.device).eval()
    assistant.load_state_dict(model.state_dict())
    scorer.score(loaded)  # finds its batch size
    engines = Engines(loaded, scorer, assistant, options.new_tokens)
    states = {}
    for state, scale in STATES.items():
        move(model, healthy, scale)
        found, texts = {}, {}
        for name, run in ((BASELINE, Engines.generate), *((name, ENGINES[name]) for name in options.engines)):
            seconds = []
            for _ in range(options.repeats):
                texts[name], spent = run(engines)
                seconds.append(spent)
            found[name] = statistics.median(seconds)
        engines.stop()
        states[state] = {
            name: {
                "seconds": round(seconds, 4),
                "ratio": round(found[BASELINE] / seconds, 2),
                "texts_that_differ": sum(a != b for a, b in zip(texts[name], texts[BASELINE], strict=True)),
            }
            for name, seconds in found.items()
        }
    return {
        "benchmark": "engines",
        "baseline": f"generate, {BATCH} texts at a time",
        "model": {"class": type(model).__name__, "parameters": model.num_parameters(), "dtype": str(model.dtype)},
        "texts": len(engines.prompts),
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "states": states,
        "machine": machine(loaded.device),
    }


class Engines:
    """Every way to the texts, with what it keeps from call to call. Each gives the texts, and seconds."""

    def __init__(self, loaded: LoadedModel, scorer: Scorer, assistant: Any, new_tokens: int) -> None:
        self._loaded, self._scorer, self.assistant, self._new_tokens = loaded, scorer, assistant, new_tokens
        prompts = scorer.prompts
        self.prompts = [prompts.prompt_ids(item.question) for name in GENERATED_SETS for item in scorer.sets.get(name, ())]
        self._stops, self._pad = list(prompts.stop_ids), prompts.pad_id
        self._settings = {
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "eos_token_id": self._stops,
            "pad_token_id": self._pad,
        }

    def drafts(self, forget: bool) -> tuple[list[str], float]:
        """The scorer's stage, ROUGE included: what it costs in a trial."""
        if forget:
            self._scorer.forget_texts()
        report = self._scorer.score(self._loaded)
        texts = [text for name in GENERATED_SETS if name in report.sets for text in report.sets[name].generated or ()]
        return texts, report.seconds[GENERATION]

    @torch.inference_mode()
    def no_drafts(self) -> tuple[list[str], float]:
        texts = [GreedyText(prompt, self._new_tokens, []) for prompt in self.prompts]
        rows = 4 * (self._scorer.batch_size or BATCH)
        _, seconds = timed(self._loaded, lambda: complete(self._loaded.model, texts, self._stops, self._pad, BatchSize(rows)))
        return self._decoded([text.tokens for text in texts]), seconds

    @torch.inference_mode()
    def generate(self) -> tuple[list[str], float]:
        def work() -> Tokens:
            found: Tokens = []
            for start in range(0, len(self.prompts), BATCH):
                ids, mask = left_padded(self.prompts[start : start + BATCH], self._pad, self._loaded.device)
                output = self._loaded.model.generate(input_ids=ids, attention_mask=mask, **self._settings)
                found += output[:, ids.shape[1] :].tolist()
            return found

        texts, seconds = timed(self._loaded, work)
        return self._decoded(texts), seconds

    @torch.inference_mode()
    def one_by_one(self, **how: Any) -> tuple[list[str], float]:
        def work() -> Tokens:
            found: Tokens = []
            for prompt in self.prompts:
                ids = torch.tensor([prompt], device=self._loaded.device)
                output = self._loaded.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **self._settings, **how
                )
                found.append(output[0, len(prompt) :].tolist())
            return found

        texts, seconds = timed(self._loaded, work)
        return self._decoded(texts), seconds

    def continuous_batching(self) -> tuple[list[str], float]:
        """With its manager at work already: what follows is a call among many."""
        longest = max(map(len, self.prompts)) + self._new_tokens
        pages = len(self.prompts) * (longest // PAGE + 1)
        config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=len(self.prompts) * longest)
        settings = GenerationConfig(**self._settings)

        def work() -> dict[str, Any]:
            return self._loaded.model.generate_batch(
                self.prompts, settings, config, persistent_manager=True, warmup=self._loaded.device.type == "cuda"
            )

        work()
        found, seconds = timed(self._loaded, work)
        if failed := [each.error for each in found.values() if each.error]:
            raise RuntimeError(failed[0])
        # Named in the order in which they were asked for.
        names = sorted(found, key=lambda name: int(name.removeprefix("req_")))
        return self._decoded([found[name].generated_tokens for name in names]), seconds

    def stop(self) -> None:
        """End what continuous batching keeps."""
        self._loaded.model.destroy_cached_continuous_batching_manager()

    def _decoded(self, texts: Tokens) -> list[str]:
        ended = [next((row[:at] for at, token in enumerate(row) if token in self._stops), row) for row in texts]
        return [str(text) for text in self._loaded.tokenizer.batch_decode(ended, skip_special_tokens=True)]


BASELINE = "generate"
ENGINES: dict[str, Callable[[Engines], tuple[list[str], float]]] = {
    "drafts": lambda engines: engines.drafts(forget=True),
    "neighbour": lambda engines: engines.drafts(forget=False),
    "no drafts": Engines.no_drafts,
    "continuous batching": Engines.continuous_batching,
    "prompt lookup": lambda engines: engines.one_by_one(prompt_lookup_num_tokens=LOOKED_UP),
    "assisted": lambda engines: engines.one_by_one(assistant_model=engines.assistant),
}

if __name__ == "__main__":
    main()
