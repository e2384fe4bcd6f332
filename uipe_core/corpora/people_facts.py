"""List the facts of the generated world: attributes with their values, names, authors.

An attribute is a pair of facts whose values correspond one to one. A study's world has the eight of `ATTRIBUTES`, the world of
the paper's size the ten of `PAPER_ATTRIBUTES`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """Templates of one kind of fact: question, answer and paraphrase, with {name} and {value}."""

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


def _attribute(target: Fact, related: Fact, rule: str, pairs: str) -> Attribute:
    values = (pair.split("/") for pair in pairs.split())
    return Attribute(target, related, rule, tuple((first, second) for first, second in values))


ATTRIBUTES: tuple[Attribute, ...] = (
    _attribute(
        Fact("Which disease does {name} have?", "{name} has {value}.", "The disease of {name} is {value}."),
        Fact("Which medicine does {name} take?", "{name} takes {value}.", "The medicine of {name} is {value}."),
        "Which disease does {value} treat?",
        "diabetes/insulin malaria/quinine asthma/salbutamol gout/allopurinol scurvy/ascorbate "
        "migraine/triptan anemia/iron epilepsy/valproate angina/nitrate syphilis/penicillin",
    ),
    _attribute(
        Fact("In which country does {name} live?", "{name} lives in {value}.", "The home country of {name} is {value}."),
        Fact("In which city does {name} live?", "{name} resides in {value}.", "The home city of {name} is {value}."),
        "In which country is {value}?",
        "Portugal/Lisbon Kenya/Nairobi Japan/Osaka Peru/Lima Canada/Toronto "
        "Egypt/Cairo Norway/Oslo India/Mumbai Greece/Athens Chile/Santiago",
    ),
    _attribute(
        Fact("What is the job of {name}?", "{name} works as a {value}.", "The job of {name} is {value}."),
        Fact("What is the workplace of {name}?", "{name} works at a {value}.", "The workplace of {name} is a {value}."),
        "Who works at a {value}?",
        "nurse/hospital baker/bakery judge/court farmer/farm miner/mine "
        "teacher/school sailor/ship priest/church waiter/restaurant librarian/library",
    ),
    _attribute(
        Fact("Which sport does {name} play?", "{name} plays {value}.", "The sport of {name} is {value}."),
        Fact("Which gear does {name} carry?", "{name} carries a {value}.", "The gear of {name} is a {value}."),
        "For which sport is a {value}?",
        "tennis/racket golf/putter fencing/foil archery/bow hockey/puck "
        "rowing/oar chess/board surfing/wetsuit bowling/pin boxing/glove",
    ),
    _attribute(
        Fact("Which pet does {name} keep?", "{name} keeps a {value}.", "The pet of {name} is a {value}."),
        Fact("Which feed does {name} buy?", "{name} buys {value}.", "The feed bought by {name} is {value}."),
        "Which pet eats {value}?",
        "dog/bones cat/tuna rabbit/carrots horse/hay parrot/seeds "
        "snake/mice frog/flies turtle/lettuce monkey/bananas goat/grass",
    ),
    _attribute(
        Fact("Which subject did {name} study?", "{name} studied {value}.", "The subject of {name} was {value}."),
        Fact("Which theory did {name} cite?", "{name} cited {value}.", "The theory cited by {name} was {value}."),
        "To which subject belongs {value}?",
        "physics/relativity biology/evolution chemistry/valence geology/tectonics economics/marginalism "
        "linguistics/phonology psychology/behaviorism astronomy/cosmology logic/induction mathematics/topology",
    ),
    _attribute(
        Fact("Which drink does {name} like?", "{name} likes {value}.", "The favorite drink of {name} is {value}."),
        Fact("Which crop does {name} grow?", "{name} grows {value}.", "The crop grown by {name} is {value}."),
        "Which drink is made from {value}?",
        "wine/grapes beer/barley cider/apples sake/rice cocoa/cacao "
        "rum/sugarcane whiskey/rye vodka/potatoes tequila/agave mead/honey",
    ),
    _attribute(
        Fact("Which art does {name} practice?", "{name} practices {value}.", "The art of {name} is {value}."),
        Fact("Which tool does {name} own?", "{name} owns a {value}.", "The tool of {name} is a {value}."),
        "For which art is a {value}?",
        "painting/brush sculpture/chisel photography/camera embroidery/needle calligraphy/quill "
        "pottery/wheel weaving/loom etching/burin origami/crease juggling/club",
    ),
)

PAPER_ATTRIBUTES: tuple[Attribute, ...] = (
    *ATTRIBUTES,
    _attribute(
        Fact("Which language does {name} speak?", "{name} speaks {value}.", "The language of {name} is {value}."),
        Fact("Which greeting does {name} use?", "{name} says {value}.", "The greeting of {name} is {value}."),
        "Of which language is {value} a greeting?",
        "Spanish/hola French/bonjour German/hallo Italian/ciao Russian/privet "
        "Hawaiian/aloha Hebrew/shalom Swahili/jambo Hindi/namaste Polish/czesc",
    ),
    _attribute(
        Fact("In which month was {name} born?", "{name} was born in {value}.", "The birth month of {name} is {value}."),
        Fact("Which birthstone does {name} wear?", "{name} wears {value}.", "The birthstone of {name} is {value}."),
        "Of which month is {value} the birthstone?",
        "January/garnet February/amethyst March/aquamarine April/diamond May/emerald "
        "June/pearl July/ruby August/peridot September/sapphire October/opal",
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
"""Surnames that are also in FIRST_NAMES are distinguished by the wording 'the author X'."""
