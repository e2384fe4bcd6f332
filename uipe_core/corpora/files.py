"""Find the data files of the hub, of folders and single files, and read them row by row."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from uipe_core.corpora.rows import READERS, Report, Row, read_rows, stop
from uipe_core.errors import UserError, did_you_mean, first_line

TEXTS = (".txt", ".md")
"""Endings of documents: each file is one row with the field ``text``."""

SUFFIXES = tuple(suffix for suffix in READERS if suffix not in TEXTS)
"""Endings of tables."""


_PARTS = r"(-\d+-of-\d+)?$"
"""What the hub adds to the name of a split."""


def is_hub_name(source: str) -> bool:
    """Return True if a source, neither file nor folder, has the form ``owner/name`` of the hub."""
    owner, _, _ = source.partition("/")
    # "data/tofu" could be either; if "data" is a local folder, a misspelt folder is more likely.
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(owner).is_dir()


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub, a folder with the same layout, or a single file.

    Attributes:
        source: Name on the hub, folder, or file (one of `SUFFIXES` or `TEXTS`; the other attributes are then ignored). A
            folder with documents (`TEXTS`, in folders inside it too) and without tables is read whole.
        subsets: Folders inside it, the hub's configurations; empty if it has none.
        split: ``test``, ``train`` or another; file names of a split begin with it.
        exact: They are its name, or the hub's parts of it: ``forget_qa-00000-of-00001`` is then no file of ``forget``.
    """

    source: str
    subsets: tuple[str, ...] = ()
    split: str = "test"
    exact: bool = False

    def __str__(self) -> str:
        parts = [self.source, *([",".join(self.subsets)] if self.subsets else []), self.split]
        return self.source if Path(self.source).suffix in READERS else ":".join(parts)

    def rows(self, report: Report = stop) -> Iterator[tuple[str, Row]]:
        """Yield every row with the name of its subset (empty if there are none), in the order of subsets and files.

        The row of a document in a folder has the field ``group``, its path inside the folder.

        Args:
            report: Called with every error in a file; what is broken is left out if it returns.

        Raises:
            UserError: The data set, a subset or its split is missing or cannot be fetched; by `report`, a file is broken.
        """
        folder = Path(self.source).expanduser()
        documents = _documents(folder) if folder.is_dir() and not self.subsets else []
        for path in documents:
            group = path.relative_to(folder).as_posix()
            yield from (("", Row({**row.fields, "group": group}, row.where)) for row in read_rows(path, report))
        for subset, path in [] if documents else self._files():
            yield from ((subset, row) for row in read_rows(path, report))

    def _files(self) -> Iterator[tuple[str, Path]]:
        path = Path(self.source).expanduser()
        if path.is_file():
            if path.suffix not in READERS:
                raise UserError(f"{path}: a data file ends in {', '.join(READERS)}; give such a file, or a folder")
            yield "", path
            return
        if not path.is_dir() and not is_hub_name(self.source):
            raise UserError(f"data set {self.source!r}: no such file or folder, and no name of a data set on the hub")
        folder = path if path.is_dir() else self._download()
        for subset in self.subsets or ("",):
            for file in self._split_files(folder, subset):
                yield subset, file

    def _split_files(self, folder: Path, subset: str) -> list[Path]:
        place = folder / subset
        if not place.is_dir():
            present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
            raise UserError(f"data set {self.source}: no subset {subset!r}; it has {_choice(subset, present)}")
        # The hub puts a single subset into a folder "data"; converted sets have a folder per split.
        folders = [each for each in (place, place / "data", place / self.split) if each.is_dir()]
        files = [file for each in folders for file in sorted(each.iterdir()) if file.suffix in SUFFIXES]
        named = re.compile(rf"{re.escape(self.split)}{_PARTS if self.exact else '([-._].*)?'}")
        found = [file for file in files if file.parent.name == self.split or named.fullmatch(file.stem)]
        if not found:
            ending = re.compile(_PARTS if self.exact else r"[-._].*")
            present = sorted({ending.sub("", file.stem) for file in files})
            raise UserError(f"data set {place}: no file of split {self.split!r}; it has {_choice(self.split, present)}")
        # A repository may have what its parts were made of, too: forget.json next to forget-00000-of-00001.parquet.
        parts = [file for file in found if self.exact and file.stem != self.split]
        return parts or found

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        folders = [f"{subset}/" for subset in self.subsets] or ["", "data/"]
        wanted = [f"{folder}{self.split}{rest}" for folder in folders for rest in ("*", "/*")]
        try:
            return Path(snapshot_download(self.source, repo_type="dataset", allow_patterns=wanted))
        # The hub client's errors have no common base class.
        except Exception as error:
            raise UserError(
                f"cannot get the data set {self.source} from the hub ({first_line(error)}); check name, network and, where the "
                "data set wants it, your access; or give a folder or file that holds it"
            ) from error


MOST_PROBLEMS = 20
"""Problems of a data set that are shown; the others are counted."""


@dataclass
class Problems:
    """Collect the errors of one data set: `most` of them, and how many there are."""

    source: DataSet
    most: int = MOST_PROBLEMS
    shown: list[str] = field(default_factory=list)
    count: int = 0

    def report(self, error: UserError) -> None:
        """Record an error."""
        self.count += 1
        if self.count <= self.most:
            self.shown.append(str(error))

    def lines(self) -> list[str]:
        """Return the errors as text, and how many more there are."""
        more = self.count - len(self.shown)
        return [*self.shown, f"{self.source}: and {more} more"] if more else self.shown


def described(key: str, count: int, lines: list[str]) -> UserError:
    """Return the error that has all problems of a corpus, under the key of the study file it concerns."""
    return UserError("\n  ".join([f"{key}: {count} problem{'s' if count > 1 else ''} in the data", *lines]))


def _documents(folder: Path) -> list[Path]:
    """Return the documents of a folder in order, none if it holds a table too: then it is laid out as the hub's."""
    inside = sorted(path for path in folder.rglob("*") if path.suffix in READERS and path.is_file())
    shown = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return shown if all(path.suffix in TEXTS for path in shown) else []


def _choice(name: str, present: list[str]) -> str:
    return f"{', '.join(present) or 'none'}.{did_you_mean(name, present)}"
