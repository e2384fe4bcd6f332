"""Write texts of a model, greedy or sampled; several samples of each item show leak@k.

Sampling shows whether an answer that greedy text does not give comes back in one of k samples, as users of a chat get them.
It cannot show rarer leaks than about one in k, nor leaks under other prompts. It costs k texts for each item: at most
items * k * limit generated tokens, and the prompt is read once for each text.

Each text has random numbers of its own, drawn before: a token is where the cumulated probabilities pass its number. So a text
depends neither on its batch nor, up to rounding, on the device, and the first k of more samples are the same k.

Source: leak@k of Reisizadeh et al. 2025 (arXiv 2511.04934): the expected highest score of k samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.models.transformers_compat import position_limit
from uipe_core.scoring.batch_sizes import USUAL, BatchSize
from uipe_core.scoring.generation import Choose, GreedyText, complete, most_likely
from uipe_core.scoring.half_precision import fast_products


@dataclass
class SampledText(GreedyText):
    """A sampled text in progress.

    Attributes:
        draws: Random numbers in [0, 1), one for each token.
    """

    draws: Sequence[float] = ()


def sampler(temperature: float = 1.0) -> Choose:
    """Return a choice of tokens in proportion to their probabilities, by the draws of `SampledText`.

    Args:
        temperature: Divides the logits; above 0.
    """

    def choose(logits: Tensor, texts: Sequence[GreedyText], ahead: int) -> Tensor:
        # In double precision: a sum over 100,000 tokens in fp32 loses those below 1e-7.
        cumulated = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        rows = cast(Sequence[SampledText], texts)
        # Finished texts of a batch are fed too, beyond their last draw.
        drawn = [row.draws[min(len(row.tokens) + ahead, len(row.draws) - 1)] for row in rows]
        marks = torch.tensor(drawn, dtype=cumulated.dtype, device=cumulated.device)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, marks, right=True)[:, 0].clamp_max(cumulated.shape[-1] - 1)

    return choose


@torch.inference_mode()
def write_texts(
    loaded: LoadedModel, texts: Sequence[GreedyText], size: BatchSize | None = None, choose: Choose = most_likely
) -> list[str]:
    """Generate texts and return them, in order.

    Args:
        loaded: The model with its current weights.
        texts: Prompts and limits; completed in place.
        size: Rows per batch; `USUAL` by default.
        choose: Chooses the next tokens.

    Raises:
        UserError: A prompt with its text has more tokens than the model has positions.
    """
    loaded.model.eval()
    limit = position_limit(loaded.model.config)
    # The last token is not fed.
    longest = max((len(text.prompt) + text.limit - 1 for text in texts), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"a prompt and its text have up to {longest} tokens, and the model has {limit} positions; ask for shorter "
            "texts, or leave out this way to ask"
        )
    prompts = loaded.prompts
    with fast_products(loaded.model.dtype, loaded.device):
        complete(loaded.model, texts, prompts.stop_ids, prompts.pad_id, size or BatchSize(USUAL), choose)
    found = prompts.tokenizer.batch_decode([text.tokens for text in texts], skip_special_tokens=True)
    return [str(text) for text in found]


def samples(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    limit: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    size: BatchSize | None = None,
) -> list[list[str]]:
    """Return k sampled texts for each of n prompts, for `uipe_core.audits.texts.judge`.

    Args:
        loaded: The model with its current weights.
        prompts: Token ids, as `PromptFormat.item_prompt_ids` or `uipe_core.audits.prompts.ask` gives them.
        count: Samples k of each, at least 1.
        limit: Most tokens of a text.
        temperature: Divides the logits; above 0.
        seed: Of the random numbers.
        size: Rows per batch.

    Raises:
        UserError: Count or temperature are too small, or a prompt with its text has more tokens than the model has positions.
    """
    if count < 1:
        raise UserError(f"sampling: {count} samples of each item asked for; ask for at least 1")
    if not temperature > 0:
        raise UserError(f"sampling: temperature {temperature} is not above 0; greedy text is scored without this audit")
    texts = []
    for sample in range(count):
        # A generator for each round, so that more samples leave the first ones as they are.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        draws = torch.rand((len(prompts), limit), dtype=torch.float64, generator=generator).tolist()
        texts += [SampledText(list(prompt), limit, [], draws=own) for prompt, own in zip(prompts, draws, strict=True)]
    written = write_texts(loaded, texts, size, sampler(temperature))
    return [written[place :: len(prompts)] for place in range(len(prompts))]
