"""Generate text: greedy by draft and verify, or token by token with any other choice of tokens.

A draft is a guess at the greedy text. One forward pass over prompt and draft gives the most likely token at every position; up
to and including the first difference these are the greedy text. Only the rest is generated token by token.

Source: blockwise parallel decoding (Stern et al. 2018, arXiv 1811.03115), with drafts that scoring yields anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uipe_core.models.prompts import Example
from uipe_core.models.transformers_compat import (
    accepts_logits_to_keep,
    forward_parameters,
    generates_alone,
    no_generation_defaults,
    select_cache_rows,
)
from uipe_core.scoring.batch_sizes import BatchSize, slices
from uipe_core.scoring.packing import plain_rows, predicting_logits

BY_HAND = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache"})
"""Arguments of forward that `_decode` needs; other models use their own `generate`."""

CROWDED = 0.75
"""Finished rows are dropped when at most this share of a batch is unfinished."""


@dataclass
class GreedyText:
    """A greedy text, or one by another choice of tokens, in progress.

    Attributes:
        prompt: Token ids of the prompt.
        limit: Most tokens it may have.
        tokens: Tokens known so far, without the end token.
        finished: True if these are all.
    """

    prompt: list[int]
    limit: int
    tokens: list[int]
    finished: bool = False

    def add(self, token: int, stops: Sequence[int]) -> None:
        """Append the next greedy token."""
        if token in stops:
            self.finished = True
        else:
            self.tokens.append(token)
            self.finished = len(self.tokens) >= self.limit

    def verify(self, draft: Sequence[int], best: Sequence[int], stops: Sequence[int]) -> None:
        """Append the greedy tokens that a draft's forward pass shows.

        Args:
            draft: Tokens read after the prompt, starting with the known ones.
            best: The most likely token at each of their positions, and perhaps after the last.
            stops: End tokens.
        """
        for place in range(len(self.tokens), len(best)):
            if self.finished:
                break
            self.add(int(best[place]), stops)
            if place >= len(draft) or best[place] != draft[place]:
                break


Choose = Callable[[Tensor, Sequence[GreedyText], int], Tensor]
"""Chooses the next tokens (b,) of b texts from (b, v) logits; the number is that of the tokens chosen since that the texts do
not have yet."""


def most_likely(logits: Tensor, texts: Sequence[GreedyText], ahead: int) -> Tensor:
    """Choose the most likely tokens."""
    return logits.argmax(dim=-1)


def complete(
    model: Any,
    texts: Sequence[GreedyText],
    stops: Sequence[int],
    pad_id: int,
    size: BatchSize,
    choose: Choose = most_likely,
) -> None:
    """Generate the rest of every unfinished text, in batches of similar lengths.

    Args:
        model: A causal language model in evaluation mode.
        texts: Finished in place.
        stops: End tokens.
        pad_id: Padding id.
        size: Rows per batch; tokens of a batch that runs out of memory are kept.
        choose: Chooses the next tokens.
    """
    unfinished = sorted((text for text in texts if not text.finished), key=lambda text: len(text.prompt) + len(text.tokens))
    by_hand = forward_parameters(model).keys() >= BY_HAND

    def work(batch: list[GreedyText]) -> None:
        left = [text for text in batch if not text.finished]
        if left:
            (_decode if by_hand else _generate)(model, left, stops, pad_id, choose)

    size.run(unfinished, work, split=slices)


def verify_drafts(
    model: Any, texts: Sequence[GreedyText], drafts: Sequence[Sequence[int]], stops: Sequence[int], pad_id: int, size: BatchSize
) -> None:
    """Run one forward pass over prompt and draft of every unfinished text whose draft extends it."""
    chosen = [
        (text, list(draft))
        for text, draft in zip(texts, drafts, strict=True)
        if not text.finished and len(draft) > len(text.tokens) and list(draft[: len(text.tokens)]) == text.tokens
    ]
    chosen.sort(key=lambda pair: len(pair[0].prompt) + len(pair[1]))
    keep, device = accepts_logits_to_keep(model), model.device

    def work(part: list[tuple[GreedyText, list[int]]]) -> None:
        # One more token than the draft; it is not fed, and gives the prediction after the draft's end.
        examples = [Example((*text.prompt, *draft, pad_id), len(text.prompt)) for text, draft in part]
        rows = plain_rows(range(len(part)), examples, pad_id, device)
        best = predicting_logits(model, rows, keep).argmax(dim=-1).tolist()
        for (text, draft), length in zip(part, rows.lengths, strict=True):
            text.verify(draft, best[:length], stops)
            best = best[length:]

    size.run(chosen, work, split=slices)


def _left_padded(texts: Sequence[GreedyText], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (b, t) ids and mask of prompts and known tokens."""
    known = [[*text.prompt, *text.tokens] for text in texts]
    longest = max(map(len, known))
    ids: NDArray[np.int64] = np.full((len(known), longest), pad_id, dtype=np.int64)
    mask: NDArray[np.int64] = np.zeros((len(known), longest), dtype=np.int64)
    for row, tokens in enumerate(known):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = tokens, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _decode(model: Any, texts: Sequence[GreedyText], stops: Sequence[int], pad_id: int, choose: Choose) -> None:
    """Decode token by token with a cache, dropping finished rows."""
    from transformers import DynamicCache

    ids, mask = _left_padded(texts, pad_id, model.device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    keep = {"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}
    rows = list(texts)
    while rows:
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **keep
        )
        best = choose(output.logits[:, -1], rows, 0)
        for text, token in zip(rows, best.tolist(), strict=True):
            if not text.finished:
                text.add(token, stops)
        left = [row for row, text in enumerate(rows) if not text.finished]
        if not left:
            return
        if len(left) <= CROWDED * len(rows):
            chosen = torch.tensor(left, device=mask.device)
            select_cache_rows(cache, chosen)
            rows, best, mask, positions = [rows[row] for row in left], best[chosen], mask[chosen], positions[chosen]
        ids = best[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


class _Chosen:
    """Leave a model's own greedy `generate` nothing but the tokens that `choose` takes."""

    def __init__(self, texts: Sequence[GreedyText], start: int, choose: Choose) -> None:
        self._texts, self._start, self._choose = texts, start, choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (b, v) logits with one token of each row left."""
        chosen = self._choose(scores, self._texts, input_ids.shape[1] - self._start)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


def _generate(model: Any, texts: Sequence[GreedyText], stops: Sequence[int], pad_id: int, choose: Choose = most_likely) -> None:
    """Decode with the model's own `generate`."""
    from transformers import GenerationConfig

    if generates_alone(model) and len(texts) > 1:
        for text in texts:
            _generate(model, [text], stops, pad_id, choose)
        return
    ids, mask = _left_padded(texts, pad_id, model.device)
    settings = GenerationConfig(
        max_new_tokens=max(text.limit - len(text.tokens) for text in texts),
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=list(stops),
    )
    # For greedy text a pass over the vocabulary less.
    processors: dict[str, Any] = {} if choose is most_likely else {"logits_processor": [_Chosen(texts, ids.shape[1], choose)]}
    with no_generation_defaults(model):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **processors)
    for text, row in zip(texts, output[:, ids.shape[1] :].tolist(), strict=True):
        for token in row:
            if not text.finished:
                text.add(token, stops)
