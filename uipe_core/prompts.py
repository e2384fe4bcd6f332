"""Questions and answers as tokens: one place decides where the prompt ends and the answer begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uipe_core.errors import UserError

IGNORED = -100
"""Label of tokens that carry no loss (prompt and padding)."""


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; the answer, end token included, starts at `prompt_length`."""

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


class PromptFormat:
    """Turns questions into prompts by the tokenizer's chat template or by a given template.

    Args:
        tokenizer: A fast or slow tokenizer of transformers, with an end-of-sequence token.
        template: Text containing ``{question}``; None for the tokenizer's own chat template.

    Raises:
        UserError: If no template is given and the tokenizer has none, or there is no end token.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        if template is None and not tokenizer.chat_template:
            raise UserError(
                f"model {name}: its tokenizer has no chat template, so the prompt format is unknown; give one in the study "
                "file as model.prompt_template: '[INST] {question} [/INST]' or on the command line as --prompt-template"
            )
        if template is not None and "{question}" not in template:
            raise UserError(f"prompt_template: {template!r} does not contain {{question}}")
        if tokenizer.eos_token_id is None:
            raise UserError(f"model {name}: its tokenizer has no end-of-sequence token; answers could not end")
        self.tokenizer = tokenizer
        self.template = template

    @property
    def pad_id(self) -> int:
        """Id used for padding; its value never matters because padding is masked."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def prompt_text(self, question: str) -> str:
        """The prompt as text, up to and including the cue to answer."""
        if self.template is not None:
            return self.template.replace("{question}", question)
        message = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt. Chat templates write special tokens themselves; plain templates have them added."""
        return self._ids(self.prompt_text(question), special=self.template is not None)

    def encode(self, question: str, answer: str) -> Example:
        """Prompt and answer as one sequence that ends in the end token.

        They are tokenized together, as TOFU's code does, unless the tokenizer would merge the end of the prompt with the
        start of the answer: then they are tokenized apart, so that an answer's loss never includes prompt tokens.
        """
        prompt = self.prompt_ids(question)
        together = self._ids(self.prompt_text(question) + answer, special=self.template is not None)
        if together[: len(prompt)] != prompt:
            together = prompt + self._ids(answer, special=False)
        return Example((*together, self.eos_id), len(prompt))

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    Attributes:
        input_ids: (b, t) token ids.
        labels: (b, t) token ids of the answers, `IGNORED` elsewhere; position i is predicted from position i - 1.
        attention_mask: (b, t) 1 for tokens, 0 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


def pad_batch(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pads examples on the right to the longest of them."""
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids)
        end, start = len(ids), example.prompt_length
        input_ids[row, :end] = ids
        labels[row, start:end] = ids[start:]
        mask[row, :end] = 1
    return Batch(input_ids.to(device), labels.to(device), mask.to(device))
