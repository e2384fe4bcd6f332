"""Push an export to a repository of the Hugging Face hub; the token is that of its own login, or HF_TOKEN."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from search.results.recipe import RECIPE_FILE
from uipe_core.errors import UserError, first_line
from uipe_core.models.loading import ADAPTER_FILE
from uipe_core.storage.files import read_json


@dataclass(frozen=True)
class Destination:
    """A repository of the hub that an export is pushed to.

    Attributes:
        repository: ``owner/name``.
        public: Anyone may read it; otherwise it is private.
        dry_run: Say what would be sent, and send nothing.
    """

    repository: str
    public: bool
    dry_run: bool

    @classmethod
    def of(cls, repository: str | None, *, public: bool, dry_run: bool) -> "Destination | None":
        """Check what a command line asks for, without asking the hub; None where nothing is pushed.

        Raises:
            UserError: The name is invalid, there is no token, or an option stands without ``--push``.
        """
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import validate_repo_id

        if repository is None:
            if public or dry_run:
                raise UserError(f"{'--public' if public else '--dry-run'}: nothing is pushed; add --push OWNER/NAME")
            return None
        try:
            validate_repo_id(repository)
        except ValueError as error:
            allowed = "letters, digits, '-', '_' and '.', each of the last three between others"
            raise UserError(f"--push: {repository!r} is no name of a repository; write OWNER/NAME, of {allowed}") from error
        if "/" not in repository:
            raise UserError(f"--push: {repository!r} names no owner; write OWNER/{repository}")
        if not dry_run and constants.HF_HUB_OFFLINE:
            raise UserError("--push: HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or give --dry-run")
        if not dry_run and get_token() is None:
            raise UserError("--push: there is no token of the hub; run `hf auth login`, or set HF_TOKEN to one that may write")
        return cls(repository, public, dry_run)

    @property
    def text(self) -> str:
        """Return address and visibility."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repository} ({'public' if self.public else 'private'})"

    def send(self, folder: Path) -> list[str]:
        """Push a folder, and return what is to be said of it.

        Raises:
            UserError: The hub cannot be reached or refuses, or has the repository with another visibility. The folder stays;
                the message says how it is pushed again.
        """
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        total = f"{len(sizes)} files, {decimal(sum(sizes.values()))}"
        places = sorted(set(local_places(folder)))
        notes = [f"note: {place} is a place on this machine, and stands in {name}" for place, name in places]
        command = f"hf upload {self.repository} {shlex.quote(str(folder))} ." + ("" if self.public else " --private")
        if self.dry_run:
            listing = [f"{decimal(size):>10}  {name}" for name, size in sizes.items()]
            return [f"would push {total} to {self.text}; nothing was sent:", *listing, *notes, f"send it with: {command}"]
        try:
            self._push(folder)
        except UserError:
            raise
        except Exception as error:  # the network's errors and the client's are of many kinds
            raise UserError(
                f"--push {self.repository}: {type(error).__name__}: {first_line(error)}. The export stays in {folder}; push it "
                f"again with: {command}"
            ) from error
        return [f"pushed {total} to {self.text}", *notes]

    def _push(self, folder: Path) -> None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="uipe-search")
        api.create_repo(self.repository, private=not self.public, exist_ok=True)
        if bool(api.model_info(self.repository).private) == self.public:
            there, give = ("private", "leave --public out") if self.public else ("public", "give --public")
            raise UserError(f"--push {self.repository}: the repository is there and is {there}; {give}, or push to another one")
        api.upload_folder(repo_id=self.repository, folder_path=folder, commit_message="Upload an export of UIPE Search")


def local_places(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield absolute paths that stand in the recipe or the adapter's configuration of an export, with the file's name."""
    import yaml

    if (folder / RECIPE_FILE).is_file():
        content = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        yield from ((text, RECIPE_FILE) for text in _texts(content) if Path(text).is_absolute())
    if (folder / ADAPTER_FILE).is_file():
        base = str(read_json(folder / ADAPTER_FILE).get("base_model_name_or_path"))
        if Path(base).is_absolute():
            yield base, ADAPTER_FILE


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
