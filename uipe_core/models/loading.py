"""Load causal language models by hub name or folder, and identify their weights."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from uipe_core.errors import UserError, first_line
from uipe_core.models.prompts import PromptFormat
from uipe_core.models.transformers_compat import keep_weights_as_loaded
from uipe_core.storage.files import file_hash, read_json
from uipe_core.storage.safetensors_files import parts, weight_files

UNREADABLE = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError)
"""What transformers raises for a damaged config.json."""

_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")
"""Files that make a model."""

ADAPTER_FILE = "adapter_config.json"
"""Configuration of an adapter, by which its folder is known."""

BASE_FOLDER = "base_model"
"""Folder of an adapter that holds the model it belongs on, where that has no name elsewhere."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """A model ready to score or train, with its tokenizer and prompt format."""

    model: Any
    tokenizer: Any
    prompts: PromptFormat

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, where inputs go, also for a model spread over several."""
        return torch.device(self.model.get_input_embeddings().weight.device)


def resolve_device(name: str) -> torch.device:
    """Return the torch device of a name; ``auto`` is the first CUDA device, or the CPU if there is none.

    Raises:
        UserError: If the name is invalid, or the CUDA device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise UserError(f"model.device: {name!r} asked for, but this process sees {seen} CUDA devices; use auto or cpu")
    return device


def set_threads(threads: int) -> None:
    """Set torch's threads for this process. Small models want 1 per worker: two under contention were 5 times slower."""
    torch.set_num_threads(threads)


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    prompt_template: str | None = None,
    prompt_format: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, str] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer from the hub or a folder.

    Args:
        source: Hub name or folder; of an adapter, which is loaded onto its base model: that in its `BASE_FOLDER`, or the one it
            names.
        revision: Branch, tag or commit on the hub.
        dtype: ``auto`` (as stored) or a key of `DTYPES`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        prompt_template: Text with ``{question}``.
        prompt_format: Key of `uipe_core.models.prompts.FORMATS`; by default the tokenizer's chat template.
        trust_remote_code: Run code that comes with the model.
        device_map: Spread a model for scoring over several devices, in place of `device`: ``auto`` (whole layers over all GPUs
            of this process) or devices by module, as in transformers.

    Raises:
        UserError: If it cannot be found or read, lacks weights, has no known prompt format, or does not fit its devices.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    where = resolve_device(device)
    folder = _local_folder(source)
    if folder is not None:
        _require_inside(folder)
    place = str(folder or source)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = _tokenizer(source, place, **common)
    adapter = folder if folder is not None and (folder / ADAPTER_FILE).is_file() else None
    carried = adapter is not None and (adapter / BASE_FOLDER / "config.json").is_file()
    if adapter is not None and not carried:
        common["revision"] = read_json(adapter / ADAPTER_FILE).get("revision")
    # Before reading the weights, which may take minutes.
    prompts = PromptFormat(tokenizer, prompt_template, prompt_format)
    if device_map is not None:
        common["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(adapter / BASE_FOLDER) if adapter is not None and carried else place,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            output_loading_info=True,
            **common,
        )
        if adapter is not None and carried:
            model.load_adapter(str(adapter))
    except (*UNREADABLE, RuntimeError, SafetensorError) as error:
        raise _cannot_load(source, error) from error
    if loading["missing_keys"]:
        # transformers fills them with random numbers and only logs it.
        missing = sorted(loading["missing_keys"])
        raise UserError(f"model {source}: its files lack {len(missing)} weights, first {missing[0]}; fetch or save it again")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not all(torch.isfinite(part).all() for part in parts(parameter.detach())):
            raise UserError(
                f"model {source}: {name} is not finite; it diverged or is damaged, so give another or fetch it again"
            )
    model.eval()
    keep_weights_as_loaded(model)
    if device_map is None:
        model.to(where)
    elif any(parameter.is_meta for parameter in model.parameters()):
        # Offloaded weights are copied in again for every pass, so writing update vectors would change nothing.
        raise UserError(f"model {source}: does not fit into its {torch.cuda.device_count()} GPUs; raise resources.trial.gpus")
    return LoadedModel(model, tokenizer, prompts)


def _require_inside(folder: Path) -> None:
    """Raise UserError for an index with shards elsewhere: a folder's identity must cover everything that is loaded."""
    for stem in ("model", "adapter_model"):
        if (folder / f"{stem}.safetensors.index.json").is_file():
            weight_files(folder, stem)


def _cannot_load(source: str, error: Exception) -> UserError:
    return UserError(f"model {source}: cannot be loaded: {first_line(error)}")


def _local_folder(source: str) -> Path | None:
    """Return the folder named by `source`, or None if it is a name on the hub."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith((".", "/", "~")):
            raise UserError(f"model {source}: no such folder")
        return None
    if not (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"model {source}: the folder has no config.json, so it is not a saved model")
    if (folder / ADAPTER_FILE).is_file() and any(folder.glob("model*.safetensors")):
        raise UserError(
            f"model {source}: it holds a whole model and an adapter_config.json, for which transformers would load the "
            "adapter's base model in its place; move adapter_config.json away"
        )
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
        _require_mapping(source, folder / name)
    return folder


def _require_mapping(source: str, path: Path) -> None:
    """Raise UserError for a JSON file of a model that is none, or holds no object: transformers takes that for granted."""
    if not path.exists():
        return
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        why = first_line(error) if isinstance(error, OSError) else f"not a valid JSON file ({first_line(error)})"
        raise UserError(f"model {source}: its {path.name} cannot be read: {why}; save the model again") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UserError(f"model {source}: its {path.name} holds a {kind}, and must hold an object; save the model again")


def brings_code(folder: Path) -> bool:
    """Return True if a model's folder names code of its own, which only runs where it is trusted."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = read_json(folder / name)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("auto_map"):
            return True
    return False


def check_model_folder(source: str, prompt_template: str | None, prompt_format: str | None) -> PromptFormat:
    """Check a model folder without reading its weights or running code of its own; return its prompt format.

    Raises:
        UserError: If it is missing, no saved model, has no weights, or its tokenizer cannot write the prompt format.
    """
    folder = _local_folder(source)
    if folder is None:
        raise UserError(f"model {source}: no such folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {source}: the folder has no *.safetensors weights; save the model again as safetensors")
    _require_inside(folder)
    # Never None, for which transformers asks on the terminal.
    return PromptFormat(_tokenizer(source, str(folder), trust_remote_code=False), prompt_template, prompt_format)


def _tokenizer(source: str, place: str, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, **settings)
    except Exception as error:  # tokenizers raises plain Exceptions, damaged files KeyError, TypeError and others
        if isinstance(error, OSError) and not Path(place).is_dir():
            raise _cannot_load(source, error) from error  # no such name on the hub
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"model {source}: its tokenizer cannot be loaded ({said}); fetch or save the tokenizer's files again"
        ) from error


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights only, as loading in that dtype does.

    ``model.to(dtype)`` would also round buffers such as Llama's rotary frequencies.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is loaded.

    Attributes:
        location: Folder, or hub name.
        identity: Which weights, wherever they are: content hash of a folder, cache key of a tiny model, or ``name@commit`` of
            the hub.
        revision, dtype, device, prompt_template, prompt_format, trust_remote_code, device_map: As in `load_model`.
    """

    location: str
    identity: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    prompt_template: str | None = None
    prompt_format: str | None = None
    trust_remote_code: bool = False
    device_map: str | None = None

    def prompts(self) -> PromptFormat:
        """Load the tokenizer alone; raises as `load_model`."""
        settings = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return PromptFormat(_tokenizer(self.location, self.location, **settings), self.prompt_template, self.prompt_format)

    def load(self, dtype: str | None = None) -> LoadedModel:
        """Load the model; `dtype` overrides that of the source (training starts from the weights as stored)."""
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return load_model(self.location, **{**settings, "dtype": dtype or self.dtype})


def model_identity(location: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return the identity of a model's weights, and the revision that pins them.

    A folder is hashed (config, tokenizer and weights; of an adapter also the base model it carries). A hub model is fetched and
    identified by its commit.

    Raises:
        UserError: If the folder is missing or holds no model, or the hub cannot be reached and its cache lacks the model.
    """
    folder = _local_folder(location)
    if folder is not None:
        digest = hashlib.sha256()
        carried = (folder / BASE_FOLDER).glob("*") if (folder / ADAPTER_FILE).is_file() else ()
        for path in sorted([*folder.iterdir(), *carried]):
            if path.suffix in _SUFFIXES:
                digest.update(f"{path.relative_to(folder).as_posix()}:{file_hash(path)};".encode())
        return f"sha256:{digest.hexdigest()[:32]}", None
    commit = _from_hub(location, revision)[1]
    return f"{location}@{commit}", commit


def model_folder(location: str, revision: str | None = None) -> Path:
    """Return the folder with a model's files, fetched from the hub if needed; raise UserError as `model_identity`."""
    folder = _local_folder(location)
    return folder if folder is not None else _from_hub(location, revision)[0]


def _from_hub(location: str, revision: str | None) -> tuple[Path, str]:
    """Return folder and commit of a model from the hub."""
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            location, revision=revision, allow_patterns=[*(f"*{suffix}" for suffix in _SUFFIXES), "README.md"]
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {location}: cannot be fetched from the hub ({type(error).__name__}); check the name and the network, or "
            "give the folder of a downloaded copy"
        ) from error
    return Path(downloaded), Path(downloaded).name
