"""Pack answers that share a prompt into one row: the prompt once, then every answer, masked from the others.

A token of an answer attends to the prompt and to the tokens of its own answer before it, at the position it would have alone.
Rows are padded on the right; attention is causal, so padding does not reach an answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uipe_core.models.memory import is_out_of_memory
from uipe_core.models.prompts import Example
from uipe_core.models.transformers_compat import accepts_logits_to_keep

Group = tuple[int, ...]
"""Numbers of examples with the same prompt, in one row."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest rounding difference between two ways to compute a logit, as a share of the logits' standard deviation."""

PROBED = 3
"""Groups tried to find out whether a model supports packed rows."""


@dataclass(frozen=True)
class Rows:
    """A batch of groups, and the positions that predict their answer tokens.

    Attributes:
        input_ids: (b, t) tokens; the last token of an answer predicts nothing, so it is left out.
        position_ids: (b, t) position of every token after its own prompt; None if every row is one plain sequence.
        segments: (b, t) 0 in the prompt, 1, 2, ... in the answers; None likewise.
        row, column: (n,) position that predicts each of the n answer tokens of the batch.
        first: The least of these columns.
        targets: (n,) the answer tokens.
        owners: Example number of each answer, in the order of `targets`.
        lengths: Tokens of each of these answers.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    segments: Tensor | None
    row: Tensor
    column: Tensor
    first: int
    targets: Tensor
    owners: tuple[int, ...]
    lengths: tuple[int, ...]


def group_by_prompt(examples: Sequence[Example], numbers: Iterable[int] | None = None) -> list[Group]:
    """Group examples (all, or those of some numbers) by prompt, shortest rows first."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number in range(len(examples)) if numbers is None else numbers:
        example = examples[number]
        by_prompt.setdefault(example.input_ids[: example.prompt_length], []).append(number)
    return _sorted([tuple(numbers) for numbers in by_prompt.values()], examples)


def one_per_row(examples: Sequence[Example], numbers: Iterable[int] | None = None) -> list[Group]:
    """Put each example (all, or those of some numbers) into a row of its own, shortest first."""
    return _sorted([(number,) for number in (range(len(examples)) if numbers is None else numbers)], examples)


def _sorted(groups: list[Group], examples: Sequence[Example]) -> list[Group]:
    def length(group: Group) -> tuple[int, int]:
        answers = sum(examples[number].answer_length for number in group)
        prompt = examples[group[0]].prompt_length
        return prompt + answers, prompt

    return sorted(groups, key=length)


def batched(groups: Sequence[Group], size: int) -> Iterator[list[Group]]:
    """Yield groups in batches of at most `size` answers; a group with more is split."""
    batch: list[Group] = []
    held = 0
    for group in groups:
        for start in range(0, len(group), size):
            part = group[start : start + size]
            if held + len(part) > size:
                yield batch
                batch, held = [], 0
            batch.append(part)
            held += len(part)
    if batch:
        yield batch


def collate(groups: Sequence[Group], examples: Sequence[Example], pad_id: int, device: torch.device) -> Rows:
    """Build the rows of groups."""
    fed = [[examples[number].input_ids[examples[number].prompt_length : -1] for number in group] for group in groups]
    prompts = [examples[group[0]].input_ids[: examples[group[0]].prompt_length] for group in groups]
    longest = max(len(prompt) + sum(map(len, answers)) for prompt, answers in zip(prompts, fed, strict=True))
    ids = np.full((len(groups), longest), pad_id, dtype=np.int64)
    places = np.zeros((len(groups), longest), dtype=np.int64)
    segments = np.zeros((len(groups), longest), dtype=np.int64)
    row: list[NDArray[np.int64]] = []
    column: list[NDArray[np.int64]] = []
    targets: list[int] = []
    for at, (group, prompt, answers) in enumerate(zip(groups, prompts, fed, strict=True)):
        end = len(prompt)
        ids[at, :end], places[at, :end] = prompt, np.arange(end)
        for segment, (number, answer) in enumerate(zip(group, answers, strict=True), start=1):
            start, end = end, end + len(answer)
            ids[at, start:end] = answer
            places[at, start:end] = np.arange(len(prompt), len(prompt) + len(answer))
            segments[at, start:end] = segment
            # The end of the prompt predicts the first token of every answer.
            column.append(np.array([len(prompt) - 1, *range(start, end)], dtype=np.int64))
            row.append(np.full(len(answer) + 1, at, dtype=np.int64))
            targets += examples[number].input_ids[len(prompt) :]
        segments[at, end:] = len(group) + 1
    shared = any(len(group) > 1 for group in groups)

    def placed(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(device)

    owners = tuple(number for group in groups for number in group)
    return Rows(
        input_ids=placed(ids),
        position_ids=placed(places) if shared else None,
        segments=placed(segments) if shared else None,
        row=placed(np.concatenate(row)),
        column=placed(np.concatenate(column)),
        first=min(len(prompt) for prompt in prompts) - 1,
        targets=placed(np.array(targets, dtype=np.int64)),
        owners=owners,
        lengths=tuple(examples[number].answer_length for number in owners),
    )


def answer_logits(model: Any, rows: Rows, keep: bool) -> Tensor:
    """Return (n, v) logits that predict the answer tokens of `rows`; `keep` as `accepts_logits_to_keep` says."""
    arguments: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.segments is not None:
        arguments |= {"position_ids": rows.position_ids, "attention_mask": _mask(rows.segments, model.dtype)}
    if keep:
        arguments["logits_to_keep"] = rows.input_ids.shape[1] - rows.first
        return model(**arguments).logits[rows.row, rows.column - rows.first]
    return model(**arguments).logits[rows.row, rows.column]


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (b, 1, t, t) additive attention mask: 0 for the prompt and the own answer so far, else the lowest number."""
    length = segments.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = before & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def supports_packed_rows(model: Any, examples: Sequence[Example], pad_id: int, device: torch.device) -> bool | None:
    """Return True if a model scores packed rows as it scores each answer alone; None if these examples cannot show it.

    A few groups are run in three ways: packed, each answer alone, and packed without a mask. A model that supports masks and
    positions gives equal logits in the first two and others in the third. Some models support neither (positions built into
    their attention, remote code). A model whose output does not depend on its input shows nothing.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    if 0 < window <= max(len(example.input_ids) for example in examples):
        return False  # the packing mask would replace the model's sliding window
    groups = [group[:4] for group in group_by_prompt(examples) if len(group) > 1][-PROBED:]
    if not groups:
        return False
    keep = accepts_logits_to_keep(model)
    packed = collate(groups, examples, pad_id, device)
    assert packed.segments is not None
    alone = collate([(number,) for group in groups for number in group], examples, pad_id, device)
    unmasked = replace(packed, segments=torch.zeros_like(packed.segments))
    try:
        read = [answer_logits(model, rows, keep).float() for rows in (packed, alone, unmasked)]
    except Exception as problem:
        # Remote code may raise anything. Out of memory shows nothing, so answers are scored alone this time.
        return None if is_out_of_memory(problem) else False
    spread = float(read[1].std()) or 1.0
    error, difference = (float((other - read[1]).abs().max()) / spread for other in (read[0], read[2]))
    allowed = TOLERANCE[model.dtype]
    if not error <= allowed:
        return False
    return True if difference > 10 * allowed else None
