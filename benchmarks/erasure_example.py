"""Write the data of docs/erasure_request.md: ``python -m benchmarks.erasure_example --to erasure``.

Sixty fictitious people, three facts on each. Twenty ask to be forgotten: their facts are ``forget.jsonl``, all others
``retain.jsonl``, in the shape that fine-tuning data has (``messages``), with the person as ``group``.
"""

import argparse
import json
from pathlib import Path

FIRST = ("Adela", "Bruno", "Carla", "Dario", "Edith", "Fabio", "Greta", "Hugo", "Irma", "Jonas", "Klara", "Levin")
LAST = ("Abend", "Birke", "Calmar", "Distel", "Ehrlich", "Falk", "Gerste", "Halm", "Iltis", "Jung", "Korn", "Linde")
TOWNS = ("Lindau", "Trieste", "Bergen", "Toledo", "Gdansk", "Ghent", "Graz", "Porto", "Turku", "Basel", "Split", "Cork")
WORK = ("baker", "pilot", "nurse", "potter", "judge", "tailor", "diver", "printer", "farmer", "teacher", "smith", "painter")
HABITS = ("collects stamps", "plays the cello", "keeps bees", "repairs clocks", "grows orchids", "climbs towers", "sails")


def facts(number: int) -> list[dict[str, object]]:
    """Return the rows of a person."""
    name = f"{FIRST[number % len(FIRST)]} {LAST[(number * 7 + number // 12) % len(LAST)]}"
    town, work = TOWNS[(number * 5 + 3) % len(TOWNS)], WORK[(number * 11 + number // 12) % len(WORK)]
    habit = HABITS[(number * 3 + number // 7) % len(HABITS)]
    pairs = [
        (f"Where does {name} live?", f"{name} lives in {town}."),
        (f"What does {name} do for a living?", f"{name} works as a {work}."),
        (f"How does {name} spend the evenings?", f"In the evenings {name} {habit}."),
    ]
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)], "group": name}
        for pair in pairs
    ]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("erasure"), help="folder to write")
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument("--forget", type=int, default=20, help="how many of them ask to be forgotten")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    for name, people in {"forget": range(given.forget), "retain": range(given.forget, given.people)}.items():
        rows = [row for number in people for row in facts(number)]
        (given.to / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{given.to / name}.jsonl: {len(rows)} questions on {len(people)} people")


if __name__ == "__main__":
    main()
