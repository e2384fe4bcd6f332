"""Look at a model without its weights, and at data of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_core.corpora.files import DataSet, is_hub_name
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from uipe_core.corpora.types import Corpus
    from uipe_core.models.prompts import PromptFormat


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
