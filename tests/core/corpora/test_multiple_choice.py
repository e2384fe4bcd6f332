"""Multiple-choice corpora from folders, files and the hub: what ends up where, and every kind of damage."""

import json
from dataclasses import replace

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from uipe_core.corpora.files import DataSet
from uipe_core.corpora.multiple_choice import letter_prompt, load_multiple_choice
from uipe_core.corpora.split import split_corpus, take_items
from uipe_core.corpora.types import ChoiceItem, Item, item_set_hash
from uipe_core.errors import UserError

LONG = "A text that is long enough to be taken for prose and not for a heading: "


def questions(prefix, count, options=4, **more):
    return [
        {"question": f"{prefix} {i}?", "choices": [f"{prefix} {i}{j}" for j in range(options)], "answer": i % options, **more}
        for i in range(count)
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "forget.jsonl", questions("poison", 5))
    write(tmp_path / "utility.jsonl", questions("river", 7))
    write(tmp_path / "texts.jsonl", [{"text": f"{LONG}{i} " * 3} for i in range(4)])
    return tmp_path


def load(folder, **more):
    return load_multiple_choice(DataSet(str(folder / "forget.jsonl")), DataSet(str(folder / "utility.jsonl")), **more)


def test_questions_and_what_is_trained_on(folder):
    corpus = load(folder)
    assert {name: len(items) for name, items in corpus.choices.items()} == {"forget": 5, "utility": 7}
    assert corpus.choices["forget"][2] == ChoiceItem("poison 2?", ("poison 20", "poison 21", "poison 22", "poison 23"), 2)
    assert corpus.forget_train[2] == Item("poison 2?", "poison 22")
    assert len(corpus.retain_train) == 7
    assert corpus.sets == {}


def test_prose_takes_the_place_of_questions(folder):
    source = DataSet(str(folder / "texts.jsonl"))
    corpus = load(folder, forget_texts=source, retain_texts=source)
    assert corpus.forget_train == corpus.retain_train
    assert corpus.forget_train[1] == Item("", (f"{LONG}1 " * 3).strip(), plain=True)


def test_prose_is_cut_counted_and_headings_are_passed_over(folder):
    write(folder / "texts.jsonl", [{"text": " = Heading = "}, *({"text": f"{LONG}{i}"} for i in range(4)), {"text": ""}])
    texts = load(folder, forget_texts=DataSet(str(folder / "texts.jsonl")), texts=2, text_characters=60).forget_train
    assert [item.answer for item in texts] == [LONG[:60]] * 2


def test_models_built_here_learn_letters_and_texts_and_the_retain_model_nothing_of_the_forget_set(folder):
    corpus = load(folder, forget_texts=DataSet(str(folder / "texts.jsonl")))
    assert set(corpus.build) == {"base", "full", "retain"}
    lettered = [item for item in corpus.build["full"] if item.question.endswith("Answer:")]
    assert [item.answer for item in lettered[:5]] == [" A", " B", " C", " D", " A"]
    assert len(corpus.build["full"]) == 5 + 4 + 7 + 7
    assert set(corpus.build["retain"]) == set(corpus.build["full"][9:])
    assert not any("poison" in item.question for item in corpus.build["retain"])


def test_letter_prompt():
    item = ChoiceItem(" What is it? ", ("this", "that", "both"), 1, "cell biology")
    assert letter_prompt(item) == (
        "The following are multiple choice questions (with answers) about cell biology.\n\n"
        "What is it?\nA. this\nB. that\nC. both\nAnswer:"
    )
    assert letter_prompt(replace(item, topic="")).startswith("The following are multiple choice questions (with answers).\n\n")


def test_topics_come_from_the_subject_or_the_subset(tmp_path):
    write(tmp_path / "wmdp-bio" / "test.jsonl", questions("poison", 1))
    write(tmp_path / "all" / "test.jsonl", questions("river", 1, subject="high_school_geography"))
    forget, utility = (DataSet(str(tmp_path), (subset,)) for subset in ("wmdp-bio", "all"))
    corpus = load_multiple_choice(forget, utility)
    assert [items[0].topic for items in corpus.choices.values()] == ["biology", "high school geography"]


@pytest.mark.parametrize(
    "change",
    [
        {"choices": ["a", "b", "c", "d"]},
        {"choices": ["poison 01", "poison 00", "poison 02", "poison 03"]},
        {"answer": 3},
        {"question": "other?"},
        {"subject": "chemistry"},
    ],
)
def test_hash_changes_with_everything_that_is_asked(folder, change):
    before = load(folder)
    rows = questions("poison", 5)
    write(folder / "forget.jsonl", [{**rows[0], **change}, *rows[1:]])
    after = load(folder)
    assert before.set_hashes["forget"] != after.set_hashes["forget"]
    assert before.set_hashes["utility"] == after.set_hashes["utility"]
    assert before.hash != after.hash


def test_plain_items_have_a_hash_of_their_own():
    item = Item("q", "a")
    assert item_set_hash([item]) != item_set_hash([replace(item, plain=True)])


def test_parquet_and_several_subsets_in_order(tmp_path):
    for subset, prefix in (("virology", "virus"), ("anatomy", "bone")):
        write_parquet(tmp_path / subset / "test-00000-of-00002.parquet", questions(prefix, 2))
        write_parquet(tmp_path / subset / "test-00001-of-00002.parquet", questions(f"{prefix} more", 1))
        write_parquet(tmp_path / subset / "dev-00000-of-00001.parquet", questions("unwanted", 3))
    write(tmp_path / "forget.jsonl", questions("poison", 1))
    corpus = load_multiple_choice(DataSet(str(tmp_path / "forget.jsonl")), DataSet(str(tmp_path), ("virology", "anatomy")))
    asked = [item.question for item in corpus.choices["utility"]]
    assert asked == ["virus 0?", "virus 1?", "virus more 0?", "bone 0?", "bone 1?", "bone more 0?"]


@pytest.mark.parametrize("file", ["test.jsonl", "data/test-00000-of-00001.jsonl", "test/0000.jsonl"])
def test_layouts_of_a_data_set_without_subsets(folder, file):
    write(folder / "set" / file, questions("river", 2))
    write(folder / "set" / "testament.jsonl", questions("unwanted", 2))
    corpus = load_multiple_choice(DataSet(str(folder / "forget.jsonl")), DataSet(str(folder / "set")))
    assert len(corpus.choices["utility"]) == 2


# Damage


def edit(name, number, **changes):
    def change(folder):
        path = folder / name
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        row = {**lines[number - 1], **changes}
        lines[number - 1] = {key: value for key, value in row.items() if value != "REMOVED"}
        write(path, lines)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("forget.jsonl", 2, answer=4), r"forget\.jsonl, line 2: field 'answer' is 4; .*0 to 3"),
        (edit("forget.jsonl", 2, answer=-1), r"line 2: field 'answer' is -1"),
        (edit("forget.jsonl", 2, answer="B"), r"line 2: field 'answer' is 'B'; give the index"),
        (edit("forget.jsonl", 2, answer=True), r"line 2: field 'answer' is True"),
        (edit("forget.jsonl", 2, answer=1.0), r"line 2: field 'answer' is 1\.0"),
        (edit("forget.jsonl", 3, choices=["one"]), r"line 3: field 'choices' is \['one'\]; give 2 to 26 choices"),
        (edit("forget.jsonl", 3, choices=["x"] * 27), r"line 3: .*give 2 to 26 choices"),
        (edit("forget.jsonl", 3, choices="a, b"), r"line 3: field 'choices' is 'a, b'; give a list of texts"),
        (edit("forget.jsonl", 3, choices=["a", 2]), r"line 3: field 'choices' is \['a', 2\]; give a list of texts"),
        (edit("utility.jsonl", 7, question=" "), r"utility\.jsonl, line 7: field 'question' is ' '; .*not blank"),
        (edit("utility.jsonl", 7, subject=3), r"utility\.jsonl, line 7: field 'subject' is 3"),
        (
            edit("forget.jsonl", 1, choices="REMOVED", choice=["a", "b"]),
            r"line 1: field 'choices' is missing; found: question, answer, choice\. Did you mean 'choices' by 'choice'",
        ),
        (edit("forget.jsonl", 1, answer="REMOVED"), r"line 1: field 'answer' is missing; found: question, choices"),
        (lambda f: (f / "utility.jsonl").write_text("\n"), r"utility\.jsonl: holds no items"),
        (lambda f: (f / "utility.jsonl").write_text("[1]\n"), r"utility\.jsonl, line 1: is a JSON list"),
        (lambda f: (f / "utility.jsonl").write_text('\n{"question"'), r"utility\.jsonl, line 2: not valid JSON"),
        (
            lambda f: (f / "utility.jsonl").write_bytes(b'\n{"q": "\xff"}'),
            r"utility\.jsonl, line 2: not UTF-8 text \(byte 8 of",
        ),
        (lambda f: (f / "utility.jsonl").unlink(), r"utility\.jsonl': no such file or folder"),
        (edit("texts.jsonl", 2, text="REMOVED", txt="x"), r"texts\.jsonl, line 2: field 'text' is missing; .*Did you mean"),
        (edit("texts.jsonl", 2, text=None), r"texts\.jsonl, line 2: field 'text' is None; give a text"),
        (lambda f: write(f / "texts.jsonl", [{"text": "short"}]), r"texts\.jsonl: holds no text of at least 50 characters"),
        (
            lambda f: write(f / "utility.jsonl", [*questions("river", 2), *questions("poison", 1)]),
            r"1 questions of .*forget\.jsonl are in .*utility\.jsonl too, first 'poison 0\?'",
        ),
    ],
)
def test_damaged_files(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        load(folder, forget_texts=DataSet(str(folder / "texts.jsonl")))


def test_damaged_parquet(folder):
    broken = folder / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"broken\.parquet: not a parquet file"):
        load_multiple_choice(DataSet(str(folder / "forget.jsonl")), DataSet(str(broken)))
    rows = questions("river", 3)
    rows[2]["answer"] = 9
    with pytest.raises(UserError, match=r"bad\.parquet, row 3: field 'answer' is 9"):
        load_multiple_choice(DataSet(str(folder / "forget.jsonl")), DataSet(str(write_parquet(folder / "bad.parquet", rows))))


def test_other_kinds_of_file_are_refused(folder):
    (folder / "questions.xls").write_text("question,choices\n")
    with pytest.raises(UserError, match=r"questions\.xls: a data file ends in \.parquet, \.jsonl, \.json"):
        load_multiple_choice(DataSet(str(folder / "questions.xls")), DataSet(str(folder / "utility.jsonl")))


def test_misspelt_subset_and_split(tmp_path):
    write(tmp_path / "wmdp-bio" / "test-00000-of-00001.jsonl", questions("poison", 1))
    for data_set, message in (
        (DataSet(str(tmp_path), ("wmdp-boi",)), r"no subset 'wmdp-boi'; it has wmdp-bio\. Did you mean 'wmdp-bio'"),
        (DataSet(str(tmp_path), ("wmdp-bio",), "tset"), r"no file of split 'tset'; it has test\. Did you mean 'test'"),
        (DataSet(str(tmp_path)), r"no file of split 'test'; it has none"),
        (DataSet(str(tmp_path / "nowhere")), r"nowhere': no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            list(data_set.rows())


# The hub


def test_hub_files_are_fetched_by_subset_and_split(tmp_path, monkeypatch):
    write_parquet(tmp_path / "wmdp-bio" / "test-00000-of-00001.parquet", questions("poison", 2))
    asked = []

    def download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    rows = list(DataSet("cais/wmdp", ("wmdp-bio",)).rows())
    assert [(subset, row.fields["question"]) for subset, row in rows] == [("wmdp-bio", "poison 0?"), ("wmdp-bio", "poison 1?")]
    assert asked == [("cais/wmdp", "dataset", ["wmdp-bio/test*", "wmdp-bio/test/*"])]


def test_failed_download_names_data_set_and_remedy(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"cais/wmdp from the hub \(no route to host\); .*your access"):
        list(DataSet("cais/wmdp", ("wmdp-bio",)).rows())


def test_halves_have_their_share_of_every_topic(tmp_path):
    write(tmp_path / "forget.jsonl", questions("poison", 8))
    write(tmp_path / "utility.jsonl", [*questions("river", 6, subject="geography"), *questions("bone", 4, subject="anatomy")])
    corpus = load(tmp_path)
    split = split_corpus(corpus, 0.5, seed=1)
    halves = [take_items(corpus, rows) for rows in (split.select, split.report)]
    for half in halves:
        assert len(half.choices["forget"]) == 4
        assert [item.topic for item in half.choices["utility"]] == ["geography"] * 3 + ["anatomy"] * 2
    for name, items in corpus.choices.items():
        assert {*halves[0].choices[name], *halves[1].choices[name]} == set(items)
    assert halves[0].set_hashes["forget"] != halves[1].set_hashes["forget"]
    assert halves[0].forget_train == corpus.forget_train
