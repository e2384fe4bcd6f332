"""Score a model on a corpus: losses of every answer, greedy text, ROUGE recall, logit scale.

Stages run in order of their cost, so that a caller may stop early. Teacher-forced losses are computed in batches sorted by
length, with logits for answer positions only: as a tree of tokens in one row where the model's attention can be replaced, else
each answer in a row of its own, padded on the right (`uipe_core.scoring.packing`). Text is generated only beyond what the
losses show (`uipe_core.scoring.generation`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from uipe_core.corpora.types import KEPT_SETS, KNOWLEDGE, MEMBERSHIP_SETS, PRIVLEAK_SETS, Corpus, Item, ItemSet, item_set_hash
from uipe_core.metrics.answers import Matches, exact_memorization, extraction_strength, rouge_l_f1, rouge_recall
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import FloatArray, IntArray, ScoreReport, SetScores, logit_scale
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import Example, PromptFormat
from uipe_core.models.transformers_compat import accepts_logits_to_keep
from uipe_core.scoring import packing
from uipe_core.scoring.batch_sizes import BatchSize, find_batch_size
from uipe_core.scoring.divergence import InitialAnswers
from uipe_core.scoring.generation import GreedyText, complete, verify_drafts
from uipe_core.scoring.half_precision import fast_products
from uipe_core.scoring.packing import Group, Rows
from uipe_core.scoring.teacher_forced import TeacherForcedScores

SCORING_SCHEMA = 1
"""Raised with every change that alters scores by more than rounding, so that those of earlier versions are not reused."""

GENERATED_SETS = ("forget", *KEPT_SETS, KNOWLEDGE)
"""Sets whose ROUGE enters a metric; text is generated for these only."""

LOSS_STAGES = {"forget": ("forget",), "general": ("general", "real_authors", "world_facts"), "retain": ("retain",)}
"""Sets whose losses are computed in a stage, in the order of the stages. All other sets follow."""

COMPARED_SETS = ("retain", "general")
"""Sets on whose answers a model is compared with the initial one, token by token, where that is wanted."""

OTHERS, GENERATION = "others", "generation"
"""The last stages: losses of all other sets, and greedy text for `GENERATED_SETS`."""


@dataclass(frozen=True)
class ScoringConfig:
    """Batch size and generation length.

    Attributes:
        batch_size: Answers per teacher-forced batch, and four times as many questions per generation batch. None searches for
            the fastest with the first model.
        generation_length: Longest greedy generation in tokens.
        counts_prompt: Whether that includes each prompt. In locuslab/tofu's code the padding to the longest prompt of the batch
            counts too, so that a text depends on its batch.
        unicode_rouge: ROUGE counts words of any script (`uipe_core.metrics.answers.unicode_words`).
    """

    batch_size: int | None = 32
    generation_length: int = 200
    counts_prompt: bool = False
    unicode_rouge: bool = False

    @classmethod
    def of(cls, definition: str, batch_size: int | None, max_new_tokens: int | None) -> "ScoringConfig":
        """Return the configuration with a metric definition's generation length, or `max_new_tokens`."""
        chosen = definition_named(definition)
        if max_new_tokens is not None:
            return cls(batch_size, max_new_tokens, unicode_rouge=chosen.unicode_rouge)
        return cls(batch_size, chosen.generation_length, chosen.generation_counts_prompt, chosen.unicode_rouge)


class Scorer:
    """Tokenize a corpus once and score any number of weight settings of one model.

    Args:
        corpus: Evaluation sets to score, its implied ones aside. With both of `MEMBERSHIP_SETS` or of `PRIVLEAK_SETS` their
            Min-K% is measured too.
        prompts: Prompt format of the model.
        config: Batch size and generation length.
    """

    def __init__(self, corpus: Corpus, prompts: PromptFormat, config: ScoringConfig) -> None:
        self.config = config
        self.prompts = prompts
        self.sets = {name: items for name, items in corpus.sets.items() if name not in corpus.implied}
        self.hashes = {name: item_set_hash(items) for name, items in self.sets.items()}
        self.examples: list[Example] = []
        self._number_of: dict[Example, int] = {}
        self._rows = {name: self._index(items) for name, items in self.sets.items()}
        self._gold_rows = {row[0] for rows in self._rows.values() for row in rows}
        self._scale_rows = {row[0] for name in KEPT_SETS for row in self._rows.get(name, [])}
        self._with_min_k = [name for pair in (MEMBERSHIP_SETS, PRIVLEAK_SETS) if self.sets.keys() >= set(pair) for name in pair]
        # Texts of MUSE have no end token that Min-K% would leave out.
        self._member_rows = {row[0]: name in MEMBERSHIP_SETS for name in self._with_min_k for row in self._rows[name]}
        self._golds = {name: tuple(self._compared(item) for item in items) for name, items in self.sets.items()}
        self._generated = [(name, row[0]) for name in GENERATED_SETS for row in self._rows.get(name, [])]
        items = [item for name in GENERATED_SETS for item in self.sets.get(name, ())]
        self._prompts = [prompts.item_prompt_ids(item) for item in items]
        # A text goes on for ever: as many tokens of it are generated as there are to compare with.
        self._lengths = [self._longest(item, prompt) for item, prompt in zip(items, self._prompts, strict=True)]
        named = {name for names in LOSS_STAGES.values() for name in names}
        wanted = {**LOSS_STAGES, OTHERS: tuple(name for name in self.sets if name not in named)}
        present = {stage: tuple(name for name in names if name in self.sets) for stage, names in wanted.items()}
        self._stages = {stage: names for stage, names in present.items() if names}
        self._numbers: dict[str, list[int]] = {}
        read: set[int] = set()
        for stage, names in self._stages.items():
            # What an earlier stage has read is known.
            self._numbers[stage] = sorted({number for name in names for row in self._rows[name] for number in row} - read)
            read.update(self._numbers[stage])
        self._reads_trees: dict[type, bool] = {}
        self._initial: InitialAnswers | None = None
        self._size = None if config.batch_size is None else BatchSize(config.batch_size)
        self._texts_size = None if config.batch_size is None else BatchSize(4 * config.batch_size)
        # Drafts: texts of the last model scored, which at another alpha are similar.
        self._drafts: list[list[int]] = [[] for _ in items]

    @property
    def batch_size(self) -> int | None:
        """Answers per batch now, after search and out-of-memory halving; None before the search."""
        return None if self._size is None else self._size.rows

    def forget_texts(self) -> None:
        """Drop the last model's texts as drafts; the next numbers are the same, computed from scratch."""
        self._drafts = [[] for _ in self._drafts]

    @torch.inference_mode()
    def keep_initial(self, loaded: LoadedModel) -> None:
        """Keep the initial model's distributions over the answers of `COMPARED_SETS`: one more pass over these.

        Scores from then on have `SetScores.initial_kl`.
        """
        loaded.model.eval()
        initial = InitialAnswers([row[0] for name in COMPARED_SETS for row in self._rows.get(name, [])])
        self._size = self._size or BatchSize(self._find_batch_size(loaded.model, loaded.device))
        trees = self._may_read_trees(loaded.model, loaded.device)
        groups = (packing.group_by_prompt if trees else packing.one_per_row)(self.examples, sorted(initial.numbers))

        def read(batch: list[Group]) -> None:
            rows = self._batch(batch, trees, loaded.device)
            initial.keep(rows, packing.predicting_logits(loaded.model, rows, accepts_logits_to_keep(loaded.model)))

        with fast_products(loaded.model.dtype, loaded.device):
            self._size.run(groups, read, split=packing.batched, count_rows=lambda batch: sum(map(len, batch)))
        self._initial = initial

    def _index(self, items: ItemSet) -> list[list[int]]:
        """Return per item the example numbers of its answer, paraphrase and perturbed answers, and add new examples.

        The same question and answer, in another set too, is the same example.
        """
        rows = []
        for item in items:
            row = []
            for text in (item.answer, item.paraphrase, *item.perturbed_answers):
                example = self.prompts.encode_answer(item, text)
                number = self._number_of.setdefault(example, len(self.examples))
                if number == len(self.examples):
                    self.examples.append(example)
                row.append(number)
            rows.append(row)
        return rows

    def score(
        self, loaded: LoadedModel, *, temperature: float = 1.0, progress: Callable[[int, int], None] | None = None
    ) -> ScoreReport:
        """Score the model with its current weights.

        Args:
            loaded: Model and tokenizer, the one of the scorer.
            temperature: Divides the logits before losses are computed; greedy text does not depend on it.
            progress: Called with (answers and texts done, answers and texts in all).

        Returns:
            ScoreReport with every set of the corpus; ROUGE for `GENERATED_SETS`.
        """
        return deque(self.stages(loaded, temperature=temperature, progress=progress), maxlen=1).pop()

    @torch.inference_mode()
    def stages(
        self, loaded: LoadedModel, *, temperature: float = 1.0, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[ScoreReport]:
        """Score the model stage by stage; its weights must not change until the last stage. Arguments as in `score`.

        Yields:
            After each stage, the last key of ``seconds``, a report of the sets so far, without ROUGE and logit scale. The last
            report is that of `score`. Batches end with a stage, so the numbers do not depend on where a caller stops.
        """
        model = loaded.model
        model.eval()
        size = self._size = self._size or BatchSize(self._find_batch_size(model, loaded.device))
        trees = self._may_read_trees(model, loaded.device)
        group = packing.group_by_prompt if trees else packing.one_per_row
        groups = {stage: group(self.examples, numbers) for stage, numbers in self._numbers.items()}
        total = len(self.examples) + len(self._generated)
        done = 0

        def step(read: int) -> None:
            nonlocal done
            done += read
            if progress is not None:
                progress(done, total)

        read = TeacherForcedScores(self.examples, self._gold_rows, self._scale_rows, self._initial, self._member_rows)
        sets: dict[str, SetScores] = {}
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        for stage, names in self._stages.items():
            work = partial(self._read, model, loaded.device, trees, temperature, read, step)
            with fast_products(model.dtype, loaded.device):
                size.run(groups[stage], work, split=packing.batched, count_rows=lambda batch: sum(map(len, batch)))
            sets |= {name: self._set_scores(name, read) for name in names}
            seconds[stage] = time.perf_counter() - began
            # In the order of the corpus, as in the last report.
            yield ScoreReport({name: sets[name] for name in self.sets if name in sets}, seconds=dict(seconds))
            began = time.perf_counter()
        by_set: dict[str, list[str]] = {}
        with fast_products(model.dtype, loaded.device):
            texts = self._generate(model, read.best)
        for (name, _), text in zip(self._generated, texts, strict=True):
            by_set.setdefault(name, []).append(text)
        step(len(self._generated))
        whole = {name: self._with_texts(name, sets[name], by_set.get(name)) for name in self.sets}
        seconds[GENERATION] = time.perf_counter() - began
        yield ScoreReport(whole, logit_scale(whole), seconds)

    def _may_read_trees(self, model: Any, device: torch.device) -> bool:
        kind = type(model)
        if kind not in self._reads_trees:
            with fast_products(model.dtype, device):
                found = packing.reads_trees(model, self.examples, self.prompts.pad_id, device)
            if found is None:
                return False  # the next model may show it
            self._reads_trees[kind] = found
        return self._reads_trees[kind]

    def _find_batch_size(self, model: Any, device: torch.device) -> int:
        """Search for the fastest number of answers per batch, with the longest ones, each in a row of its own."""
        longest = sorted(range(len(self.examples)), key=lambda number: -len(self.examples[number].input_ids))
        keep = accepts_logits_to_keep(model)

        def read(count: int) -> None:
            chosen = [longest[place % len(longest)] for place in range(count)]
            rows = packing.plain_rows(chosen, self.examples, self.prompts.pad_id, device)
            packing.predicting_logits(model, rows, keep).float().logsumexp(dim=-1)

        tokens = len(self.examples[longest[0]].input_ids)
        predicted = max(example.answer_length for example in self.examples)
        return find_batch_size(model, device, tokens, predicted if keep else tokens, read)

    def _read(
        self,
        model: Any,
        device: torch.device,
        trees: bool,
        temperature: float,
        scores: TeacherForcedScores,
        step: Callable[[int], None],
        groups: list[Group],
    ) -> None:
        """Run a batch of answers and record it."""
        rows = self._batch(groups, trees, device)
        logits = packing.predicting_logits(model, rows, accepts_logits_to_keep(model))
        scores.record(rows, logits if temperature == 1.0 else logits.float() / temperature)
        step(len(rows.owners))

    def _batch(self, groups: list[Group], trees: bool, device: torch.device) -> Rows:
        numbers = [number for group in groups for number in group]
        if trees:
            return packing.tree_row(numbers, self.examples, device)
        return packing.plain_rows(numbers, self.examples, self.prompts.pad_id, device)

    def _longest(self, item: Item, prompt: list[int]) -> int:
        """Return how many tokens of text are generated for an item, at least one."""
        if item.plain:
            return item.length or max(1, self.prompts.encode_item(item).answer_length)
        return max(1, self.config.generation_length - (len(prompt) if self.config.counts_prompt else 0))

    def _matches(self, item: Item, number: int, best: list[int]) -> Matches:
        """Return where the most likely token is the answer's own, its end token left out; a text has none."""
        example = self.examples[number]
        hits: Matches = np.array(best) == np.array(example.input_ids[example.prompt_length :])
        return hits if item.plain else hits[:-1]

    def _generate(self, model: Any, best: dict[int, list[int]]) -> list[str]:
        """Return the greedy text of every question of `GENERATED_SETS`, starting from what the losses show."""
        texts = []
        for (_, number), prompt, longest in zip(self._generated, self._prompts, self._lengths, strict=True):
            text = GreedyText(prompt, longest, [])
            example = self.examples[number]
            if list(example.input_ids[: example.prompt_length]) == prompt:
                text.verify(example.input_ids[example.prompt_length :], best[number], self.prompts.stop_ids)
            texts.append(text)
        assert self._size is not None
        pad, stops = self.prompts.pad_id, self.prompts.stop_ids
        verify_drafts(model, texts, self._drafts, stops, pad, self._size)
        # A batch size of its own, because of the memory of the key-value cache.
        self._texts_size = self._texts_size or BatchSize(4 * self._size.rows)
        complete(model, texts, stops, pad, self._texts_size)
        self._drafts = [text.tokens for text in texts]
        return [str(text) for text in self.prompts.tokenizer.batch_decode(self._drafts, skip_special_tokens=True)]

    def _set_scores(self, name: str, read: TeacherForcedScores) -> SetScores:
        """Return the scores of a set whose losses are known, without ROUGE."""
        items, rows = self.sets[name], self._rows[name]
        gold = [self._matches(item, row[0], read.best[row[0]]) for item, row in zip(items, rows, strict=True)]
        tokens = np.array([example.answer_length for example in self.examples], dtype=np.int64)

        def column(values: Any, which: int) -> Any:
            return values[[row[which] for row in rows]]

        def perturbed(values: FloatArray | IntArray) -> Any:
            return np.stack([values[row[2:]] for row in rows])

        return SetScores(
            answer_loss=column(read.losses, 0),
            answer_tokens=column(tokens, 0),
            paraphrase_loss=column(read.losses, 1),
            paraphrase_tokens=column(tokens, 1),
            perturbed_loss=perturbed(read.losses),
            perturbed_tokens=perturbed(tokens),
            questions=tuple(item.question for item in items),
            answers=self._golds[name],
            item_hash=self.hashes[name],
            exact_memorization=np.array([exact_memorization(hits) for hits in gold], dtype=np.float64),
            extraction_strength=np.array([extraction_strength(hits) for hits in gold], dtype=np.float64),
            logit_spread=column(read.spreads, 0) if name in KEPT_SETS else None,
            initial_kl=np.array([read.divergences[row[0]] for row in rows])
            if self._initial is not None and name in COMPARED_SETS
            else None,
            min_k=np.array([read.min_k[row[0]] for row in rows]) if name in self._with_min_k else None,
        )

    def _with_texts(self, name: str, scores: SetScores, texts: list[str] | None) -> SetScores:
        if texts is None:
            return scores
        items, unicode = self.sets[name], self.config.unicode_rouge
        ended = [_ended(text, item.stops) for item, text in zip(items, texts, strict=True)]
        pairs = list(zip(self._golds[name], ended, strict=True))
        rouge = np.array([rouge_recall(gold, text, unicode) for gold, text in pairs], dtype=np.float64)
        f1 = None
        if all(item.length is not None for item in items):
            f1 = np.array([rouge_l_f1(gold, text, stemmed=False, unicode=unicode) for gold, text in pairs], dtype=np.float64)
        return replace(scores, rouge_l_recall=rouge[:, 0], rouge_1_recall=rouge[:, 1], rouge_l_f1=f1, generated=tuple(ended))

    def _compared(self, item: Item) -> str:
        """Return the gold answer that a text is compared with: all of it, or as many tokens as the text may have."""
        if item.length is None:
            return item.answer
        example = self.prompts.encode_item(item)
        if example.answer_length < item.length:
            return item.answer
        kept = example.input_ids[example.prompt_length :]
        return str(self.prompts.tokenizer.decode(kept, skip_special_tokens=True))


def _ended(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stops."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
