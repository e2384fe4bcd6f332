"""Score a model on multiple-choice questions: the log-likelihood of every letter after the question.

One forward pass per question if the letters differ in their last token only, as with usual tokenizers; else one per shared
beginning. Questions are batched by length and padded on the right, as in `uipe_core.scoring.scorer`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uipe_core.corpora.multiple_choice import letter_answers, letter_prompt
from uipe_core.corpora.types import ChoiceItem, Corpus, item_set_hash
from uipe_core.metrics.scores import ChoiceReport, ChoiceScores, FloatArray
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import PromptFormat
from uipe_core.models.transformers_compat import accepts_logits_to_keep
from uipe_core.scoring.batch_sizes import BatchSize, find_batch_size, slices
from uipe_core.scoring.half_precision import fast_products


@dataclass(frozen=True)
class _Sequence:
    """Input of one question: its prompt, and tokens that several letters begin with (usually none).

    Attributes:
        ids: Prompt and shared tokens.
        prompt_length: Start of the shared tokens.
        letters: Last token of each letter with this beginning, by the letter's index.
    """

    ids: tuple[int, ...]
    prompt_length: int
    letters: dict[int, int]


class ChoiceScorer:
    """Tokenize the questions of a corpus once and score any number of weight settings of one model.

    Args:
        corpus: Its `choices` are scored.
        prompts: Tokenizer of the model; the letter format replaces its prompt format.
        batch_size: Questions per forward pass; None searches for the fastest with the first model.
    """

    def __init__(self, corpus: Corpus, prompts: PromptFormat, batch_size: int | None = 32) -> None:
        self._size = None if batch_size is None else BatchSize(batch_size)
        self._prompts = prompts
        self._sets = dict(corpus.choices)
        self._hashes = {name: item_set_hash(items) for name, items in self._sets.items()}
        self._items = [(name, item) for name, items in self._sets.items() for item in items]
        sequences = [(row, sequence) for row, (_, item) in enumerate(self._items) for sequence in _sequences(item, prompts)]
        self._order = sorted(sequences, key=lambda entry: len(entry[1].ids))

    @property
    def batch_size(self) -> int | None:
        """Questions per forward pass now; None before the search."""
        return None if self._size is None else self._size.rows

    @torch.inference_mode()
    def score(
        self, loaded: LoadedModel, *, temperature: float = 1.0, progress: Callable[[int, int], None] | None = None
    ) -> ChoiceReport:
        """Score the model with its current weights.

        Args:
            loaded: Model and tokenizer, the one of the scorer.
            temperature: Divides the logits; the most likely letter does not depend on it.
            progress: Called with (sequences done, sequences in all).

        Returns:
            ChoiceReport with every multiple-choice set of the corpus.
        """
        model = loaded.model
        model.eval()
        keep = accepts_logits_to_keep(model)
        table = np.full((len(self._items), self._most()), -np.inf)
        spreads = np.full(len(self._items), np.nan)
        size = self._size = self._size or BatchSize(self._find_batch_size(model, loaded.device, keep))
        done = 0
        started = time.perf_counter()

        def work(batch: list[tuple[int, _Sequence]]) -> None:
            nonlocal done
            self._score_batch(model, loaded.device, keep, temperature, batch, table, spreads)
            done += len(batch)
            if progress is not None:
                progress(done, len(self._order))

        with fast_products(model.dtype, loaded.device):
            size.run(self._order, work, split=slices)
        names = np.array([name for name, _ in self._items])
        return ChoiceReport(
            sets={name: self._set_scores(name, table[names == name], spreads[names == name]) for name in self._sets},
            seconds={"letters": time.perf_counter() - started},
        )

    def _find_batch_size(self, model: Any, device: torch.device, keep: bool) -> int:
        """Search for the fastest number of questions per pass, with the longest ones."""
        if not self._order:
            return 1
        longest = self._order[::-1]
        tokens, predicted = len(longest[0][1].ids), 1 + max(len(s.ids) - s.prompt_length for _, s in longest)

        def read(count: int) -> None:
            table, spreads = np.zeros((len(self._items), self._most())), np.zeros(len(self._items))
            batch = [longest[place % len(longest)] for place in range(count)]
            self._score_batch(model, device, keep, 1.0, batch, table, spreads)

        return find_batch_size(model, device, tokens, predicted if keep else tokens, read)

    def _most(self) -> int:
        """Return the most choices of any question."""
        return max((len(item.choices) for _, item in self._items), default=0)

    def _score_batch(
        self,
        model: Any,
        device: torch.device,
        keep: bool,
        temperature: float,
        batch: Sequence[tuple[int, _Sequence]],
        table: FloatArray,
        spreads: FloatArray,
    ) -> None:
        """Fill in the log-likelihoods of the batch's letters, and the logit spread of its questions."""
        first = min(sequence.prompt_length for _, sequence in batch) - 1
        longest = max(len(sequence.ids) for _, sequence in batch)
        ids = np.full((len(batch), longest), self._prompts.pad_id, dtype=np.int64)
        for row, (_, sequence) in enumerate(batch):
            ids[row, : len(sequence.ids)] = sequence.ids
        logits = _last_logits(model, torch.from_numpy(ids).to(device), longest - first, keep)
        for row, (item, sequence) in enumerate(batch):
            # The last position predicts the letter's last token, the ones before it the shared tokens.
            predicting = logits[row, sequence.prompt_length - 1 - first : len(sequence.ids) - first].float() / temperature
            logp = predicting.log_softmax(dim=-1)
            shared = torch.tensor(sequence.ids[sequence.prompt_length :], dtype=torch.long, device=device)
            prefix = logp[:-1].gather(1, shared[:, None]).double().sum()
            last = logp[-1][list(sequence.letters.values())].double()
            table[item, list(sequence.letters)] = (prefix + last).cpu().numpy()
            spreads[item] = float(predicting[0].std())

    def _set_scores(self, name: str, table: FloatArray, spreads: FloatArray) -> ChoiceScores:
        items = self._sets[name]
        return ChoiceScores(
            log_likelihood=table[:, : max((len(item.choices) for item in items), default=0)],
            answers=np.array([item.answer for item in items], dtype=np.int64),
            choices=np.array([len(item.choices) for item in items], dtype=np.int64),
            logit_spread=spreads,
            item_hash=self._hashes[name],
        )


def _sequences(item: ChoiceItem, prompts: PromptFormat) -> list[_Sequence]:
    """Return the inputs of a question: one sequence for all letters that differ in their last token only."""
    prompt = letter_prompt(item)
    grouped: dict[tuple[int, ...], _Sequence] = {}
    for index, letter in enumerate(letter_answers(len(item.choices))):
        example = prompts.encode_plain(prompt, letter)
        fed, last = example.input_ids[:-1], example.input_ids[-1]
        grouped.setdefault(fed, _Sequence(fed, example.prompt_length, {})).letters[index] = last
    return list(grouped.values())


def _last_logits(model: Any, input_ids: Tensor, count: int, keep: bool) -> Tensor:
    """Return (b, count, v) logits of the last positions."""
    logits: Tensor = model(input_ids=input_ids, use_cache=False, **({"logits_to_keep": count} if keep else {})).logits
    return logits[:, -count:]
