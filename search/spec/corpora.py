"""From the corpus section of a study to the corpus itself."""

from search.spec.choice_sections import SOURCES, MultipleChoiceCorpus
from search.spec.sections import PeopleCorpus, TofuCorpus, is_local
from search.spec.study import StudySpec
from uipe_core.corpora.multiple_choice import load_multiple_choice
from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import Corpus


def load_corpus(spec: StudySpec) -> Corpus:
    """The corpus of a study."""
    if isinstance(spec.corpus, MultipleChoiceCorpus):
        chosen = spec.corpus
        return load_multiple_choice(
            chosen.forget.data_set(),
            chosen.utility.data_set(),
            None if chosen.forget_texts is None else chosen.forget_texts.data_set(),
            None if chosen.retain_texts is None else chosen.retain_texts.data_set(),
            chosen.texts,
            chosen.text_characters,
        )
    if isinstance(spec.corpus, PeopleCorpus):
        sizes = spec.corpus
        return load_people(spec.seed, sizes.forget_people, sizes.retain_people, sizes.pretraining_people)
    tofu = spec.corpus
    return load_tofu(tofu.source, tofu.split, tofu.retain_train, tofu.first_items)


def fetched_sources(spec: StudySpec) -> list[tuple[str, str]]:
    """Keys and names of the corpus's data sets that must be fetched."""
    corpus = spec.corpus
    if isinstance(corpus, TofuCorpus):
        sources = [("source", corpus.source)]
    elif isinstance(corpus, MultipleChoiceCorpus):
        given = {key: getattr(corpus, key) for key in SOURCES}
        sources = [(f"{key}.source", data.source) for key, data in given.items() if data is not None]
    else:
        sources = []
    return [(key, source) for key, source in sources if not is_local(source)]
