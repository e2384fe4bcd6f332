"""Load TOFU (arXiv 2401.06121): fictitious authors to forget and to keep, real authors and world facts.

Read from the hub (``locuslab/TOFU``) or from a folder with files of the same names, one JSON object per line. The retain items
nearest to the forget set, which unlearning it is most likely to damage, are found by `nearest_rows`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uipe_core.corpora.files import is_hub_name
from uipe_core.corpora.rows import Row, read_rows
from uipe_core.corpora.types import Corpus, Item, ItemSet
from uipe_core.errors import UserError, did_you_mean, first_line

FloatArray = NDArray[np.float64]

ITEMS_PER_AUTHOR = 20
"""TOFU has twenty questions per author, author after author."""

LARGEST_NEIGHBOURHOOD = 0.25
"""Largest share of the evaluated retain items that counts as neighbours of the forget set."""

RETAIN_OF_SPLIT = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
"""Forget split to the file with all other items."""


def load_tofu(
    source: str = "locuslab/TOFU",
    split: str = "forget01",
    retain_train: str | None = None,
    first_items: int | None = None,
    *,
    for_training: bool = True,
) -> Corpus:
    """Load TOFU with one of its forget splits.

    Evaluated are all items of ``<split>_perturbed`` (forget), ``retain_perturbed``, ``real_authors_perturbed`` and
    ``world_facts_perturbed``. Models built here learn the training items and the answers of both general sets, which a
    pretrained model would know; the retain model learns the same without the forget items.

    Related and unrelated knowledge (K2, K0 of UIPE) are, if the file has ``paraphrased_question``, the rephrased forget
    questions, and the evaluated retain items nearest to the forget set (`nearest_rows`): as many as forget
    items, at most a quarter of the retain items, half by author, half by text.

    Args:
        source: A folder, or the name of a data set on the hub.
        split: ``forget01``, ``forget05`` or ``forget10``.
        retain_train: File, without ending, with the training items to keep; by default that of the split (``retain99`` for
            ``forget01``). ``retain_perturbed`` is a choice of 400 items for small models.
        first_items: Evaluate only the first items of every set; 300 is ``ds_size`` in locuslab/tofu's
            ``config/eval_everything.yaml``, as in its published logs of forget10.
        for_training: Read the training items too; without them only scoring is possible, and their files are not needed.

    Raises:
        UserError: Unknown split, missing folder or file, failed download, broken line or field, or retain items that are also
            to be forgotten.
    """
    if split not in RETAIN_OF_SPLIT:
        known = ", ".join(RETAIN_OF_SPLIT)
        raise UserError(f"unknown TOFU split {split!r}; known: {known}.{did_you_mean(split, RETAIN_OF_SPLIT)}")
    keep = RETAIN_OF_SPLIT[split] if retain_train is None else retain_train
    folder = _folder(source)
    forget_path = _path(source, folder, f"{split}_perturbed")
    forget = _evaluated(forget_path, paraphrased=True)
    rephrased = [_rephrased(item, row) for item, row in zip(forget, read_rows(forget_path), strict=True)]
    whole = {
        "forget": forget,
        **{
            name: _evaluated(_path(source, folder, f"{name}_perturbed"), paraphrased=name == "retain")
            for name in ("retain", "real_authors", "world_facts")
        },
    }
    if all(item is not None for item in rephrased):
        whole["related"] = tuple(item for item in rephrased if item is not None)
    general = tuple(Item(item.question, item.answer) for item in (*whole["real_authors"], *whole["world_facts"]))
    sets = {name: items[:first_items] for name, items in whole.items()}
    neighbours = min(len(sets["forget"]), max(1, round(LARGEST_NEIGHBOURHOOD * len(sets["retain"]))))
    sets["unrelated"] = tuple(sets["retain"][row] for row in nearest_rows(sets["retain"], sets["forget"], neighbours))
    forget_train = _trained(source, folder, split) if for_training else ()
    retain_items = _trained(source, folder, keep) if for_training else ()
    both = set(forget_train) & set(retain_items)
    if both:
        question = next(item.question for item in forget_train if item in both)
        raise UserError(
            f"TOFU {source}: {len(both)} items of {split}.json are in {keep}.json too, first {question!r}; "
            f"what is to be forgotten must not be retained: use retain_train={RETAIN_OF_SPLIT[split]!r}"
        )
    first = "" if first_items is None else f", first_items={first_items}"
    return Corpus(
        name=f"tofu(source={source}, split={split}, retain_train={keep}{first})",
        sets=sets,
        forget_train=forget_train,
        retain_train=retain_items,
        build={"base": (), "full": (*forget_train, *retain_items, *general), "retain": (*retain_items, *general)},
    )


def _folder(source: str) -> Path | None:
    """Return the folder named by `source`, or None if it is a name on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if is_hub_name(source):
        return None
    what = "is a file, not a folder" if folder.exists() else "no such folder"
    raise UserError(
        f"TOFU source {source!r}: {what}; give a folder that holds forget01.json and the other files, "
        "or a data set on the hub such as locuslab/TOFU"
    )


def _path(source: str, folder: Path | None, name: str) -> Path:
    if folder is not None:
        path = folder / f"{name}.json"
        if not path.is_file():
            present = sorted(entry.stem for entry in folder.glob("*.json"))
            found = ", ".join(present) or "no .json files"
            raise UserError(f"{path}: no such file; {folder} has {found}.{did_you_mean(name, present)}")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, f"{name}.json", repo_type="dataset"))
    # The hub client's errors have no common base class.
    except Exception as error:
        raise UserError(
            f"cannot get {name}.json of the data set {source} from the hub ({first_line(error)}); check name and network, "
            "or give a folder that holds the files"
        ) from error


def _trained(source: str, folder: Path | None, name: str) -> ItemSet:
    path = _path(source, folder, name)
    return tuple(Item(row.text("question"), row.text("answer")) for row in read_rows(path))


def _evaluated(path: Path, paraphrased: bool) -> ItemSet:
    items: list[Item] = []
    for row in read_rows(path):
        perturbed = _perturbed(row)
        if items and len(perturbed) != len(items[0].perturbed_answers):
            raise UserError(
                f"{row.where}: perturbed_answer has {len(perturbed)} answers, the first item has "
                f"{len(items[0].perturbed_answers)}; give every item of a file the same number"
            )
        has_paraphrase = paraphrased or "paraphrased_answer" in row.fields
        paraphrase = row.text("paraphrased_answer") if has_paraphrase else None
        group = f"{path.stem.partition('_')[0]} author {len(items) // ITEMS_PER_AUTHOR}" if paraphrased else None
        items.append(Item(row.text("question"), row.text("answer"), paraphrase, perturbed, group))
    return tuple(items)


def _rephrased(item: Item, row: Row) -> Item | None:
    """Return the item with its question paraphrased, None if the file has no such question."""
    field = "paraphrased_question"
    return replace(item, question=row.text(field)) if field in row.fields else None


def _perturbed(row: Row) -> tuple[str, ...]:
    name = "perturbed_answer"
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise row.error(name, value, "give a list of texts, none blank")
    return tuple(value)


def nearest_rows(items: ItemSet, to: ItemSet, count: int) -> tuple[int, ...]:
    """Return positions of the `count` items nearest to the set `to`, ascending: half by group, half by text.

    By group: whole groups (authors) in the order of their greatest cosine similarity to a group of `to`. By text: single items
    in the order of their greatest cosine similarity to an item of `to`. Texts are question and answer as TF-IDF vectors (term
    frequency times ln(documents / documents with the term), over both sets, length 1).

    Args:
        items: Candidates.
        to: The set to be near to.
        count: Number of neighbours; all items if there are fewer.
    """
    if count >= len(items):
        return tuple(range(len(items)))
    vectors = _tf_idf([f"{item.question} {item.answer}" for item in (*items, *to)])
    mine, other = vectors[: len(items)], vectors[len(items) :]
    my_groups, my_means = _group_means([item.group for item in items], mine)
    _, other_means = _group_means([item.group for item in to], other)
    by_group = (my_means @ other_means.T).max(axis=1)
    by_text = (mine @ other.T).max(axis=1)
    # Ties go to the earlier item, so that the choice depends on the texts alone.
    near_groups = [row for group in np.argsort(-by_group, kind="stable") for row in np.flatnonzero(my_groups == group)]
    chosen = near_groups[: count // 2]
    taken = set(chosen)
    chosen += [row for row in np.argsort(-by_text, kind="stable") if row not in taken][: count - len(chosen)]
    return tuple(sorted(int(row) for row in chosen))


def _tf_idf(texts: list[str]) -> FloatArray:
    """Return (n, v) TF-IDF vectors of length 1, one per text; zero if all its terms are in every text."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    places = {term: place for place, term in enumerate(sorted({term for count in counts for term in count}))}
    vectors = np.zeros((len(texts), len(places)))
    documents = Counter(term for count in counts for term in count)
    for row, count in enumerate(counts):
        for term, times in count.items():
            vectors[row, places[term]] = times * math.log(len(texts) / documents[term])
    return _unit(vectors)


def _group_means(groups: Iterable[str | None], vectors: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
    """Return (n,) the group number of each item and (g, v) group means of length 1; an item without group is its own group."""
    names = [group if group is not None else f"\0{row}" for row, group in enumerate(groups)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_item = np.array([numbers[name] for name in names])
    means = np.stack([vectors[of_item == number].mean(axis=0) for number in range(len(numbers))])
    return of_item, _unit(means)


def _unit(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
