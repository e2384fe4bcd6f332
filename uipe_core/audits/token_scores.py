"""Read what a model says of each token of the answers to items, for `uipe_core.audits.membership`.

Costs one teacher-forced pass over the answers; each is read in a row of its own.
"""

from collections.abc import Sequence

import torch

from uipe_core.audits.membership import TokenScores
from uipe_core.corpora.types import Item
from uipe_core.models.loading import LoadedModel
from uipe_core.models.transformers_compat import accepts_logits_to_keep
from uipe_core.scoring.batch_sizes import USUAL, BatchSize
from uipe_core.scoring.half_precision import fast_products
from uipe_core.scoring.packing import Group, batched, one_per_row, plain_rows, predicting_logits

WIDENED = 256
"""Distributions computed at once in fp32: 128 MiB at a vocabulary of 128,000."""


@torch.inference_mode()
def read_token_scores(loaded: LoadedModel, items: Sequence[Item], size: BatchSize | None = None) -> list[TokenScores]:
    """Return what a model says of the answer of each item, in order.

    Args:
        loaded: The model with its current weights.
        items: Questions with answers.
        size: Rows per batch; `USUAL` by default.
    """
    model = loaded.model
    model.eval()
    examples = [loaded.prompts.encode_item(item) for item in items]
    keep = accepts_logits_to_keep(model)
    found: dict[int, TokenScores] = {}

    def read(groups: list[Group]) -> None:
        numbers = [number for group in groups for number in group]
        rows = plain_rows(numbers, examples, loaded.prompts.pad_id, loaded.device)
        logits = predicting_logits(model, rows, keep)
        parts = []
        for part, targets in zip(logits.split(WIDENED), rows.targets.split(WIDENED), strict=True):
            logs = part.float().log_softmax(dim=-1)
            probabilities = logs.exp()
            means = (probabilities * logs).sum(dim=-1)
            variances = (probabilities * (logs - means[:, None]).square_()).sum(dim=-1)
            chosen = logs.gather(-1, targets.to(logs.device)[:, None])[:, 0]
            parts.append(torch.stack([chosen, means, variances.sqrt()]).double().cpu())
        columns = torch.cat(parts, dim=1).split(list(rows.lengths), dim=1)
        found.update({number: TokenScores(*own.numpy()) for number, own in zip(numbers, columns, strict=True)})

    with fast_products(model.dtype, loaded.device):
        (size or BatchSize(USUAL)).run(
            one_per_row(examples), read, split=batched, count_rows=lambda batch: sum(map(len, batch))
        )
    return [found[number] for number in range(len(examples))]
