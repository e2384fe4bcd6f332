"""Answers that share a prompt, read in one row: the prompt once, then every answer as if the others were not there.

A token of an answer sees the prompt and the tokens of its own answer before it, and has the position it would have behind the
prompt alone. Rows are padded on the right; attention is causal, so padding cannot reach an answer.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uipe_core.models.memory import ran_out
from uipe_core.models.prompts import Example

Group = tuple[int, ...]
"""Numbers of examples that are read in one row: they have the same prompt."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far two ways of computing a logit of a model may lie apart by rounding, as a share of the spread of its logits."""

PROBED = 3
"""Groups that are read both ways to find out whether a model takes packed rows."""


@dataclass(frozen=True)
class Rows:
    """A batch of groups, ready to be read, and where each answer's tokens are predicted.

    Attributes:
        input_ids: (b, t) tokens; the last token of an answer predicts nothing, so it is not fed.
        position_ids: (b, t) place of every token behind its own prompt; None where every row is one plain sequence.
        segments: (b, t) 0 in the prompt, 1, 2, ... in the answers; None likewise.
        row, column: (n,) where each of the n answer tokens of the batch is predicted.
        first: The least of these columns.
        targets: (n,) the answer tokens.
        owners: Number of the example of each answer, in the order of `targets`.
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


def grouped(examples: Sequence[Example], numbers: Iterable[int] | None = None) -> list[Group]:
    """Examples (all, or those of some numbers) by their prompt, those with the shortest prompts and answers first."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number in range(len(examples)) if numbers is None else numbers:
        example = examples[number]
        by_prompt.setdefault(example.input_ids[: example.prompt_length], []).append(number)
    return _sorted([tuple(numbers) for numbers in by_prompt.values()], examples)


def single(examples: Sequence[Example], numbers: Iterable[int] | None = None) -> list[Group]:
    """Examples (all, or those of some numbers), each in a row of its own, the shortest first."""
    return _sorted([(number,) for number in (range(len(examples)) if numbers is None else numbers)], examples)


def _sorted(groups: list[Group], examples: Sequence[Example]) -> list[Group]:
    def length(group: Group) -> tuple[int, int]:
        answers = sum(examples[number].answer_length for number in group)
        prompt = examples[group[0]].prompt_length
        return prompt + answers, prompt

    return sorted(groups, key=length)


def batched(groups: Sequence[Group], size: int) -> Iterator[list[Group]]:
    """Groups in batches of at most `size` answers; a group with more is cut."""
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
    """Lays groups out as rows."""
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
            # The first token of every answer is predicted by the end of the prompt.
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
    """(n, v) logits that predict the answer tokens of `rows`.

    Args:
        model: A causal language model.
        rows: What it reads.
        keep: Whether its forward can be asked for the logits of chosen positions only (`accepts_logits_to_keep`).
    """
    arguments: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.segments is not None:
        arguments |= {"position_ids": rows.position_ids, "attention_mask": _mask(rows.segments, model.dtype)}
    if keep:
        arguments["logits_to_keep"] = rows.input_ids.shape[1] - rows.first
        return model(**arguments).logits[rows.row, rows.column - rows.first]
    return model(**arguments).logits[rows.row, rows.column]


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, 1, t, t) what is added to attention scores: 0 for the prompt and the own answer so far, else the lowest number."""
    length = segments.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = before & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can be asked for the logits of chosen positions only."""
    return "logits_to_keep" in forward_parameters(model)


def forward_parameters(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def takes_packed_rows(model: Any, examples: Sequence[Example], pad_id: int, device: torch.device) -> bool | None:
    """Whether a model reads packed rows as it reads each answer alone; None if these examples cannot tell.

    Found out by reading a few groups in three ways: packed, each answer alone, and packed with a mask that hides nothing. A
    model that takes masks and positions gives the same logits in the first two and other ones in the third. Some models take
    neither (positions built into their attention, remote code), and a model whose output no longer depends on what it reads
    cannot tell.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    if 0 < window <= max(len(example.input_ids) for example in examples):
        return False  # a mask of ours would take the place of the model's own, which looks back only so far
    groups = [group[:4] for group in grouped(examples) if len(group) > 1][-PROBED:]
    if not groups:
        return False
    keep = accepts_logits_to_keep(model)
    packed = collate(groups, examples, pad_id, device)
    assert packed.segments is not None
    alone = collate([(number,) for group in groups for number in group], examples, pad_id, device)
    open_to_all = Rows(**{**vars(packed), "segments": torch.zeros_like(packed.segments)})
    try:
        read = [answer_logits(model, rows, keep).float() for rows in (packed, alone, open_to_all)]
    except Exception as problem:
        # Whatever else it is, such rows are not for this model; code that comes with a model may raise anything.
        # With too little memory for the question it is left open, and answers are read alone.
        return None if ran_out(problem) else False
    spread = float(read[1].std()) or 1.0
    error, difference = (float((other - read[1]).abs().max()) / spread for other in (read[0], read[2]))
    allowed = TOLERANCE[model.dtype]
    if not error <= allowed:
        return False
    return True if difference > 10 * allowed else None
