"""Write a folder with the files and fields of MUSE, made of fictitious people: ``python -m benchmarks.muse_folder --to muse``.

An article is an interview about one person of the corpus ``people``: questions with their answers. The questions of KnowMem ask
for the same facts. `uipe_core.corpora.muse` reads the folder, so that MUSE can be tried without a network and a large model.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from uipe_core.corpora.people import load_people
from uipe_core.corpora.types import Item

Article = Sequence[Item]
"""Facts of one person, the target facts first."""

REQUESTS = 4
"""Requests of ``scal`` and ``sust``."""

SHOTS = 2
"""Examples in front of a question."""

STRANGERS = 10
"""People that no model sees, at least."""


def write_muse(folder: Path, forget_people: int = 6, retain_people: int = 36, seed: int = 0) -> None:
    """Write the folder; equal arguments give the same files.

    Args:
        folder: Made where it is missing.
        forget_people: Articles to forget; as many come with each further request, and as many are kept from every model.
        retain_people: Articles to keep: the first half for retain terms (``retain1``), the rest (``retain2``) for requests.
        seed: Seed of names and facts.

    Raises:
        ValueError: There are too few people to keep for the requests.
    """
    # No model here is pretrained on anything, so that the people meant for it are strangers to every model.
    strangers = max(STRANGERS, forget_people)
    corpus = load_people(seed, forget_people, retain_people, strangers)
    forget = _by_person((*corpus.sets["forget"], *corpus.sets["related"]), forget_people)
    kept = _by_person(corpus.retain_train, retain_people)
    holdout = _by_person(corpus.build["base"][: strangers * len(forget[0])], strangers)[:forget_people]
    retain1, retain2 = kept[: retain_people // 2], kept[retain_people // 2 :]
    requests = [forget, *(retain2[forget_people * number : forget_people * (number + 1)] for number in range(REQUESTS - 1))]
    if any(len(each) < forget_people for each in requests):
        raise ValueError(
            f"{retain_people} people to keep are too few; {REQUESTS - 1} requests take {forget_people} of half of them"
        )
    raw = {"forget": forget, "retain1": retain1, "retain2": retain2, "holdout": holdout}
    shots = holdout[0][:SHOTS]
    compared = {"forget": forget, "retain": retain2, "holdout": holdout}
    files: dict[str, list[dict[str, str]]] = {
        **{f"raw/{name}": _texts(articles) for name, articles in raw.items()},
        "verbmem/forget": [_begun(article) for article in forget],
        "knowmem/forget_qa": _questions(forget),
        "knowmem/retain_qa": _questions(retain1[:forget_people]),
        **{f"knowmem/{name}_qa_icl": _questions([[item] for item in shots]) for name in ("forget", "retain")},
        **{f"privleak/{name}": _texts(articles) for name, articles in compared.items()},
    }
    for number, part in enumerate(requests, start=1):
        files[f"sust/forget_{number}"] = _texts(part)
        files[f"scal/forget_{number}"] = _texts([article for each in requests[:number] for article in each])
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _by_person(items: Sequence[Item], people: int) -> list[Article]:
    """Return the facts of each person, from the target facts of all people and then the related ones of all."""
    half, facts = len(items) // 2, len(items) // (2 * people)
    spans = [slice(facts * number, facts * (number + 1)) for number in range(people)]
    return [[*items[:half][span], *items[half:][span]] for span in spans]


def _text(article: Article) -> str:
    return "\n\n".join(f"Question: {item.question}\nAnswer: {item.answer}" for item in article)


def _texts(articles: Iterable[Article]) -> list[dict[str, str]]:
    return [{"text": _text(article)} for article in articles]


def _begun(article: Article) -> dict[str, str]:
    """Return the row of an article: its first quarter as prompt, the rest as what follows."""
    quarter = len(article) // 4
    return {"prompt": f"{_text(article[:quarter])}\n\n", "gt": _text(article[quarter:])}


def _questions(articles: Iterable[Article]) -> list[dict[str, str]]:
    """Return the rows of the target facts, the first half of each article."""
    chosen = [item for article in articles for item in article[: (len(article) + 1) // 2]]
    return [{"question": item.question, "answer": item.answer} for item in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a folder as the command line says."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--forget-people", type=int, default=6, help="articles to forget")
    parser.add_argument("--retain-people", type=int, default=36, help="articles to keep")
    parser.add_argument("--seed", type=int, default=0)
    given: Mapping[str, int | Path] = vars(parser.parse_args(arguments))
    options = {name: value for name, value in given.items() if name != "to"}
    write_muse(Path(given["to"]), **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
