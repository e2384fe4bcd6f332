"""Read what answers have in common once: a batch of answers as a tree of tokens, in a single row.

Answers to one question share its prompt, perturbed answers share beginnings with each other, and prompts share the beginning of
their template. Every different beginning is one token of the row, at the position it has in its own sequence, so the row has no
padding. Attention goes path by path: each token sees those before it in its own sequence, and no square of the row is made.
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

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest rounding difference between two ways to compute a logit, as a share of the logits' standard deviation."""

PROBED = 3
"""Groups tried to find out whether a model reads trees."""


@dataclass(frozen=True)
class Bunch:
    """Attention of c pieces of paths of similar lengths, padded to q queries and k keys.

    Attributes:
        own: (c * q,) places of the tokens that attend.
        seen: (c * k,) places of their paths from the start.
        mask: (c, 1, q, k) True where a query attends to a key.
    """

    own: Tensor
    seen: Tensor
    mask: Tensor

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Return (c * q, h, d) attention output of the queries; arguments are (n, h, d)."""
        pieces, _, queries, keys = self.mask.shape

        def taken(values: Tensor, places: Tensor, length: int) -> Tensor:
            # A model spread over devices has layers on others than the first.
            found = values.index_select(0, places.to(values.device))
            return found.view(pieces, length, *values.shape[1:]).transpose(1, 2)

        q = taken(query, self.own, queries)
        k, v = taken(key, self.seen, keys), taken(value, self.seen, keys)
        return scaled_dot_product_attention(module, q, k, v, self.mask.to(q.device), options).flatten(0, 1)


@dataclass(frozen=True)
class Tree:
    """Attention in a row of n tokens: which token attends to which.

    Attributes:
        bunches: Pieces of paths; every token attends in one of them.
        back: (n,) places of the tokens in the outputs of all bunches, one after the other.
    """

    bunches: tuple[Bunch, ...]
    back: Tensor

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Replace a model's attention: (1, h, n, d) queries, keys and values to (1, n, h, d) outputs."""
        q, k, v = (values.transpose(1, 2)[0] for values in (query, key, value))
        found = torch.cat([bunch.attend(module, q, k, v, options) for bunch in self.bunches])
        return found.index_select(0, self.back.to(found.device))[None], None


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
    """Put all answers into one row as a tree of tokens."""
    ids, positions, paths, tree = _tree({number: examples[number] for number in numbers}, device)
    places = np.concatenate([paths[number][examples[number].prompt_length - 1 :] for number in numbers])
    column, which = np.unique(places, return_inverse=True)
    return _rows(ids[None], positions[None], tree, np.zeros_like(column), column, which, numbers, examples, device)


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


def _tree(examples: dict[int, Example], device: torch.device) -> tuple[IntArray, IntArray, dict[int, IntArray], Tree]:
    """Return tokens, their positions, the path of every example, and who attends to whom."""
    ids: list[int] = []
    positions: list[int] = []
    paths: dict[int, IntArray] = {}
    pieces: list[tuple[int, IntArray]] = []
    path: IntArray = np.zeros(0, dtype=np.int64)
    before: tuple[int, ...] = ()
    # In the order of their tokens, so that a sequence shares most with the one before it.
    for number, example in sorted(examples.items(), key=lambda pair: pair[1].input_ids[:-1]):
        fed = example.input_ids[:-1]
        shared = _common(before, fed)
        new = np.arange(len(ids), len(ids) + len(fed) - shared, dtype=np.int64)
        path = np.concatenate([path[:shared], new])
        ids += fed[shared:]
        positions += range(shared, len(fed))
        # The prompt by itself: its tokens would lengthen the path of one answer only.
        middle = min(max(shared, example.prompt_length), len(fed))
        pieces += [(start, path[:end]) for start, end in ((shared, middle), (middle, len(fed))) if start < end]
        paths[number], before = path, fed
    return np.array(ids, dtype=np.int64), np.array(positions, dtype=np.int64), paths, _bunched(pieces, len(ids), device)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _bunched(pieces: Sequence[tuple[int, IntArray]], tokens: int, device: torch.device) -> Tree:
    """Pad pieces of paths (start of the own tokens, path) to bunches of similar numbers of own tokens."""
    by_size: dict[int, list[tuple[int, IntArray]]] = {}
    for start, path in pieces:
        by_size.setdefault((len(path) - start).bit_length(), []).append((start, path))
    back = np.zeros(tokens, dtype=np.int64)
    bunches = []
    before = 0
    for chosen in by_size.values():
        queries, keys = max(len(path) - start for start, path in chosen), max(len(path) for _, path in chosen)
        own = np.zeros((len(chosen), queries), dtype=np.int64)
        seen = np.zeros((len(chosen), keys), dtype=np.int64)
        for row, (start, path) in enumerate(chosen):
            own[row, : len(path) - start], seen[row, : len(path)] = path[start:], path
            back[path[start:]] = np.arange(before, before + len(path) - start)
            before += queries
        starts = np.array([start for start, _ in chosen])[:, None, None]
        mask = np.arange(keys) <= starts + np.arange(queries)[:, None]
        placed = [torch.from_numpy(values).to(device) for values in (own.reshape(-1), seen.reshape(-1), mask[:, None])]
        bunches.append(Bunch(*placed))
    return Tree(tuple(bunches), torch.from_numpy(back).to(device))


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

    A few groups are read in three ways: as a tree, each answer alone, and as a tree whose tokens attend to themselves only. A
    model whose attention can be replaced gives equal logits in the first two and others in the third. Some models do not let it
    be replaced, or mix tokens in other ways. A model whose output does not depend on what came before shows nothing.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    if 0 < window <= max(len(example.input_ids) for example in examples):
        return False  # paths would replace the model's sliding window
    groups = [group[:4] for group in group_by_prompt(examples) if len(group) > 1][-PROBED:]
    if not groups:
        return False
    numbers = [number for group in groups for number in group]
    keep = accepts_logits_to_keep(model)
    together, alone = tree_row(numbers, examples, device), plain_rows(numbers, examples, pad_id, device)
    tokens = together.input_ids.shape[1]
    deaf = replace(together, tree=_bunched([(0, np.array([place])) for place in range(tokens)], tokens, device))
    try:
        read = [predicting_logits(model, rows, keep).float()[rows.which] for rows in (together, alone, deaf)]
    except Exception as problem:
        # Remote code may raise anything. Out of memory shows nothing, so answers are scored alone this time.
        return None if is_out_of_memory(problem) else False
    spread = float(read[1].std()) or 1.0
    error, difference = (float((other - read[1]).abs().max()) / spread for other in (read[0], read[2]))
    allowed = TOLERANCE[model.dtype]
    if not error <= allowed:
        return False
    return True if difference > 10 * allowed else None
