"""Say which numbers are made with stand-ins, where a corpus lacks paraphrased or perturbed answers."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from search.problem.objectives import MADE_FROM, Objective
from uipe_core.metrics.composites import CLOSENESS, PARAPHRASE, TRUTH_SHARE

STANDS_IN = {
    "paraphrased": "where a paraphrased answer is missing, the answer itself stands in",
    "perturbed": "where perturbed answers are missing, answers of other items stand in",
}
"""What stands in for what a set lacks (`uipe_core.corpora.types.Corpus.stand_ins`)."""

MARK = "*"
"""Mark of a number that is made with stand-ins."""

StandIns = Mapping[str, Sequence[str]]
"""What each evaluation set lacks."""

_RESTS_ON = {
    CLOSENESS: ("paraphrased", "perturbed"),
    TRUTH_SHARE: ("paraphrased", "perturbed"),
    PARAPHRASE: ("paraphrased",),
}


def stood_in(objective: Objective, stand_ins: StandIns) -> dict[str, list[str]]:
    """Return what an objective is made of that stands in for something, by evaluation set; empty for most."""
    found: dict[str, list[str]] = {}
    if objective.quality_of in stand_ins:
        found[str(objective.quality_of)] = list(stand_ins[str(objective.quality_of)])
    for each in objective.components:
        of_set = stand_ins.get(MADE_FROM.get(each.item_set, each.item_set), ())
        lacking = [name for name in of_set if name in _RESTS_ON.get(each.measure, ())]
        if lacking:
            name = MADE_FROM.get(each.item_set, each.item_set)
            found[name] = list(dict.fromkeys([*found.get(name, []), *lacking]))
    return found


def marked(objectives: Iterable[Objective], stand_ins: StandIns, shown: Collection[str]) -> dict[str, dict[str, list[str]]]:
    """Return which of the numbers that are shown are made with stand-ins, by key, and with which (`stood_in`)."""
    made = {key: stood_in(each, stand_ins) for each in objectives for key in (each.name, each.p_value) if key is not None}
    qualities = {f"{name}_log10_forget_quality": {name: list(parts)} for name, parts in stand_ins.items()}
    return {key: parts for key, parts in {**qualities, **made}.items() if parts and key in shown}


def stand_in_note(marks: Mapping[str, Mapping[str, Sequence[str]]]) -> str | None:
    """Return the note that the mark stands for; None where nothing is marked."""
    lacking: dict[str, list[str]] = {}
    for made in marks.values():
        for name, parts in made.items():
            lacking[name] = list(dict.fromkeys([*lacking.get(name, []), *parts]))
    if not lacking:
        return None
    sets = "; ".join(f"{name}: {', '.join(STANDS_IN[part] for part in parts)}" for name, parts in lacking.items())
    return f"{MARK} made with stand-ins, so not comparable with other studies ({sets})"
