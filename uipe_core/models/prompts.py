"""Tokenize questions and answers: the one place that decides where the prompt ends and the answer begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uipe_core.corpora.types import Item
from uipe_core.errors import UserError, did_you_mean, first_line
from uipe_core.models.transformers_compat import special_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""Label of tokens without loss (prompt and padding)."""


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; the answer starts at `prompt_length` and includes the end token, if there is one."""

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class NamedFormat:
    """How a code base writes a question and its answer.

    Attributes:
        template: Text with ``{question}``; None for the tokenizer's chat template.
        answer_tag: Text before the answer that the model has to write: it has loss, the prompt ends before it.
        system: System prompt of the chat template.
        counted: Which tokens have loss if the tokenizer merges the end of the prompt with the start of the answer. True, as in
            both code bases: tokenize both together, and drop as many tokens as the prompt alone has.
    """

    template: str | None = None
    answer_tag: str = ""
    system: str | None = None
    counted: bool = False


FORMATS: dict[str, NamedFormat] = {
    "chat": NamedFormat(),
    "llama2": NamedFormat("[INST] {question} [/INST]", counted=True),
    "llama3": NamedFormat(system="You are a helpful assistant.", counted=True),
    "phi": NamedFormat("Question: {question}\n", answer_tag="Answer: ", counted=True),
}
"""Prompt formats by name.

``llama2`` and ``phi``: ``config/model_config.yaml`` and ``data_module.py`` of locuslab/tofu; ``llama2`` also
``configs/model/Llama-2-7b-chat-hf.yaml`` of open-unlearning. ``llama3``: ``configs/model/Llama-3.2-1B-Instruct.yaml`` and
``src/data/utils.py`` of open-unlearning. ``chat``: the tokenizer's chat template, without a system prompt.
"""

CHAT_DATE = "10 Apr 2025"
"""Date given to every chat template, open-unlearning's ``date_string``: a prompt must not change overnight."""

BETWEEN_TURNS = "\n\n"
"""Text between an answer and the next question where a plain template writes several."""

_PROBE = "Quokka"
"""An answer that occurs in no chat template."""


def prompt_schema(template: str | None) -> int:
    """Return a number that is raised with every change in this file that alters the tokens of a format.

    It is part of a base run's address, so that older base runs are not reused. 2: a template that begins with what the
    tokenizer puts in front has it once.
    """
    return 2 if template is not None and template.startswith("<") else 1


def format_named(name: str) -> NamedFormat:
    """Return the prompt format of that name; raise UserError with the known names for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"prompt_format: {name!r} is unknown; known: {', '.join(FORMATS)}.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


class PromptFormat:
    """Write prompts from questions, and examples with loss from questions and answers.

    Args:
        tokenizer: Of transformers, fast or slow, with an end-of-sequence token.
        template: Text with ``{question}``; answers end in the tokenizer's end-of-sequence token.
        name: Key of `FORMATS`; ``chat`` if neither template nor name is given.

    Raises:
        UserError: If both are given, the name is unknown, the chat template is missing or unsuitable, or there is no end token.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, name: str | None = None) -> None:
        if template is not None and name is not None:
            raise UserError("prompt_format and prompt_template are both given; remove one of them")
        if template is not None and "{question}" not in template:
            raise UserError(f"prompt_template: {template!r} does not contain {{question}}")
        self.tokenizer = tokenizer
        self.format = NamedFormat(template) if template is not None else format_named(name or "chat")
        model = getattr(tokenizer, "name_or_path", "") or "this model"
        if tokenizer.eos_token_id is None:
            raise UserError(f"model {model}: its tokenizer has no end-of-sequence token; answers could not end")
        self.end_id = self.eos_id
        self._model = f"model {model}"
        # Answers to one question come one after the other, and lengths are checked before scoring encodes the same answers.
        self._asked: tuple[str, str, list[int]] | None = None
        self._encoded: dict[tuple[str, str], Example] = {}
        if self.format.template is None:
            self._use_chat_template(self._model, name)
        else:
            front = self._tokens("", add=True)
            self._front = front[:-1] if front and front[-1] == self.eos_id else front
            whole = self._tokens(self.format.template.partition("{question}")[0], add=True)
            # A template may begin with what the tokenizer puts in front of every text.
            self._begins_twice = bool(self._front) and whole[: 2 * len(self._front)] == 2 * self._front

    def _use_chat_template(self, model: str, name: str | None) -> None:
        """Check that the chat template suits the format, and find how it ends an answer."""
        if not self.tokenizer.chat_template:
            what = "the prompt format is unknown" if name is None else f"prompt_format {name!r} cannot be used"
            raise UserError(
                f"{model}: its tokenizer has no chat template, so {what}; give model.prompt_format: llama2 or phi, or your own "
                "model.prompt_template: '[INST] {question} [/INST]' (on the command line --prompt-format, --prompt-template)"
            )
        template = str(self.tokenizer.chat_template)
        if "strftime_now" in template and "date_string" not in template:
            raise UserError(
                f"{model}: its chat template writes today's date, so its prompts would change overnight; "
                "give model.prompt_template"
            )
        prompt, conversation = self._chat("Who?"), self._chat("Who?", _PROBE)
        if self.format.system is not None and self.format.system not in prompt:
            raise UserError(
                f"{model}: its chat template leaves out the system prompt of prompt_format {name!r}; use prompt_format: chat"
            )
        if _PROBE not in conversation:
            raise UserError(f"{model}: its chat template leaves out answers; give model.prompt_format or model.prompt_template")
        self._tail = conversation.rpartition(_PROBE)[2]
        # The first special token, and of two that start there the longer one.
        special = special_tokens(self.tokenizer)
        found = min(((self._tail.index(text), -len(text), text) for text in special if text in self._tail), default=None)
        self._closing = "" if found is None else self._tail[: found[0] - found[1]]
        if found is not None:
            self.end_id = int(self.tokenizer.convert_tokens_to_ids(found[2]))

    @property
    def pad_id(self) -> int:
        """Id for padding; its value is irrelevant, because padding is masked."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generation: the answer's end token, and the tokenizer's end of sequence."""
        return list(dict.fromkeys((self.end_id, self.eos_id)))

    def prompt_text(self, question: str) -> str:
        """Return the prompt as text, including the cue to answer."""
        if self.format.template is not None:
            return self.format.template.replace("{question}", question)
        return self._chat(question)

    def prompt_ids(self, question: str) -> list[int]:
        """Return the token ids of the prompt. Chat templates contain their special tokens; plain templates get them added."""
        return list(self._prompt(question)[1])

    def _prompt(self, question: str) -> tuple[str, list[int]]:
        """Return the prompt as text and as token ids; that of the last question is kept."""
        if self._asked is None or self._asked[0] != question:
            text = self.prompt_text(question)
            self._asked = (question, text, self._ids(text))
        return self._asked[1:]

    def encode(self, question: str, answer: str) -> Example:
        """Tokenize prompt and answer as one sequence; the answer ends in exactly one end token, which has loss too.

        The end token is that of the chat template (``<|eot_id|>`` of Llama 3), else the tokenizer's end of sequence. Text that
        a template writes after it is left out.

        As in both code bases, prompt and answer are tokenized together. If the tokenizer would merge the end of the prompt with
        the start of the answer, formats with `NamedFormat.counted` follow the code base; others tokenize the two apart, so that
        an answer's loss never includes prompt tokens. Nothing is truncated: the code bases cut at 200 (scoring) or 500 and more
        tokens (training), which no item of TOFU reaches.
        """
        if (question, answer) not in self._encoded:
            self._encoded[question, answer] = self._encode(question, answer)
        return self._encoded[question, answer]

    def _encode(self, question: str, answer: str) -> Example:
        prompt_text, prompt = self._prompt(question)
        ids = self._joined(prompt_text, prompt, self._answer_text(prompt_text, question, answer))
        if ids[-1] != self.end_id:
            ids.append(self.end_id)
        return Example(tuple(ids), min(len(prompt), len(ids) - 1))

    def _joined(self, prompt_text: str, prompt: list[int], answer_text: str) -> list[int]:
        """Tokenize prompt and answer as one text, or apart where they would merge and the format does not count so."""
        ids = self._ids(prompt_text + answer_text)
        if ids[: len(prompt)] != prompt and not self.format.counted:
            return prompt + self._ids(answer_text, special=False)
        return ids

    def begun_ids(self, question: str, beginning: str) -> list[int]:
        """Return the token ids of a prompt and the beginning of an answer, for a model to go on with."""
        prompt_text, prompt = self._prompt(question)
        written = self._answer_text(prompt_text, question, beginning)
        if self.format.template is None:
            written = written.removesuffix(self._closing)
        return self._joined(prompt_text, prompt, written)

    def conversation_ids(self, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
        """Return the token ids of the prompt of a question that follows other questions with their answers.

        Plain templates have one turn, so theirs is repeated, with `BETWEEN_TURNS` after each answer.
        """
        if self.format.template is None:
            return self._ids(self._chat(question, turns=turns))
        before = [self.prompt_text(asked) + self.format.answer_tag + answer + BETWEEN_TURNS for asked, answer in turns]
        return self._ids("".join(before) + self.prompt_text(question))

    def encode_item(self, item: Item) -> Example:
        """Tokenize an item's question and answer; a plain item without prompt format and end token, cut at its length."""
        return (
            _cut(self.encode_plain(item.question, item.answer), item) if item.plain else self.encode(item.question, item.answer)
        )

    def encode_answer(self, item: Item, answer: str) -> Example:
        """Tokenize an item's question with any answer for scoring: as `encode_item`, behind `item_prompt_ids`."""
        if not item.plain:
            return self.encode(item.question, answer)
        example, start = _cut(self.encode_plain(item.question, answer), item), self.item_prompt_ids(item)
        return example if example.prompt_length else Example((*start, *example.input_ids), len(start))

    def item_prompt_ids(self, item: Item) -> list[int]:
        """Return the token ids that an item's answer follows when it is scored; of an empty text the end token, as in
        lm-evaluation-harness: its first token is predicted from one before it. In training that token is not counted."""
        if not item.plain:
            return self.prompt_ids(item.question)
        return self._ids(item.question, special=True) or [self.eos_id]

    def encode_plain(self, text: str, continuation: str) -> Example:
        """Tokenize a text and its continuation without prompt format, with the tokenizer's special tokens in front.

        Tokenized together unless a token would span the border, as in `encode`.
        """
        start = self._ids(text, special=True)
        together = self._ids(text + continuation, special=True)
        if together[: len(start)] != start:
            together = start + self._ids(continuation, special=False)
        return Example(tuple(together), len(start))

    def _answer_text(self, prompt: str, question: str, answer: str) -> str:
        """Return the text after the prompt, including the end token, spaced and trimmed by the chat template."""
        if self.format.template is not None:
            return self.format.answer_tag + answer
        conversation = self._chat(question, answer)
        # Templates of reasoning models write text into a prompt that they drop from a conversation.
        written = conversation.removeprefix(prompt) if conversation.startswith(prompt) else answer + self._tail
        return written.removesuffix(self._tail) + self._closing

    def _chat(self, question: str, answer: str | None = None, turns: Sequence[tuple[str, str]] = ()) -> str:
        """Return the chat template's prompt for a question or, with an answer, the whole conversation; earlier turns first."""
        messages = [{"role": "user", "content": question}]
        for asked, given in reversed(turns):
            messages[:0] = [{"role": "user", "content": asked}, {"role": "assistant", "content": given}]
        if self.format.system is not None:
            messages.insert(0, {"role": "system", "content": self.format.system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        write = self.tokenizer.apply_chat_template
        try:
            return str(write(messages, tokenize=False, add_generation_prompt=answer is None, date_string=CHAT_DATE))
        except Exception as error:  # a template is a program, and may raise anything
            name = next(name for name, known in FORMATS.items() if known is self.format)
            raise UserError(
                f"{self._model}: its chat template cannot write a question in prompt_format {name!r}: {first_line(error)}; "
                "use chat, or another format"
            ) from error

    def _ids(self, text: str, special: bool | None = None) -> list[int]:
        add = self.format.template is not None if special is None else special
        ids = self._tokens(text, add)
        if special is None and add and self._begins_twice:
            ids = ids[len(self._front) :]
        # Some tokenizers add an end token, even to a prompt.
        return ids[:-1] if add and ids and ids[-1] == self.eos_id else ids

    def _tokens(self, text: str, add: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add)["input_ids"])
        except Exception as error:  # tokenizers raises plain Exceptions
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{self._model}: its tokenizer cannot encode {text[:80]!r} ({said}); correct the text") from error


def _cut(example: Example, item: Item) -> Example:
    """Return the example of a plain item with an answer of `Item.length` tokens at most."""
    if item.length is None:
        return example
    return Example(example.input_ids[: example.prompt_length + item.length], example.prompt_length)


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    Attributes:
        input_ids: (b, t) token ids.
        labels: (b, t) token ids of the answers, `IGNORED` elsewhere; position i is predicted from position i - 1.
        attention_mask: (b, t) 1 for tokens, 0 for padding.
    """

    input_ids: "Tensor"
    labels: "Tensor"
    attention_mask: "Tensor"


def pad_batch(examples: Sequence[Example], pad_id: int, device: "torch.device | str" = "cpu") -> Batch:
    """Pad examples on the right to the longest of them."""
    import torch

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
