"""Scores a model on a corpus: losses of every answer, greedy generations, ROUGE recall, logit scale.

Teacher-forced losses are computed in batches sorted by length, padded on the right to the longest of the batch, with logits
for answer positions only. Attention is causal, so padding on the right cannot reach an answer and needs no mask.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uipe_core.corpora.types import UTILITY_SETS, Corpus, Item, ItemSet, item_set_hash
from uipe_core.definitions import definition_named
from uipe_core.losses import token_nll
from uipe_core.memorization import Matches, exact_memorization, extraction_strength
from uipe_core.models import LoadedModel
from uipe_core.prompts import IGNORED, Example, PromptFormat
from uipe_core.score_report import FloatArray, IntArray, ScoreReport, SetScores, logit_scale

GENERATED_SETS = ("forget", *UTILITY_SETS)
"""Sets whose ROUGE recall enters a metric; the others are not generated for."""


@dataclass(frozen=True)
class ScoringConfig:
    """How to score.

    Attributes:
        batch_size: Answers per teacher-forced batch; four times as many questions are generated for at once.
        generation_length: Longest greedy generation in tokens.
        counts_prompt: Whether that length includes the prompt. It then is the length of each prompt by itself: in the code of
            locuslab/tofu the padding to the longest prompt of the batch counts too, so that a text depends on its neighbours.
    """

    batch_size: int = 32
    generation_length: int = 200
    counts_prompt: bool = False

    @classmethod
    def of(cls, definition: str, batch_size: int, max_new_tokens: int | None) -> "ScoringConfig":
        """The generation length of a metric definition, or that many new tokens."""
        chosen = definition_named(definition)
        if max_new_tokens is not None:
            return cls(batch_size, max_new_tokens)
        return cls(batch_size, chosen.generation_length, chosen.generation_counts_prompt)


class Scorer:
    """A corpus tokenized once and scored on any number of weight settings of one model.

    Args:
        corpus: Evaluation sets to score.
        prompts: Prompt format of the model.
        config: Batch size and generation length.
    """

    def __init__(self, corpus: Corpus, prompts: PromptFormat, config: ScoringConfig) -> None:
        self.config = config
        self.prompts = prompts
        self.sets = dict(corpus.sets)
        self.hashes = {name: item_set_hash(items) for name, items in self.sets.items()}
        self._examples: list[Example] = []
        self._rows = {name: self._index(items) for name, items in self.sets.items()}
        lengths = [(len(example.input_ids), example.prompt_length) for example in self._examples]
        self._order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._gold_rows = {row[0] for rows in self._rows.values() for row in rows}
        self._scale_rows = {row[0] for name in UTILITY_SETS for row in self._rows.get(name, [])}

    def _index(self, items: ItemSet) -> list[list[int]]:
        """Per item, where its answer, its paraphrase and its perturbed answers stand in the flat list of examples."""
        rows = []
        for item in items:
            answers = [item.answer, *([item.paraphrase] if item.paraphrase != item.answer else [])]
            positions = list(range(len(self._examples), len(self._examples) + len(answers)))
            paraphrase = positions[-1]
            self._examples += [self.prompts.encode(item.question, text) for text in (*answers, *item.perturbed_answers)]
            rows.append([positions[0], paraphrase, *range(paraphrase + 1, len(self._examples))])
        return rows

    @torch.inference_mode()
    def score(
        self, loaded: LoadedModel, *, temperature: float = 1.0, progress: Callable[[int, int], None] | None = None
    ) -> ScoreReport:
        """Scores the model as it stands.

        Args:
            loaded: Model and tokenizer; its tokenizer must be the one the scorer was made with.
            temperature: Logits are divided by it before losses are taken; greedy text does not depend on it.
            progress: Called with (batches done, batches in all).

        Returns:
            ScoreReport with every set of the corpus; ROUGE for `GENERATED_SETS`.
        """
        model = loaded.model
        model.eval()
        started = time.perf_counter()
        generated_items = [(name, item) for name in GENERATED_SETS for item in self.sets.get(name, ())]
        generation_size = 4 * self.config.batch_size
        total = -(-len(self._examples) // self.config.batch_size) + -(-len(generated_items) // generation_size)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        losses, spreads, matches = self._losses(model, loaded.device, temperature, step)
        after_losses = time.perf_counter()
        texts = self._generate(model, loaded.device, [item.question for _, item in generated_items], generation_size, step)
        by_set: dict[str, list[str]] = {}
        for (name, _), text in zip(generated_items, texts, strict=True):
            by_set.setdefault(name, []).append(text)
        sets = {name: self._set_scores(name, losses, spreads, matches, by_set.get(name)) for name in self.sets}
        finished = time.perf_counter()
        return ScoreReport(
            sets=sets,
            logit_scale=logit_scale(sets),
            seconds={"losses": after_losses - started, "generation": finished - after_losses},
        )

    def _losses(
        self, model: Any, device: torch.device, temperature: float, step: Callable[[], None]
    ) -> tuple[FloatArray, FloatArray, dict[int, Matches]]:
        """Mean loss of every example (nats per answer token), the logit spread at the gold answers of the utility sets, and by
        row of each gold answer, where the most likely token is its own."""
        losses = torch.zeros(len(self._examples), dtype=torch.float64)
        spreads = torch.zeros(len(self._examples), dtype=torch.float64)
        matches: dict[int, Matches] = {}
        keep = accepts_logits_to_keep(model)
        size = self.config.batch_size
        for start in range(0, len(self._order), size):
            rows = self._order[start : start + size]
            examples = [self._examples[row] for row in rows]
            first = min(example.prompt_length for example in examples) - 1
            last = max(len(example.input_ids) for example in examples) - 1
            input_ids, targets = _teacher_forcing(examples, first, last, self.prompts.pad_id, device)
            # The final token predicts nothing, so it is not even fed.
            logits = _answer_logits(model, input_ids[:, :last], first, keep)
            if temperature != 1.0:
                logits = logits.float() / temperature
            nll = token_nll(logits, targets)
            losses[rows] = (nll.double().sum(dim=1) / (targets != IGNORED).sum(dim=1)).cpu()
            scaled = [index for index, row in enumerate(rows) if row in self._scale_rows]
            if scaled:
                tokens = targets[scaled] != IGNORED
                spread = logits[scaled][tokens].float().std(dim=-1).double().cpu().split(tokens.sum(dim=1).tolist())
                spreads[[rows[index] for index in scaled]] = torch.stack([values.mean() for values in spread])
            gold = [index for index, row in enumerate(rows) if row in self._gold_rows]
            own = targets[gold] != IGNORED
            best = logits[gold][own].argmax(dim=-1)
            # The end token of each answer is left out.
            hits = (best == targets[gold][own]).cpu().split(own.sum(dim=1).tolist())
            matches.update({rows[index]: found[:-1].numpy() for index, found in zip(gold, hits, strict=True)})
            step()
        return losses.numpy(), spreads.numpy(), matches

    def _generate(
        self, model: Any, device: torch.device, questions: Sequence[str], size: int, step: Callable[[], None]
    ) -> list[str]:
        prompts = [self.prompts.prompt_ids(question) for question in questions]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            for row, text in zip(rows, self._generate_batch(model, device, [prompts[r] for r in rows]), strict=True):
                texts[row] = text
            step()
        return texts

    def _generate_batch(self, model: Any, device: torch.device, prompts: list[list[int]]) -> list[str]:
        from transformers import GenerationConfig

        longest = max(len(ids) for ids in prompts)
        pad = self.prompts.pad_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        # A prompt as long as the whole length still gets its one token.
        used = [len(ids) if self.config.counts_prompt else 0 for ids in prompts]
        allowed = [max(1, self.config.generation_length - tokens) for tokens in used]
        settings = GenerationConfig(
            max_new_tokens=max(allowed),
            do_sample=False,
            # Unset, these come from the model's own file, and with a repetition penalty the text depends on the logit scale.
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad,
            eos_token_id=self.prompts.stop_ids,
        )
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
        # Greedy text does not look ahead: cut short, it is the text of a shorter generation.
        answers = [row[longest : longest + count] for row, count in zip(output.tolist(), allowed, strict=True)]
        return [str(text) for text in self.prompts.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _set_scores(
        self, name: str, losses: FloatArray, spreads: FloatArray, matches: dict[int, Matches], texts: list[str] | None
    ) -> SetScores:
        items, rows = self.sets[name], self._rows[name]
        gold = [matches[row[0]] for row in rows]
        tokens = np.array([example.answer_length for example in self._examples], dtype=np.int64)

        def column(values: Any, which: int) -> Any:
            return values[[row[which] for row in rows]]

        def perturbed(values: FloatArray | IntArray) -> Any:
            return np.stack([values[row[2:]] for row in rows])

        rouge = _rouge_recall(items, texts) if texts is not None else None
        return SetScores(
            answer_loss=column(losses, 0),
            answer_tokens=column(tokens, 0),
            paraphrase_loss=column(losses, 1),
            paraphrase_tokens=column(tokens, 1),
            perturbed_loss=perturbed(losses),
            perturbed_tokens=perturbed(tokens),
            rouge_l_recall=None if rouge is None else rouge[:, 0],
            rouge_1_recall=None if rouge is None else rouge[:, 1],
            generated=None if texts is None else tuple(texts),
            questions=tuple(item.question for item in items),
            answers=tuple(item.answer for item in items),
            item_hash=self.hashes[name],
            exact_memorization=np.array([exact_memorization(hits) for hits in gold], dtype=np.float64),
            extraction_strength=np.array([extraction_strength(hits) for hits in gold], dtype=np.float64),
            logit_spread=column(spreads, 0) if name in UTILITY_SETS else None,
        )


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can be asked for the logits of chosen positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _teacher_forcing(
    examples: Sequence[Example], first: int, last: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(b, last + 1) right-padded ids, and (b, last - first) targets of positions first..last - 1 (`IGNORED` off answers)."""
    ids = np.full((len(examples), last + 1), pad_id, dtype=np.int64)
    targets = np.full((len(examples), last + 1), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        ids[row, :end] = example.input_ids
        targets[row, example.prompt_length : end] = example.input_ids[example.prompt_length :]
    return torch.from_numpy(ids).to(device), torch.from_numpy(targets[:, first + 1 :]).to(device)


def _answer_logits(model: Any, input_ids: Tensor, first: int, keep: bool) -> Tensor:
    """(b, t - first, v) logits of positions first and later."""
    length = input_ids.shape[1]
    if keep:
        return model(input_ids=input_ids, use_cache=False, logits_to_keep=length - first).logits
    return model(input_ids=input_ids, use_cache=False).logits[:, first:]


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL", "rouge1"], use_stemmer=True)


@cache
def _rouge_pair(gold: str, text: str) -> tuple[float, float]:
    scores = _rouge_scorer().score(gold, text)
    return scores["rougeL"].recall, scores["rouge1"].recall


def _rouge_recall(items: Sequence[Item], texts: Sequence[str]) -> FloatArray:
    """(n, 2) ROUGE-L and ROUGE-1 recall of each generation against its gold answer."""
    return np.array([_rouge_pair(item.answer, text) for item, text in zip(items, texts, strict=True)], dtype=np.float64)
