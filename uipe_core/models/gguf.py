"""Read a GGUF file as a model folder: its weights dequantised once, into the cache.

transformers reads GGUF where the package ``gguf`` is installed (extra ``real``). What quantisation took is not given back: the
dequantised weights are those that llama.cpp computes with, stored here in fp32.
"""

from pathlib import Path
from typing import Any

from uipe_core.errors import UserError, first_line
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import file_hash, require_regular

SUFFIX = ".gguf"
SCHEMA = 1
"""Raised with every change here that alters the folder."""
_MAGIC = b"GGUF"


def is_gguf(location: str) -> bool:
    """Return True if a location names a GGUF file."""
    return location.endswith(SUFFIX)


def gguf_identity(file: Path) -> str:
    """Return the identity of the weights of a file."""
    return f"gguf:{file_hash(file)[:32]}"


def check_gguf(file: Path) -> str:
    """Check a GGUF file without reading its weights; return its architecture.

    Raises:
        UserError: It is missing or no GGUF, the package is missing, or transformers cannot read the architecture.
    """
    _check_magic(file)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"model {file}: reading GGUF needs the package gguf; pip install 'uipe-search[real]'") from error
    try:
        field = GGUFReader(file).get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except Exception as error:  # a damaged file: numpy's, struct's and other errors
        raise UserError(f"model {file}: the GGUF file is damaged ({first_line(error)}); fetch it again") from error
    known = _known_architectures()
    if architecture not in known:
        raise UserError(
            f"model {file}: GGUF of the architecture {architecture!r}, which transformers does not read; it reads "
            f"{', '.join(sorted(known))}. Give the model's safetensors folder"
        )
    return str(architecture)


def _check_magic(file: Path) -> None:
    try:
        require_regular(file)
        with file.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"model {file}: cannot be read ({error.strerror or error})") from error
    if magic != _MAGIC:
        raise UserError(f"model {file}: is no GGUF file (it does not begin with GGUF); fetch it again, or give a model folder")


def _known_architectures() -> set[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return set(GGUF_SUPPORTED_ARCHITECTURES)


def gguf_folder(file: Path, store: ContentStore) -> Path:
    """Return the folder with the dequantised model of a GGUF file, made if the cache lacks it.

    Raises:
        UserError: As `check_gguf`; or its weights or tokenizer cannot be read.
    """
    _check_magic(file)

    def make(folder: Path) -> None:
        check_gguf(file)  # seconds, for the pieces of the tokenizer
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from uipe_core.models.transformers_compat import forget_quantization

        settings: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        try:
            # Should there be no GGUF after all, no pickle is read in its place.
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, use_safetensors=True, **settings
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **settings)
        except Exception as error:  # readers of a damaged file raise many things
            raise UserError(f"model {file}: cannot be dequantised ({type(error).__name__}: {first_line(error)})") from error
        forget_quantization(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return store.get_or_make({"kind": "gguf", "schema": SCHEMA, "file": gguf_identity(file)}, make)
