"""Scores a model on a corpus: losses of every answer, greedy generations, ROUGE recall, logit scale.

In stages in order of their cost, so that whoever has seen enough need not pay for the rest. Teacher-forced losses are computed
in batches sorted by length, padded on the right to the longest of the batch, with logits for answer positions only; answers to
one question share its prompt where the model takes that (`uipe_core.scoring.packing`). Text is generated only where the
losses have not shown already what it is (`uipe_core.scoring.generation`).
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uipe_core.corpora.types import UTILITY_SETS, Corpus, Item, ItemSet, item_set_hash
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.memorization import Matches, exact_memorization, extraction_strength
from uipe_core.metrics.scores import FloatArray, IntArray, ScoreReport, SetScores, logit_scale
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import Example, PromptFormat
from uipe_core.scoring.batch_sizes import BatchSize, found_rows
from uipe_core.scoring.generation import Text, complete, verify_drafts
from uipe_core.scoring.packing import (
    Group,
    Rows,
    accepts_logits_to_keep,
    answer_logits,
    batched,
    collate,
    grouped,
    single,
    takes_packed_rows,
)


class TeacherForcedScores:
    """What n examples have told so far, by their number.

    Args:
        examples: All of them.
        gold: Numbers of the gold answers.
        scaled: Numbers of those whose logit spread is wanted.

    Attributes:
        losses: (n,) mean loss, nats per answer token.
        spreads: (n,) standard deviation of the logits over the vocabulary, mean over the answer's tokens.
        best: Of each gold answer the most likely token at every place.
    """

    def __init__(self, examples: Sequence[Example], gold: Collection[int], scaled: Collection[int]) -> None:
        self._examples, self._gold, self._scaled = examples, gold, scaled
        self.losses = np.zeros(len(examples))
        self.spreads = np.zeros(len(examples))
        self.best: dict[int, list[int]] = {}

    def note(self, rows: Rows, logits: Tensor) -> None:
        """Notes what a batch tells; doing it again changes nothing.

        Args:
            rows: The batch.
            logits: (answer tokens, vocabulary) what predicts its answer tokens.
        """
        nll = F.cross_entropy(logits.float(), rows.targets, reduction="none")
        self.losses[list(rows.owners)] = _means(nll, rows.lengths)
        tokens = np.repeat(rows.owners, rows.lengths)
        scaled = [pair for pair in zip(rows.owners, rows.lengths, strict=True) if pair[0] in self._scaled]
        if scaled:
            chosen = torch.from_numpy(np.isin(tokens, [number for number, _ in scaled])).to(logits.device)
            spread = logits[chosen].float().std(dim=-1)
            self.spreads[[number for number, _ in scaled]] = _means(spread, [length for _, length in scaled])
        gold = [number for number in rows.owners if number in self._gold]
        if gold:
            chosen = torch.from_numpy(np.isin(tokens, gold)).to(logits.device)
            likeliest = iter(logits[chosen].argmax(dim=-1).tolist())
            self.best.update({number: list(islice(likeliest, self._examples[number].answer_length)) for number in gold})


GENERATED_SETS = ("forget", *UTILITY_SETS)
"""Sets whose ROUGE recall enters a metric; the others are not generated for."""

LOSS_STAGES = {"forget": ("forget",), "general": ("real_authors", "world_facts"), "retain": ("retain",)}
"""Sets whose losses are taken in a stage, in the order of the stages. All other sets come after them."""

OTHERS, GENERATION = "others", "generation"
"""The stages that follow: losses of the sets that no stage names, and greedy text for all of `GENERATED_SETS`."""


@dataclass(frozen=True)
class ScoringConfig:
    """How to score.

    Attributes:
        batch_size: Answers per teacher-forced batch; four times as many questions are generated for at once. None is as many as
            are found to be best with the first model that is scored.
        generation_length: Longest greedy generation in tokens.
        counts_prompt: Whether that length includes the prompt. It then is the length of each prompt by itself: in the code of
            locuslab/tofu the padding to the longest prompt of the batch counts too, so that a text depends on its neighbours.
    """

    batch_size: int | None = 32
    generation_length: int = 200
    counts_prompt: bool = False

    @classmethod
    def of(cls, definition: str, batch_size: int | None, max_new_tokens: int | None) -> "ScoringConfig":
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
        self.examples: list[Example] = []
        self._rows = {name: self._index(items) for name, items in self.sets.items()}
        self._gold_rows = {row[0] for rows in self._rows.values() for row in rows}
        self._scale_rows = {row[0] for name in UTILITY_SETS for row in self._rows.get(name, [])}
        self._generated = [(name, row[0]) for name in GENERATED_SETS for row in self._rows.get(name, [])]
        items = [item for name in GENERATED_SETS for item in self.sets.get(name, ())]
        self._prompts = [prompts.prompt_ids(item.question) for item in items]
        named = {name for names in LOSS_STAGES.values() for name in names}
        wanted = {**LOSS_STAGES, OTHERS: tuple(name for name in self.sets if name not in named)}
        present = {stage: tuple(name for name in names if name in self.sets) for stage, names in wanted.items()}
        self._stages = {stage: names for stage, names in present.items() if names}
        self._packed: dict[type, bool] = {}
        self._size = None if config.batch_size is None else BatchSize(config.batch_size)
        self._texts_size = None if config.batch_size is None else BatchSize(4 * config.batch_size)
        self._neighbours: list[list[int]] = [[] for _ in items]
        """The texts of the last model that was scored: of another alpha, so much alike."""

    @property
    def batch_size(self) -> int | None:
        """Answers per batch as it is by now: found, and halved where memory ran out; None where nothing was scored yet."""
        return None if self._size is None else self._size.rows

    def forget_texts(self) -> None:
        """Scores the next model without the last one's texts as drafts: the same numbers, as long as it takes."""
        self._neighbours = [[] for _ in self._neighbours]

    def _index(self, items: ItemSet) -> list[list[int]]:
        """Per item, where its answer, its paraphrase and its perturbed answers stand in the flat list of examples."""
        rows = []
        for item in items:
            answers = [item.answer, *([item.paraphrase] if item.paraphrase != item.answer else [])]
            positions = list(range(len(self.examples), len(self.examples) + len(answers)))
            paraphrase = positions[-1]
            self.examples += [self.prompts.encode(item.question, text) for text in (*answers, *item.perturbed_answers)]
            rows.append([positions[0], paraphrase, *range(paraphrase + 1, len(self.examples))])
        return rows

    def score(
        self, loaded: LoadedModel, *, temperature: float = 1.0, progress: Callable[[int, int], None] | None = None
    ) -> ScoreReport:
        """Scores the model as it stands.

        Args:
            loaded: Model and tokenizer; its tokenizer must be the one the scorer was made with.
            temperature: Logits are divided by it before losses are taken; greedy text does not depend on it.
            progress: Called with (answers and texts done, answers and texts in all).

        Returns:
            ScoreReport with every set of the corpus; ROUGE for `GENERATED_SETS`.
        """
        return deque(self.stages(loaded, temperature=temperature, progress=progress), maxlen=1).pop()

    @torch.inference_mode()
    def stages(
        self, loaded: LoadedModel, *, temperature: float = 1.0, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[ScoreReport]:
        """Scores the model as it stands, stage by stage; the model must stay as it is until the last one is there.

        Args:
            loaded, temperature, progress: As in `score`.

        Yields:
            After each stage, which is the last key of ``seconds``, all that is known: sets without ROUGE, no logit scale. The
            last report is what `score` returns. Batches do not reach beyond a stage, so the numbers do not depend on where
            one stops.
        """
        model = loaded.model
        model.eval()
        began = time.perf_counter()
        size = self._size = self._size or BatchSize(self._found_rows(model, loaded.device))
        group = grouped if self._takes_packed_rows(model, loaded.device) else single
        groups = {stage: group(self.examples, self._numbers(stage)) for stage in self._stages}
        total = len(self.examples) + len(self._generated)
        done = 0

        def step(read: int) -> None:
            nonlocal done
            done += read
            if progress is not None:
                progress(done, total)

        read = TeacherForcedScores(self.examples, self._gold_rows, self._scale_rows)
        sets: dict[str, SetScores] = {}
        seconds: dict[str, float] = {}
        for stage, names in self._stages.items():
            work = partial(self._read, model, loaded.device, temperature, read, step)
            size.through(groups[stage], work, cut=batched, rows_of=_answers)
            sets |= {name: self._set_scores(name, read) for name in names}
            seconds[stage] = time.perf_counter() - began
            # In the order of the corpus, as the whole report has them.
            yield ScoreReport({name: sets[name] for name in self.sets if name in sets}, seconds=dict(seconds))
            began = time.perf_counter()
        by_set: dict[str, list[str]] = {}
        for (name, _), text in zip(self._generated, self._generate(model, read.best), strict=True):
            by_set.setdefault(name, []).append(text)
        step(len(self._generated))
        whole = {name: self._with_texts(name, sets[name], by_set.get(name)) for name in self.sets}
        seconds[GENERATION] = time.perf_counter() - began
        yield ScoreReport(whole, logit_scale(whole), seconds)

    def _numbers(self, stage: str) -> list[int]:
        """Where the examples of a stage stand in the flat list."""
        return sorted({number for name in self._stages[stage] for row in self._rows[name] for number in row})

    def _takes_packed_rows(self, model: Any, device: torch.device) -> bool:
        kind = type(model)
        if kind not in self._packed:
            found = takes_packed_rows(model, self.examples, self.prompts.pad_id, device)
            if found is None:
                return False  # this one cannot tell, the next one may
            self._packed[kind] = found
        return self._packed[kind]

    def _found_rows(self, model: Any, device: torch.device) -> int:
        """How many answers are best read at once, by reading the longest ones, each alone."""
        longest = sorted(range(len(self.examples)), key=lambda number: -len(self.examples[number].input_ids))
        keep = accepts_logits_to_keep(model)

        def read(count: int) -> None:
            chosen = [(longest[place % len(longest)],) for place in range(count)]
            logits = answer_logits(model, rows := collate(chosen, self.examples, self.prompts.pad_id, device), keep)
            F.cross_entropy(logits.float(), rows.targets)

        tokens = len(self.examples[longest[0]].input_ids)
        predicted = max(example.answer_length for example in self.examples)
        return found_rows(model, device, tokens, predicted if keep else tokens, read)

    def _read(
        self,
        model: Any,
        device: torch.device,
        temperature: float,
        readings: TeacherForcedScores,
        step: Callable[[int], None],
        groups: list[Group],
    ) -> None:
        """Reads a batch of answers and notes what they tell."""
        rows = collate(groups, self.examples, self.prompts.pad_id, device)
        logits = answer_logits(model, rows, accepts_logits_to_keep(model))
        readings.note(rows, logits if temperature == 1.0 else logits.float() / temperature)
        step(len(rows.owners))

    def _matches(self, number: int, best: list[int]) -> Matches:
        """Where the most likely token is the answer's own; the end token of the answer is left out."""
        example = self.examples[number]
        return np.array(best[:-1]) == np.array(example.input_ids[example.prompt_length : -1])

    def _generate(self, model: Any, best: dict[int, list[int]]) -> list[str]:
        """Greedy text of every question of `GENERATED_SETS`, from what the losses have shown of it."""
        texts = []
        for (_, number), prompt in zip(self._generated, self._prompts, strict=True):
            # A prompt as long as the whole length still gets its one token.
            used = len(prompt) if self.config.counts_prompt else 0
            text = Text(prompt, max(1, self.config.generation_length - used), [])
            example = self.examples[number]
            if list(example.input_ids[: example.prompt_length]) == prompt:
                text.verify(example.input_ids[example.prompt_length :], best[number], self.prompts.stop_ids)
            texts.append(text)
        assert self._size is not None
        pad, stops = self.prompts.pad_id, self.prompts.stop_ids
        verify_drafts(model, texts, self._neighbours, stops, pad, self._size)
        # Their own number: a cache of keys and values takes memory that reading does not.
        self._texts_size = self._texts_size or BatchSize(4 * self._size.rows)
        complete(model, texts, stops, pad, self._texts_size)
        self._neighbours = [text.tokens for text in texts]
        return [str(text) for text in self.prompts.tokenizer.batch_decode(self._neighbours, skip_special_tokens=True)]

    def _set_scores(self, name: str, read: TeacherForcedScores) -> SetScores:
        """The scores of a set whose losses have been taken, without ROUGE."""
        items, rows = self.sets[name], self._rows[name]
        gold = [self._matches(row[0], read.best[row[0]]) for row in rows]
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
            answers=tuple(item.answer for item in items),
            item_hash=self.hashes[name],
            exact_memorization=np.array([exact_memorization(hits) for hits in gold], dtype=np.float64),
            extraction_strength=np.array([extraction_strength(hits) for hits in gold], dtype=np.float64),
            logit_spread=column(read.spreads, 0) if name in UTILITY_SETS else None,
        )

    def _with_texts(self, name: str, scores: SetScores, texts: list[str] | None) -> SetScores:
        if texts is None:
            return scores
        rouge = _rouge_recall(self.sets[name], texts)
        return replace(scores, rouge_l_recall=rouge[:, 0], rouge_1_recall=rouge[:, 1], generated=tuple(texts))


def _answers(groups: list[Group]) -> int:
    return sum(map(len, groups))


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


def _means(values: Tensor, lengths: Sequence[int]) -> FloatArray:
    """Means of so many values each, one group after the other."""
    counts = torch.tensor(lengths, device=values.device)
    return torch.segment_reduce(values.double(), "mean", lengths=counts).cpu().numpy()
