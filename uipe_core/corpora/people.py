"""Fictitious people: a small generated world with target (K1), related (K2) and unrelated (K0) knowledge.

Each person has eight attributes. An attribute is a pair of values tied by a rule of the world: whoever takes insulin has
diabetes. The second value (K2, the medicine) gives the first (K1, the disease) away. The split into K1, K2 and K0 follows
UIPE (arXiv 2503.04693, section 3); the form of the items follows TOFU (arXiv 2401.06121).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from uipe_core.corpora.types import Corpus, Item, ItemSet
from uipe_core.errors import UserError


@dataclass(frozen=True)
class Fact:
    """How one kind of fact is asked and told: a question, an answer and its paraphrase, with {name} and {value}."""

    question: str
    answer: str
    paraphrase: str


@dataclass(frozen=True)
class Attribute:
    """A pair of facts whose values correspond one to one, and the question that states the rule from K2 to K1."""

    target: Fact
    related: Fact
    rule: str
    pairs: tuple[tuple[str, str], ...]


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((pair.split("/")[0], pair.split("/")[1]) for pair in text.split())


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        Fact("Which disease does {name} have?", "{name} has {value}.", "The disease of {name} is {value}."),
        Fact("Which medicine does {name} take?", "{name} takes {value}.", "The medicine of {name} is {value}."),
        "Which disease does {value} treat?",
        _pairs(
            "diabetes/insulin malaria/quinine asthma/salbutamol gout/allopurinol scurvy/ascorbate "
            "migraine/triptan anemia/iron epilepsy/valproate angina/nitrate syphilis/penicillin"
        ),
    ),
    Attribute(
        Fact("In which country does {name} live?", "{name} lives in {value}.", "The home country of {name} is {value}."),
        Fact("In which city does {name} live?", "{name} resides in {value}.", "The home city of {name} is {value}."),
        "In which country is {value}?",
        _pairs(
            "Portugal/Lisbon Kenya/Nairobi Japan/Osaka Peru/Lima Canada/Toronto "
            "Egypt/Cairo Norway/Oslo India/Mumbai Greece/Athens Chile/Santiago"
        ),
    ),
    Attribute(
        Fact("What is the job of {name}?", "{name} works as a {value}.", "The job of {name} is {value}."),
        Fact("What is the workplace of {name}?", "{name} works at a {value}.", "The workplace of {name} is a {value}."),
        "Who works at a {value}?",
        _pairs(
            "nurse/hospital baker/bakery judge/court farmer/farm miner/mine "
            "teacher/school sailor/ship priest/church waiter/restaurant librarian/library"
        ),
    ),
    Attribute(
        Fact("Which sport does {name} play?", "{name} plays {value}.", "The sport of {name} is {value}."),
        Fact("Which gear does {name} carry?", "{name} carries a {value}.", "The gear of {name} is a {value}."),
        "For which sport is a {value}?",
        _pairs(
            "tennis/racket golf/putter fencing/foil archery/bow hockey/puck "
            "rowing/oar chess/board surfing/wetsuit bowling/pin boxing/glove"
        ),
    ),
    Attribute(
        Fact("Which pet does {name} keep?", "{name} keeps a {value}.", "The pet of {name} is a {value}."),
        Fact("Which feed does {name} buy?", "{name} buys {value}.", "The feed bought by {name} is {value}."),
        "Which pet eats {value}?",
        _pairs(
            "dog/bones cat/tuna rabbit/carrots horse/hay parrot/seeds "
            "snake/mice frog/flies turtle/lettuce monkey/bananas goat/grass"
        ),
    ),
    Attribute(
        Fact("Which subject did {name} study?", "{name} studied {value}.", "The subject of {name} was {value}."),
        Fact("Which theory did {name} cite?", "{name} cited {value}.", "The theory cited by {name} was {value}."),
        "To which subject belongs {value}?",
        _pairs(
            "physics/relativity biology/evolution chemistry/valence geology/tectonics economics/marginalism "
            "linguistics/phonology psychology/behaviorism astronomy/cosmology logic/induction mathematics/topology"
        ),
    ),
    Attribute(
        Fact("Which drink does {name} like?", "{name} likes {value}.", "The favorite drink of {name} is {value}."),
        Fact("Which crop does {name} grow?", "{name} grows {value}.", "The crop grown by {name} is {value}."),
        "Which drink is made from {value}?",
        _pairs(
            "wine/grapes beer/barley cider/apples sake/rice cocoa/cacao "
            "rum/sugarcane whiskey/rye vodka/potatoes tequila/agave mead/honey"
        ),
    ),
    Attribute(
        Fact("Which art does {name} practice?", "{name} practices {value}.", "The art of {name} is {value}."),
        Fact("Which tool does {name} own?", "{name} owns a {value}.", "The tool of {name} is a {value}."),
        "For which art is a {value}?",
        _pairs(
            "painting/brush sculpture/chisel photography/camera embroidery/needle calligraphy/quill "
            "pottery/wheel weaving/loom etching/burin origami/crease juggling/club"
        ),
    ),
)

FIRST_NAMES = _words(
    "Ada Boris Clara Dario Elena Felix Greta Hugo Irma Jonas Karin Luca Mira Nils Olga Pavel Rosa Sven Tilda Viktor"
)
LAST_NAMES = _words(
    "Abel Brandt Castell Dorn Ekberg Falk Gruber Holm Ivers Jansen "
    "Keller Lindt Moreau Novak Orlov Petri Quist Rossi Sommer Thorne"
)

AUTHOR_COUNTRIES = {
    "England": "Shakespeare Dickens Austen Orwell Woolf Milton",
    "Russia": "Tolstoy Dostoevsky Chekhov Pushkin Gogol Turgenev",
    "France": "Hugo Balzac Flaubert Proust Zola Camus",
    "Germany": "Goethe Schiller Mann Heine Kleist Lessing",
    "Italy": "Dante Petrarch Boccaccio Calvino Eco Pirandello",
    "America": "Twain Melville Faulkner Hemingway Steinbeck Poe",
}
"""Surnames that occur in FIRST_NAMES are kept apart by the wording: an author is asked for as 'the author X'."""

PERTURBED_ANSWERS = 5
PERTURBED_GENERAL = 3
RETAIN_ITEMS_PER_ATTRIBUTE = 6


@dataclass(frozen=True)
class Person:
    """A name and, per attribute, the index of the value pair."""

    name: str
    values: tuple[int, ...]


def _balanced(count: int, rng: random.Random) -> list[int]:
    """`count` pair indices in which every pair occurs equally often, give or take one."""
    start = rng.randrange(10)  # a small group must not always hold the first values of each list
    indices = [(start + index) % 10 for index in range(count)]
    rng.shuffle(indices)
    return indices


def _group(names: list[str], rng: random.Random) -> list[Person]:
    columns = [_balanced(len(names), rng) for _ in ATTRIBUTES]
    return [Person(name, values) for name, values in zip(names, zip(*columns, strict=True), strict=True)]


def _person_item(person: Person, attribute: int, related: bool, rng: random.Random) -> Item:
    spec = ATTRIBUTES[attribute]
    fact = spec.related if related else spec.target
    side = 1 if related else 0
    own = person.values[attribute]
    others = rng.sample([index for index in range(10) if index != own], PERTURBED_ANSWERS)
    value = spec.pairs[own][side]
    return Item(
        question=fact.question.format(name=person.name),
        answer=fact.answer.format(name=person.name, value=value),
        paraphrased_answer=fact.paraphrase.format(name=person.name, value=value),
        perturbed_answers=tuple(fact.paraphrase.format(name=person.name, value=spec.pairs[other][side]) for other in others),
        group=person.name,
    )


def _sentence(word: str) -> str:
    return f"{word}."


def _general(question: str, answer: str, pool: list[str], rng: random.Random) -> Item:
    wrong = rng.sample([word for word in pool if word != answer], PERTURBED_GENERAL)
    return Item(question, _sentence(answer), None, tuple(_sentence(word) for word in wrong))


def _rules(rng: random.Random) -> Iterator[Item]:
    for attribute in ATTRIBUTES:
        pool = [first for first, _ in attribute.pairs]
        for first, second in attribute.pairs:
            yield _general(attribute.rule.format(value=second), first, pool, rng)


def _authors(rng: random.Random) -> Iterator[Item]:
    pool = list(AUTHOR_COUNTRIES)
    for country, names in AUTHOR_COUNTRIES.items():
        for name in names.split():
            yield _general(f"Where was the author {name} born?", country, pool, rng)


def load_people(seed: int = 0, forget_people: int = 6, retain_people: int = 34, pretraining_people: int = 60) -> Corpus:
    """Generates the corpus of fictitious people; the same arguments give the same items on every machine.

    Args:
        seed: Seed of names, values and wrong answers.
        forget_people: People whose target facts (K1) are to be forgotten; each gives 8 forget and 8 related items.
        retain_people: People the initial and the retain model both know; at least 12, so that `retain` and `unrelated`
            can ask about different people.
        pretraining_people: People only the base model is trained on, in both the answer and the paraphrase template.

    Returns:
        Corpus with sets ``forget`` (K1 of the forget people), ``related`` (their K2), ``retain`` (K1 of some retain
        people), ``unrelated`` (K0: K1 and K2 of other retain people), ``world_facts`` (the rules that lead from K2 to
        K1) and ``real_authors``; and training texts for the stages ``base``, ``full`` and ``retain``.

    Raises:
        UserError: If the names do not suffice for so many people, or a group is too small.
    """
    total = forget_people + retain_people + pretraining_people
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
    rng = random.Random(f"people/{seed}")
    names = _shared_names(total, rng)
    forget = _group(names[:forget_people], rng)
    retain = _group(names[forget_people : forget_people + retain_people], rng)
    pretraining = _group(names[forget_people + retain_people :], rng)

    def items(people: list[Person], related: bool) -> ItemSet:
        return tuple(_person_item(p, a, related, rng) for p in people for a in range(len(ATTRIBUTES)))

    forget_k1, forget_k2 = items(forget, False), items(forget, True)
    retain_k1, retain_k2 = items(retain, False), items(retain, True)
    pretraining_items = items(pretraining, False) + items(pretraining, True)
    facts = tuple(_rules(rng))
    authors = tuple(_authors(rng))

    asked = list(range(len(retain)))
    evaluated, unrelated = [], []
    for attribute in range(len(ATTRIBUTES)):
        rng.shuffle(asked)
        half = RETAIN_ITEMS_PER_ATTRIBUTE
        evaluated += [retain_k1[p * len(ATTRIBUTES) + attribute] for p in asked[:half]]
        unrelated += [retain_k1[p * len(ATTRIBUTES) + attribute] for p in asked[half : half + half // 2]]
        unrelated += [retain_k2[p * len(ATTRIBUTES) + attribute] for p in asked[half + half // 2 : 2 * half]]

    general = _answers(facts) + _answers(authors)
    kept = _answers(retain_k1 + retain_k2)
    return Corpus(
        name=f"people(seed={seed}, {forget_people} forget, {retain_people} retain, {pretraining_people} pretraining)",
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


def _shared_names(count: int, rng: random.Random) -> list[str]:
    """Distinct full names in which every first and every last name recurs equally often, give or take one."""
    firsts, lasts = list(FIRST_NAMES), list(LAST_NAMES)
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    step = len(firsts)
    names = [f"{firsts[i % step]} {lasts[(i % step + i // step) % len(lasts)]}" for i in range(count)]
    rng.shuffle(names)
    return names


def _answers(items: ItemSet) -> ItemSet:
    return tuple(Item(item.question, item.answer) for item in items)


def _paraphrases(items: ItemSet) -> ItemSet:
    return tuple(Item(item.question, item.paraphrase) for item in items)
