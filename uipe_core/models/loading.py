"""Causal language models: loaded by name or folder, or small ones built and trained here."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uipe_core.errors import UserError, first_line
from uipe_core.models.prompts import PromptFormat
from uipe_core.storage.files import file_hash
from uipe_core.storage.safetensors_files import weight_files

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
        """Where its inputs go: the device of its embeddings, also of a model that is spread over several."""
        return torch.device(self.model.get_input_embeddings().weight.device)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        UserError: If it is no device's name, or a CUDA device is asked for that is not there.
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
    """Sets torch's threads for this process. Small models want 1 per worker: two under contention were 5 times slower."""
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
    """Loads a causal language model and its tokenizer from the hub or a folder.

    Args:
        source: Hub name or folder.
        revision: Branch, tag or commit on the hub.
        dtype: ``auto`` (as stored) or a key of `DTYPES`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        prompt_template: Text with ``{question}``.
        prompt_format: Key of `uipe_core.models.prompts.FORMATS`; with neither of the two it is the tokenizer's chat template.
        trust_remote_code: Whether code that comes with the model may run.
        device_map: For a model spread over several devices, in place of `device`: ``auto`` (over all GPUs of this process,
            whole layers each) or devices by module, as transformers takes it. Such a model is for scoring.

    Raises:
        UserError: If it cannot be found or read, lacks weights, no prompt format is known, or it does not fit its devices.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    where = resolve_device(device)
    folder = _local_folder(source)
    if folder is not None:
        _require_inside(folder)
    place = str(folder or source)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    unreadable = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
    except unreadable as error:
        raise _cannot_load(source, error) from error
    # Before the weights are read: that may take minutes.
    prompts = PromptFormat(tokenizer, prompt_template, prompt_format)
    if device_map is not None:
        common["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            place, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True, output_loading_info=True, **common
        )
    except unreadable as error:
        raise _cannot_load(source, error) from error
    if loading["missing_keys"]:
        # transformers fills them with random numbers and only logs it.
        missing = sorted(loading["missing_keys"])
        raise UserError(f"model {source}: its files lack {len(missing)} weights, first {missing[0]}; fetch or save it again")
    model.eval()
    if device_map is None:
        model.to(where)
    elif any(parameter.is_meta for parameter in model.parameters()):
        # What lies on the host's memory or disk is brought in anew for every pass: writing update vectors would change nothing.
        raise UserError(f"model {source}: does not fit into its {torch.cuda.device_count()} GPUs; raise resources.trial.gpus")
    return LoadedModel(model, tokenizer, prompts)


def _require_inside(folder: Path) -> None:
    """Refuses an index whose shards lie elsewhere: what is loaded must be what the identity of the folder covers."""
    for stem in ("model", "adapter_model"):
        if (folder / f"{stem}.safetensors.index.json").is_file():
            weight_files(folder, stem)


def _cannot_load(source: str, error: Exception) -> UserError:
    return UserError(f"model {source}: cannot be loaded: {first_line(error)}")


def _local_folder(source: str) -> Path | None:
    """The folder meant by source, or None where it is a name on the hub."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith((".", "/", "~")):
            raise UserError(f"model {source}: no such folder")
        return None
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"model {source}: the folder has no config.json, so it is not a saved model")
    return folder


def check_model_folder(
    source: str, prompt_template: str | None, prompt_format: str | None, trust_remote_code: bool = False
) -> None:
    """Checks what can be checked of a model folder without reading its weights.

    Raises:
        UserError: If it is missing, no saved model, has no weights, or its tokenizer cannot write the prompt format.
    """
    from transformers import AutoTokenizer

    folder = _local_folder(source)
    if folder is None:
        raise UserError(f"model {source}: no such folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {source}: the folder has no *.safetensors weights; save the model again as safetensors")
    _require_inside(folder)
    try:
        # Never None, for which transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {source}: its tokenizer cannot be loaded: {first_line(error)}") from error
    PromptFormat(tokenizer, prompt_template, prompt_format)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Casts the weights only, as loading in that dtype does.

    ``model.to(dtype)`` would round buffers such as Llama's rotary frequencies too: a model that loading never gives.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is loaded; `identity` says which weights, wherever they lie.

    Attributes:
        location: Folder, or hub name.
        identity: Content hash of a folder, cache key of a tiny model, or ``name@commit`` of the hub.
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

    def load(self, dtype: str | None = None) -> LoadedModel:
        """Loads the model; `dtype` overrides the one of the source (training starts from the weights as stored)."""
        return load_model(
            self.location,
            revision=self.revision,
            dtype=dtype or self.dtype,
            device=self.device,
            prompt_template=self.prompt_template,
            prompt_format=self.prompt_format,
            trust_remote_code=self.trust_remote_code,
            device_map=self.device_map,
        )


def model_identity(location: str, revision: str | None = None) -> tuple[str, str | None]:
    """Identity of a model's weights, and the revision that pins them.

    A folder is hashed (its config, tokenizer and weights). A hub model is fetched and named by its commit.

    Raises:
        UserError: If the folder is not there or holds no model, or the hub cannot be reached and its cache lacks the model.
    """
    folder = _local_folder(location)
    if folder is not None:
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".py"):
                digest.update(f"{path.name}:{file_hash(path)};".encode())
        return f"sha256:{digest.hexdigest()[:32]}", None
    commit = _from_hub(location, revision)[1]
    return f"{location}@{commit}", commit


def model_folder(location: str, revision: str | None = None) -> Path:
    """The folder that holds a model's files: the one given, or the hub's copy on this machine, fetched where it is missing.

    Raises:
        UserError: As `model_identity`.
    """
    folder = _local_folder(location)
    return folder if folder is not None else _from_hub(location, revision)[0]


def _from_hub(location: str, revision: str | None) -> tuple[Path, str]:
    """Folder and commit of a model from the hub."""
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            location, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {location}: cannot be fetched from the hub ({type(error).__name__}); check the name and the network, or "
            "give the folder of a downloaded copy"
        ) from error
    return Path(downloaded), Path(downloaded).name
