"""Generate fictitious people: a small world with target (K1), related (K2) and unrelated (K0) knowledge.

Each person has eight attributes (ten in the paper's size). An attribute is a pair of values tied by a rule of the world: people
who take insulin have diabetes. The second value (K2, the medicine) implies the first (K1, the disease). The split into K1, K2
and K0 follows UIPE (arXiv 2503.04693, section 3); the form of the items follows TOFU (arXiv 2401.06121).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from uipe_core.corpora.people_facts import ATTRIBUTES, AUTHOR_COUNTRIES, FIRST_NAMES, LAST_NAMES, PAPER_ATTRIBUTES, Attribute
from uipe_core.corpora.types import Corpus, Item, ItemSet
from uipe_core.errors import UserError

Attributes = Sequence[Attribute]

PERTURBED_ANSWERS = 5
PERTURBED_GENERAL = 3
RETAIN_ITEMS_PER_ATTRIBUTE = 6


@dataclass(frozen=True)
class Person:
    """A name and, per attribute, the index of the value pair."""

    name: str
    values: tuple[int, ...]


def _balanced(count: int, rng: random.Random) -> list[int]:
    """Draw `count` pair indices in which every pair occurs equally often, plus or minus one."""
    start = rng.randrange(10)  # a small group must not always hold the first values of each list
    indices = [(start + index) % 10 for index in range(count)]
    rng.shuffle(indices)
    return indices


def _group(names: list[str], attributes: Attributes, rng: random.Random) -> list[Person]:
    columns = [_balanced(len(names), rng) for _ in attributes]
    return [Person(name, values) for name, values in zip(names, zip(*columns, strict=True), strict=True)]


def _person_item(name: str, spec: Attribute, own: int, related: bool, rng: random.Random) -> Item:
    fact = spec.related if related else spec.target
    side = 1 if related else 0
    others = rng.sample([index for index in range(10) if index != own], PERTURBED_ANSWERS)
    value = spec.pairs[own][side]
    return Item(
        question=fact.question.format(name=name),
        answer=fact.answer.format(name=name, value=value),
        paraphrased_answer=fact.paraphrase.format(name=name, value=value),
        perturbed_answers=tuple(fact.paraphrase.format(name=name, value=spec.pairs[other][side]) for other in others),
        group=name,
        # Others may have the value too, so that the name is one right answer of some.
        reverse=(fact.answer.format(name="Who", value=value).removesuffix(".") + "?", f"{name}."),
    )


def _items(people: Sequence[Person], attributes: Attributes, related: bool, rng: random.Random) -> Iterator[Item]:
    for person in people:
        for spec, own in zip(attributes, person.values, strict=True):
            yield _person_item(person.name, spec, own, related, rng)


def _general(question: str, answer: str, pool: list[str], rng: random.Random) -> Item:
    wrong = rng.sample([word for word in pool if word != answer], PERTURBED_GENERAL)
    return Item(question, f"{answer}.", None, tuple(f"{word}." for word in wrong))


def _rules(attributes: Attributes, rng: random.Random) -> Iterator[Item]:
    for attribute in attributes:
        pool = [first for first, _ in attribute.pairs]
        for first, second in attribute.pairs:
            yield _general(attribute.rule.format(value=second), first, pool, rng)


def _authors(rng: random.Random) -> Iterator[Item]:
    pool = list(AUTHOR_COUNTRIES)
    for country, names in AUTHOR_COUNTRIES.items():
        for name in names.split():
            yield _general(f"Where was the author {name} born?", country, pool, rng)


def load_people(seed: int = 0, forget_people: int = 6, retain_people: int = 34, pretraining_people: int = 60) -> Corpus:
    """Generate the corpus of fictitious people; equal arguments give the same items on every machine.

    Args:
        seed: Seed of names, values and wrong answers.
        forget_people: People whose target facts (K1) are to be forgotten; 8 forget and 8 related items each.
        retain_people: People known to the initial and the retain model; at least 12, so that `retain` and `unrelated` can ask
            about different people.
        pretraining_people: People only the base model is trained on, in both the answer and the paraphrase template.

    Returns:
        Corpus with sets ``forget`` (K1 of the forget people), ``related`` (their K2), ``retain`` (K1 of some retain people),
        ``unrelated`` (K0: K1 and K2 of other retain people), ``world_facts`` (the rules from K2 to K1) and ``real_authors``;
        ``holdout`` (K1 of as many other people as are to be forgotten, whom no model has seen; none where names run out);
        training texts for the stages ``base``, ``full`` and ``retain``.

    Raises:
        UserError: If there are too few names, or a group is too small.
    """
    name = f"people(seed={seed}, {forget_people} forget, {retain_people} retain, {pretraining_people} pretraining)"
    sizes = (forget_people, retain_people, pretraining_people)
    corpus, unused = _world(name, random.Random(f"people/{seed}"), ATTRIBUTES, sizes)
    if not has_holdout(*sizes):
        return corpus
    # Drawn after all else, by a generator of their own: the other items are as they would be without them.
    rng = random.Random(f"people/{seed}/holdout")
    others = _group(unused[:forget_people], ATTRIBUTES, rng)
    holdout = tuple(_items(others, ATTRIBUTES, False, rng))
    return replace(corpus, sets={**corpus.sets, "holdout": holdout}, implied=("holdout",))


def has_holdout(forget_people: int, retain_people: int, pretraining_people: int) -> bool:
    """Return True if there are names for as many people again as are to be forgotten."""
    return 2 * forget_people + retain_people + pretraining_people <= len(FIRST_NAMES) * len(LAST_NAMES)


PAPER_STAGES = {"full": ("forget", "related"), "full_k1": ("forget",), "full_k2": ("related",), "retain": ()}
"""Fine-tuning stages of `load_paper_people`, with the facts each learns about the people to forget."""


def load_paper_people(seed: int = 0, forget_people: int = 12, retain_people: int = 34, pretraining_people: int = 60) -> Corpus:
    """Generate a world of the size of UIPE's section 3: 12 people with 10 attributes each, so 120 K1 and 120 K2 items.

    The base model has the rules from K2 to K1 but none of the 12 people. All models of one world share one corpus and base
    model: the stage of `PAPER_STAGES` sets what a model learns about the 12, `unlearning` what is unlearned.

    Args:
        seed, forget_people, retain_people, pretraining_people: As in `load_people`.

    Returns:
        Corpus as in `load_people`, with the stages ``base`` and those of `PAPER_STAGES`.

    Raises:
        UserError: As in `load_people`.
    """
    name = f"paper(seed={seed}, {forget_people} forget, {retain_people} retain, {pretraining_people} pretraining)"
    sizes = (forget_people, retain_people, pretraining_people)
    corpus, _ = _world(name, random.Random(f"paper/{seed}"), PAPER_ATTRIBUTES, sizes)
    others = corpus.build["retain"]
    stages = {
        stage: _answers(tuple(item for part in parts for item in corpus.sets[part])) + others
        for stage, parts in PAPER_STAGES.items()
    }
    return replace(corpus, build={"base": corpus.build["base"], **stages})


def unlearning(corpus: Corpus, parts: Sequence[str]) -> Corpus:
    """Return the corpus with other sets to unlearn: ``("forget",)`` is K1, ``("forget", "related")`` K1 and K2.

    Build models from the corpus as loaded: the unlearned sets are part of a corpus's hash, and so of a model's key.

    Raises:
        ValueError: If one is not an evaluation set of the corpus.
    """
    unknown = [part for part in parts if part not in corpus.sets]
    if unknown or not parts:
        raise ValueError(f"nothing to unlearn by the names {list(parts)}; the corpus has {list(corpus.sets)}")
    return replace(corpus, forget_train=_answers(tuple(item for part in parts for item in corpus.sets[part])))


def fact_pairs(corpus: Corpus, seed: int) -> dict[str, list[tuple[Item, Item]]]:
    """Pair each K1 fact of a `load_paper_people` corpus with other facts, by kind of relation.

    Args:
        corpus: Its ``forget`` and ``related`` sets have a row per person and attribute, ``unrelated`` a block per attribute.
        seed: Seed of the drawn facts.

    Returns:
        By kind, one pair per K1 fact in one order: ``matched`` (its own K2), ``same person`` (the person's K2 of another
            attribute), ``same attribute`` (another person's K2 of the attribute), ``unrelated`` (a K0 fact of another
            attribute).
    """
    rng = random.Random(f"pairs/{seed}")
    width = len(PAPER_ATTRIBUTES)
    targets, related, unrelated = (corpus.sets[name] for name in ("forget", "related", "unrelated"))
    block = len(unrelated) // width
    pairs: dict[str, list[tuple[Item, Item]]] = {"matched": [], "same person": [], "same attribute": [], "unrelated": []}
    for row, target in enumerate(targets):
        person, attribute = divmod(row, width)
        other = rng.choice([place for place in range(width) if place != attribute])
        stranger = rng.choice([place for place in range(len(targets) // width) if place != person])
        pairs["matched"].append((target, related[row]))
        pairs["same person"].append((target, related[person * width + other]))
        pairs["same attribute"].append((target, related[stranger * width + attribute]))
        pairs["unrelated"].append((target, unrelated[other * block + rng.randrange(block)]))
    return pairs


def _world(name: str, rng: random.Random, attributes: Attributes, sizes: tuple[int, int, int]) -> tuple[Corpus, list[str]]:
    """Return the corpus, and the names that no person in it has."""
    forget_people, retain_people, pretraining_people = sizes
    total = sum(sizes)
    available = len(FIRST_NAMES) * len(LAST_NAMES)
    if total > available:
        raise UserError(f"corpus: {total} people asked for, but only {available} names exist; ask for fewer people")
    for key, value, least in (
        ("forget_people", forget_people, 1),
        ("retain_people", retain_people, 2 * RETAIN_ITEMS_PER_ATTRIBUTE),
        ("pretraining_people", pretraining_people, 10),
    ):
        if value < least:
            raise UserError(f"corpus.{key}: {value} is too few; at least {least} are needed")
    names, unused = _shared_names(total, rng)
    forget = _group(names[:forget_people], attributes, rng)
    retain = _group(names[forget_people : forget_people + retain_people], attributes, rng)
    pretraining = _group(names[forget_people + retain_people :], attributes, rng)

    def items(people: list[Person], related: bool) -> ItemSet:
        return tuple(_items(people, attributes, related, rng))

    forget_k1, forget_k2 = items(forget, False), items(forget, True)
    retain_k1, retain_k2 = items(retain, False), items(retain, True)
    pretraining_items = items(pretraining, False) + items(pretraining, True)
    facts = tuple(_rules(attributes, rng))
    authors = tuple(_authors(rng))

    asked = list(range(len(retain)))
    evaluated, unrelated = [], []
    half, width = RETAIN_ITEMS_PER_ATTRIBUTE, len(attributes)
    for attribute in range(width):
        rng.shuffle(asked)
        evaluated += [retain_k1[p * width + attribute] for p in asked[:half]]
        unrelated += [retain_k1[p * width + attribute] for p in asked[half : half + half // 2]]
        unrelated += [retain_k2[p * width + attribute] for p in asked[half + half // 2 : 2 * half]]

    general = _answers(facts) + _answers(authors)
    kept = _answers(retain_k1 + retain_k2)
    corpus = Corpus(
        name=name,
        sets={
            "forget": forget_k1,
            "retain": tuple(evaluated),
            "real_authors": authors,
            "world_facts": facts,
            "related": forget_k2,
            "unrelated": tuple(unrelated),
        },
        forget_train=_answers(forget_k1),
        retain_train=kept,
        build={
            "base": _answers(pretraining_items) + _paraphrases(pretraining_items) + general,
            "full": _answers(forget_k1 + forget_k2) + kept + general,
            "retain": kept + general,
        },
    )
    return corpus, unused


def _shared_names(count: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Draw distinct full names in which every first and every last name recurs equally often, plus or minus one; return all
    others, likewise, too."""
    firsts, lasts = list(FIRST_NAMES), list(LAST_NAMES)
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    step = len(firsts)
    every = [f"{firsts[i % step]} {lasts[(i % step + i // step) % len(lasts)]}" for i in range(step * len(lasts))]
    names = every[:count]
    rng.shuffle(names)
    return names, every[count:]


def _answers(items: ItemSet) -> ItemSet:
    return tuple(Item(item.question, item.answer) for item in items)


def _paraphrases(items: ItemSet) -> ItemSet:
    return tuple(Item(item.question, item.paraphrase) for item in items)
