"""Read what answers have in common once: a batch of answers as a tree of tokens, in a single row.

Answers to one question share its prompt, perturbed answers share beginnings with each other, and prompts share the beginning of
their template. Every different beginning is one token of the row, at the position it has in its own sequence, so the row has no
padding. Attention goes block by block: each token sees those before it in its own sequence, and no square of the row is made.
Models without replaceable attention get every answer in a row of its own, padded on the right.
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
from uipe_core.models.transformers_compat import accepts_logits_to_keep, attention_by, scaled_dot_product_attention

Group = tuple[int, ...]
"""Numbers of examples with the same prompt, read in one batch."""

IntArray = NDArray[np.int64]

TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Root mean square difference between two ways to compute logits up to which it is rounding, as a share of their standard
deviation. SmolLM2 in bf16 has 0.009 to 0.015, and a wrong mask 1.1. The largest difference crosses any limit with the weights:
one scorer then read trees and another did not, and an export was not its trial."""

PROBED = 3
"""Groups tried to find out whether a model reads trees."""


BLOCK = 32
"""Tokens that attend together; torch's attention on the CPU takes so many queries at a time."""


@dataclass(frozen=True)
class Tree:
    """Attention in a row of n tokens: c blocks of q tokens, with the k tokens that any of a block sees.

    The tokens of a subtree stand together, so what a block sees is the path to its first token, and itself.

    Attributes:
        own: (c, q) places of the tokens that attend; the row in order, the last place repeated to fill the last block.
        seen: (c, k) places of the tokens they may see.
        mask: (c, 1, q, k) True where a token sees another: those before it in its own sequence, and itself.
    """

    own: Tensor
    seen: Tensor
    mask: Tensor

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Replace a model's attention: (1, h, n, d) queries, keys and values to (1, n, h, d) outputs."""

        def taken(values: Tensor, places: Tensor) -> Tensor:
            # A model spread over devices has layers on others than the first.
            found = values.transpose(1, 2)[0].index_select(0, places.reshape(-1).to(values.device))
            return found.view(*places.shape, *found.shape[1:]).transpose(1, 2)

        q, k, v = taken(query, self.own), taken(key, self.seen), taken(value, self.seen)
        found = scaled_dot_product_attention(module, q, k, v, self.mask.to(query.device), options)
        return found.flatten(0, 1)[None, : query.shape[2]], None


@dataclass(frozen=True)
class Rows:
    """A batch of answers as a model reads it, and the positions that predict their tokens.

    Attributes:
        input_ids: (b, t) tokens; the last token of an answer predicts nothing, so it is left out.
        position_ids: (1, t) position of every token in its own sequence; None if every row is one plain sequence.
        tree: Attention of such a single row; None likewise.
        row, column: (m,) positions that predict, each once.
        which: (n,) which of these predicts each of the n answer tokens of the batch.
        targets: (n,) the answer tokens.
        owners: Example number of each answer, in the order of `targets`.
        lengths: Tokens of each of these answers.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    tree: Tree | None
    row: Tensor
    column: Tensor
    which: Tensor
    targets: Tensor
    owners: tuple[int, ...]
    lengths: tuple[int, ...]


def group_by_prompt(examples: Sequence[Example], numbers: Iterable[int] | None = None) -> list[Group]:
    """Group examples (all, or those of some numbers) by prompt, shortest first."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number in range(len(examples)) if numbers is None else numbers:
        example = examples[number]
        by_prompt.setdefault(example.input_ids[: example.prompt_length], []).append(number)
    return _sorted([tuple(numbers) for numbers in by_prompt.values()], examples)


def one_per_row(examples: Sequence[Example], numbers: Iterable[int] | None = None) -> list[Group]:
    """Put each example (all, or those of some numbers) into a group of its own, shortest first."""
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


def plain_rows(numbers: Sequence[int], examples: Sequence[Example], pad_id: int, device: torch.device) -> Rows:
    """Put every answer into a row of its own, padded on the right."""
    fed = [examples[number].input_ids[:-1] for number in numbers]
    ids = np.full((len(fed), max(map(len, fed))), pad_id, dtype=np.int64)
    for row, tokens in enumerate(fed):
        ids[row, : len(tokens)] = tokens
    lengths = [examples[number].answer_length for number in numbers]
    columns = [
        np.arange(len(tokens) - length, len(tokens), dtype=np.int64) for tokens, length in zip(fed, lengths, strict=True)
    ]
    rows = np.repeat(np.arange(len(fed)), lengths)
    return _rows(ids, None, None, rows, np.concatenate(columns), np.arange(len(rows)), numbers, examples, device)


def tree_row(numbers: Sequence[int], examples: Sequence[Example], device: torch.device) -> Rows:
    """Put all answers into one row as a tree of tokens, each subtree in one piece."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    paths: dict[int, list[int]] = {}
    path: list[int] = []
    before: tuple[int, ...] = ()
    # In the order of their tokens, so that a sequence shares most with the one before it.
    for number in sorted(numbers, key=lambda number: examples[number].input_ids[:-1]):
        fed = examples[number].input_ids[:-1]
        shared = _common(before, fed)
        for place in path[shared:]:
            ends[place] = len(ids)
        new = range(len(ids), len(ids) + len(fed) - shared)
        ids += fed[shared:]
        positions += range(shared, len(fed))
        ends += [0] * len(new)
        path = [*path[:shared], *new]
        paths[number], before = path, fed
    for place in path:
        ends[place] = len(ids)
    places = np.array([place for number in numbers for place in paths[number][examples[number].prompt_length - 1 :]])
    column, which = np.unique(places, return_inverse=True)
    tree = _tree(positions, ends, device)
    row = [np.array([values], dtype=np.int64) for values in (ids, positions)]
    return _rows(row[0], row[1], tree, np.zeros_like(column), column, which, numbers, examples, device)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _tree(positions: Sequence[int], ends: Sequence[int], device: torch.device) -> Tree:
    """Cut a row into blocks; a token is seen by those of its subtree, which starts with it and stops before its end."""
    tokens = len(positions)
    own = np.minimum(np.arange(-(-tokens // BLOCK) * BLOCK), tokens - 1).reshape(-1, BLOCK)
    path: list[int] = []
    paths = []
    for place, position in enumerate(positions):
        del path[position:]
        if place % BLOCK == 0:
            paths.append(path.copy())
        path.append(place)
    # No token sees a place behind the row.
    seen = np.full((len(own), max(map(len, paths)) + BLOCK), tokens, dtype=np.int64)
    for row, known in enumerate(paths):
        block = range(row * BLOCK, min(tokens, (row + 1) * BLOCK))
        seen[row, : len(known) + len(block)] = [*known, *block]
    until = np.array([*ends, 0])[seen][:, None]
    mask = (seen[:, None] <= own[:, :, None]) & (own[:, :, None] < until)
    placed = [torch.from_numpy(values).to(device) for values in (own, np.minimum(seen, tokens - 1), mask[:, None])]
    return Tree(*placed)


def _rows(
    ids: IntArray,
    positions: IntArray | None,
    tree: Tree | None,
    row: IntArray,
    column: IntArray,
    which: IntArray,
    numbers: Sequence[int],
    examples: Sequence[Example],
    device: torch.device,
) -> Rows:
    def placed(values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(device)

    targets = [token for number in numbers for token in examples[number].input_ids[examples[number].prompt_length :]]
    return Rows(
        input_ids=placed(ids),
        position_ids=None if positions is None else placed(positions),
        tree=tree,
        row=placed(row),
        column=placed(column),
        which=placed(which),
        targets=placed(np.array(targets, dtype=np.int64)),
        owners=tuple(numbers),
        lengths=tuple(examples[number].answer_length for number in numbers),
    )


def predicting_logits(model: Any, rows: Rows, keep: bool) -> Tensor:
    """Return (m, v) logits at the predicting positions of `rows`; `keep` as `accepts_logits_to_keep` says."""
    arguments: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.tree is not None:
        arguments["position_ids"] = rows.position_ids
        if keep:
            arguments["logits_to_keep"] = rows.column.tolist()  # a tensor would have to be on the last layer's device
        with attention_by(model, rows.tree.attend):
            logits = model(**arguments).logits
        return logits[0] if keep else logits[rows.row, rows.column]
    first = int(rows.column.min())
    if keep:
        arguments["logits_to_keep"] = rows.input_ids.shape[1] - first
        return model(**arguments).logits[rows.row, rows.column - first]
    return model(**arguments).logits[rows.row, rows.column]


def reads_trees(model: Any, examples: Sequence[Example], pad_id: int, device: torch.device) -> bool | None:
    """Return True if a model scores a tree as it scores each answer alone; None if these examples cannot show it.

    The shortest groups are read in three ways: as a tree, each answer alone, and as a tree whose tokens attend to themselves
    only. A model whose attention can be replaced gives equal logits in the first two and others in the third. Some models do
    not let it be replaced, or mix tokens in other ways. A model whose output does not depend on what came before shows nothing.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    if 0 < window <= max(len(example.input_ids) for example in examples):
        return False  # paths would replace the model's sliding window
    shared = [group[:4] for group in group_by_prompt(examples) if len(group) > 1]
    groups = sorted(shared, key=lambda group: sum(len(examples[number].input_ids) for number in group))[:PROBED]
    if not groups:
        return False
    numbers = [number for group in groups for number in group]
    keep = accepts_logits_to_keep(model)
    together, alone = tree_row(numbers, examples, device), plain_rows(numbers, examples, pad_id, device)
    assert together.tree is not None
    own, seen = together.tree.own, together.tree.seen
    itself = together.tree.mask & (own[:, :, None] == seen[:, None])[:, None]
    deaf = replace(together, tree=replace(together.tree, mask=itself))
    try:
        read = [predicting_logits(model, rows, keep).float()[rows.which] for rows in (together, alone, deaf)]
    except Exception as problem:
        # Remote code may raise anything. Out of memory shows nothing, so answers are scored alone this time.
        return None if is_out_of_memory(problem) else False
    spread = float(read[1].detach().std()) or 1.0
    error, difference = (float((other - read[1]).detach().square().mean().sqrt()) / spread for other in (read[0], read[2]))
    allowed = TOLERANCE[model.dtype]
    if not error <= allowed:
        return False
    return True if difference > 5 * allowed else None
