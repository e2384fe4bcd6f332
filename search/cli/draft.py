"""Write a first study file for a model and data of one's own: what can be seen of them decides, comments say why."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_core.corpora.files import DataSet, is_hub_name
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from uipe_core.corpora.types import Corpus
    from uipe_core.models.prompts import PromptFormat

LARGE = 1_000_000_000
"""Parameters from which on 1e-5 is the usual learning rate of full fine-tuning (docs/real_models.md)."""

LONGEST_TEXT = 512
"""Tokens generated for an answer, however long the longest answer is: generation is what a trial costs."""

ENOUGH_FOR_HALVES = 200
"""Forget items from which on each half has 100, which forget quality needs."""

_PLAIN = re.compile(r"(\.{0,2}/|package:)[\w./-]+|[A-Za-z][\w.-]*/[\w./-]+|(?!true|false|null)[a-z][a-z_-]+")

LORA = "{rank: 8, alpha: 16, target_modules: all-linear}"
LORA_RATE = 1e-4

SEARCH = f"""search:
{"  alpha: {low: -1, high: 2}":<40} # 0 is the unlearned epoch itself, -1 the initial model
{"  trials: 25":<40} # beyond the points at alpha = 0; none of them trains anything
  sampler: line
"""


@dataclass(frozen=True)
class SeenModel:
    """A model as far as it can be seen without its weights.

    Attributes:
        place: Absolute path or hub name.
        folder: Where its configuration is; None for a model of the hub that is not on this machine.
        architecture: Class of the model.
        dtype: Dtype of its weights as a study file names it; ``auto`` where it is none that is scored in.
        parameters: Their number.
        has_chat_template: Its tokenizer has a chat template that can be used.
        tokenizer: The tokenizer.
    """

    place: str
    folder: str | None = None
    architecture: str = ""
    dtype: str = "auto"
    parameters: int = 0
    has_chat_template: bool = True
    tokenizer: Any = None

    def prompts(self, prompt_format: str | None, template: str | None) -> "PromptFormat | None":
        """Return how questions are written; None without tokenizer.

        Raises:
            UserError: There is no such format, or the tokenizer cannot write it.
        """
        from uipe_core.models.prompts import PromptFormat, format_named

        if prompt_format is not None:
            format_named(prompt_format)
        return None if self.tokenizer is None else PromptFormat(self.tokenizer, template, prompt_format)


def look_at(value: str) -> SeenModel:
    """Read configuration and tokenizer of a model; a GGUF file is dequantised into the cache, as a study would do.

    Raises:
        UserError: There is no such model, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from search.spec.models import model_place
    from search.spec.sections import is_local
    from uipe_core.models.gguf import gguf_folder, is_gguf
    from uipe_core.models.loading import DTYPES
    from uipe_core.models.prompts import PromptFormat
    from uipe_core.models.skeleton import meta_model
    from uipe_core.storage.content_store import ContentStore
    from uipe_core.storage.files import cache_folder

    place = model_place(value)
    folder = str(gguf_folder(Path(place), ContentStore(cache_folder("models")))) if is_gguf(place) else place
    try:
        skeleton = meta_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        if is_local(place):
            raise
        return SeenModel(place)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"model {value}: its tokenizer cannot be loaded ({type(error).__name__}); save it again") from error
    try:
        PromptFormat(tokenizer)
        has_template = True
    except UserError:
        has_template = False
    names: dict[Any, str] = {dtype: name for name, dtype in DTYPES.items()}
    return SeenModel(
        place,
        folder,
        type(skeleton).__name__,
        names.get(getattr(skeleton.config, "dtype", None), "auto"),
        sum(parameter.numel() for parameter in skeleton.parameters()),
        has_template,
        tokenizer,
    )


def data_place(value: str) -> str:
    """Return where data that a command line names is: an absolute path, or a name on the hub.

    Raises:
        UserError: It is neither.
    """
    path = Path(value).expanduser()
    if path.exists():
        return str(path.resolve())
    if is_hub_name(value):
        return value
    raise UserError(f"data {value}: there is no such file or folder; correct the path, or give owner/name of the hub")


def load_data(forget: str, retain: str) -> "Corpus":
    """Load data to forget and to keep; raises UserError with everything that is wrong with it."""
    from uipe_core.corpora.questions import load_questions

    return load_questions({"forget": DataSet(forget, split="train"), "retain": DataSet(retain, split="train")})


@dataclass(frozen=True)
class Draft:
    """A study that is to be written.

    Attributes:
        to: File it is written to: local paths below its folder become relative.
        model: What it starts from.
        given: The model as the command line names it.
        forget, retain: Data.
        retain_model: Model that never saw the forget data, or its evaluation log.
        finetune: The model does not know the data yet.
        prompt_format, prompt_template: How questions are asked; both None for the chat template.
        items: Items to forget.
        longest: Tokens of the longest answer; None where it is not known.
        adapter: LoRA in place of full fine-tuning.
        gpus: GPUs a trial and a base run hold: 0 or 1.
        cores: CPU cores they hold.
        misfits: What does not fit on this machine.
    """

    to: Path
    model: SeenModel
    given: str
    forget: str
    retain: str
    retain_model: str | None = None
    finetune: bool = False
    prompt_format: str | None = None
    prompt_template: str | None = None
    items: int = 0
    longest: int | None = None
    adapter: bool = False
    gpus: int = 0
    cores: int = 1
    bfloat16_speed: float | None = None
    misfits: tuple[str, ...] = ()

    def variants(self, cores: int, gpus: int) -> list["Draft"]:
        """Return the ways to run it, the preferred one first: full fine-tuning before LoRA, many at once before one."""
        if gpus:
            shares = [(1, max(1, cores // gpus))]
        else:
            shares = [(0, 1), (0, cores)] if cores > 1 else [(0, 1)]
        return [replace(self, adapter=lora, gpus=gpu, cores=core) for lora in (False, True) for gpu, core in shares]

    def text(self) -> str:
        """Return the study file."""
        sections = (self._head(), self._corpus(), self._model(), self._objectives(), self._unlearning())
        return "\n".join((*sections, self._scoring(), SEARCH, self._resources()))

    def _head(self) -> str:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self.to.stem).strip(".")[:64] or "study"
        seen = self.model
        size = f"{seen.architecture}, {seen.parameters / 1e6:,.3g} million parameters" if seen.folder else "not on this machine"
        lines = [
            f"# {_one_line(self.given)} ({size})",
            f"# forgets {self.items or 'the'} items of your data. Written by uipe init; every key is in docs/study_file.md.",
            "# After a change: uipe validate checks it, uipe plan says what it will cost.",
            *(f"# Does not fit on this machine: {_one_line(text)}" for text in self.misfits),
        ]
        return "\n".join([*lines, "schema_version: 1", f"name: {_text(name)}", "seed: 0", ""])

    def _corpus(self) -> str:
        return f"""corpus:
  kind: questions
  forget: {self._path(self.forget)}
  retain: {self._path(self.retain)}
  # Evaluated only, where you have it: general (knowledge to keep), holdout (items no model saw),
  # related (facts from which the forgotten ones follow), unrelated (facts that have nothing to do with them).
"""

    def _model(self) -> str:
        place = self.given if self.given.startswith("package:") else self.model.place
        lines = ["model:"]
        if self.finetune:
            rate = 2 * LORA_RATE if self.adapter else 2e-5 if self.model.parameters >= LARGE else 2e-4
            lora = f", adapter: {LORA}" if self.adapter else ""
            lines += [
                _with("  kind: finetuned", "the base model learns the data first, and again without forget"),
                f"  base: {self._path(place)}",
                f"  finetune: {{epochs: 5, learning_rate: {_number(rate)}, batch_size: 4{lora}}}",
            ]
        else:
            lines += ["  kind: pretrained", f"  initial: {self._path(place)}"]
            none = "  # retain: a model that never saw the forget data, or its evaluation log (*.json)"
            lines += [none if self.retain_model is None else f"  retain: {self._path(self.retain_model)}"]
        if self.prompt_template is not None:
            lines += [f"  prompt_template: {json.dumps(self.prompt_template, ensure_ascii=False)}"]
        elif self.prompt_format is not None:
            lines += [f"  prompt_format: {self.prompt_format}"]
        else:
            known = "the tokenizer's chat template" if self.model.folder else "not seen: the model is not on this machine"
            lines += [_with("  prompt_format: chat", known)]
        dtype = f"  dtype: {self.model.dtype}"
        if self.bfloat16_speed is not None:
            dtype = _with(
                "  dtype: bfloat16", f"measured here: {self.bfloat16_speed:.1f} times as fast as float32, and rounded"
            )
        return "\n".join([*lines, dtype, "  device: auto", ""])

    def _objectives(self) -> str:
        compared = self.finetune or self.retain_model is not None
        forgetting = (
            _with("  forgetting: log10_forget_quality", "compares with the retain model; memorization needs none")
            if compared
            else _with("  forgetting: memorization", "log10_forget_quality would need a retain model")
        )
        return "\n".join([_with("objectives:", "uipe objectives lists others"), forgetting, "  utility: retain_utility", ""])

    def _unlearning(self) -> str:
        rate = LORA_RATE if self.adapter else 1e-5 if self.model.parameters >= LARGE else 2e-5
        lines = [
            "unlearning:",
            _with("  methods:", "a list in place of a number gives one base run per value"),
            "    grad_diff: {retain_weight: 1}",
            "    npo: {beta: 0.1, retain_weight: 1}",
            _with("    kl_min: {retain_weight: 1}", "more: wga, undial, simnpo, idk_dpo, rmu, ... (docs/methods.md)"),
            _with("  epochs: 5", "each gives an update vector, from which the search walks"),
            _with(f"  learning_rate: {_number(rate)}", "a list tries several"),
            "  batch_size: 4",
            f"  adapter: {LORA}  # null trains all weights"
            if self.adapter
            else _with("  adapter: null", f"trains all weights; LoRA: {LORA}"),
        ]
        return "\n".join([*lines, ""])

    def _scoring(self) -> str:
        lines = ["scoring:", f"  batch_size: {'auto' if self.gpus else 32}"]
        if self.longest is not None:
            tokens = min(self.longest, LONGEST_TEXT)
            lines.append(_with(f"  max_new_tokens: {tokens}", f"the longest answer has {self.longest} tokens"))
        halves = "split: {select: 0.5}"
        if self.items >= ENOUGH_FOR_HALVES:
            halves = _with(halves, "trials see one half of the items, the front is reported on the other")
        else:
            halves = _with(f"# {halves}", f"from {ENOUGH_FOR_HALVES} forget items on: keeps the other half for reporting")
        return "\n".join([*lines, "", halves, ""])

    def _resources(self) -> str:
        holds = f"{{cpus: {self.cores}, gpus: {self.gpus}, threads: {self.cores}}}"
        lines = [_with("resources:", "as many at once as fit on the machine or cluster"), f"  trial: {holds}"]
        budget = _with("budget: {}", "no limit but search.trials; for example {hours: 12, plateau: {trials: 30}}")
        return "\n".join([*lines, f"  base_run: {holds}", "", budget, ""])

    def _path(self, place: str) -> str:
        """Return a place as the file names it: relative where it is below the file's folder."""
        path, here = Path(place), self.to.parent.resolve()
        return _text(f"./{path.relative_to(here)}" if path.is_absolute() and path.is_relative_to(here) else place)


def _with(line: str, comment: str) -> str:
    """Return a line with a comment, in the column of all comments."""
    return f"{line:<40} # {comment}"


def _text(value: str) -> str:
    """Return a text as YAML, in quotes where it might be read as something else."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(value: float) -> str:
    return f"{value:.7f}".rstrip("0")
