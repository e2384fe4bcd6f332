"""A user's own data: every shape and file type, stand-ins, and everything wrong with it in one error."""

import csv
import json
import tracemalloc

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from uipe_core.corpora.files import DataSet
from uipe_core.corpora.question_rows import RowReader
from uipe_core.corpora.questions import load_questions, with_stand_ins
from uipe_core.corpora.rows import stop
from uipe_core.corpora.split import split_corpus, take_items
from uipe_core.corpora.types import Item
from uipe_core.errors import UserError


def pairs(topic, count=8):
    return [{"question": f"What is {topic} {number}?", "answer": f"It is {'x' * number} {topic}."} for number in range(count)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def load(tmp_path):
    """Load a corpus of the rows, or of a path, given for each set."""

    def make(forget, retain=None, seed=0, words=(6, 4), **more):
        given = {"forget": forget, "retain": pairs("river") if retain is None else retain, **more}
        sources = {
            name: DataSet(str(write(tmp_path / f"{name}.jsonl", rows) if isinstance(rows, list) else rows), split="train")
            for name, rows in given.items()
        }
        return load_questions(sources, *words, seed=seed)

    return make


def problems(load, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


def turn(role, content):
    return {"role": role, "content": content}


def test_pairs_are_trained_on_and_evaluated(load):
    corpus = load(pairs("poison"), general=pairs("world", 3))
    assert corpus.forget_train[2] == Item("What is poison 2?", "It is xx poison.")
    assert corpus.build["full"] == (*corpus.forget_train, *corpus.retain_train)
    assert corpus.build["retain"] == corpus.retain_train
    assert {name: len(items) for name, items in corpus.sets.items()} == {"forget": 8, "retain": 8, "general": 3}
    assert corpus.sets["forget"][2].question == "What is poison 2?"
    assert len(corpus.sets["forget"][0].perturbed_answers) == 5
    assert len(corpus.sets["general"][0].perturbed_answers) == 2
    assert set(corpus.stand_ins["forget"]) == {"paraphrased", "perturbed"}
    assert "seed=0" in corpus.name and "forget.jsonl" in corpus.name


def test_every_shape_gives_the_same_items(load):
    own = pairs("poison")
    shapes = [
        [{"prompt": row["question"], "completion": row["answer"]} for row in own],
        [{"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]} for row in own],
        [{"prompt": [turn("user", row["question"])], "completion": [turn("assistant", row["answer"])]} for row in own],
    ]
    assert {load(rows).hash for rows in shapes} == {load(own).hash}


def test_a_conversation_is_joined_by_role(load):
    before = [turn("system", "Be brief."), turn("user", "Who?"), turn("assistant", "Ann."), turn("user", "When?")]
    rows = [{"messages": [*before, turn("assistant", f"In {year}.")]} for year in (1900, 19000)]
    item = load(rows).forget_train[0]
    assert item == Item("System: Be brief.\n\nUser: Who?\n\nAssistant: Ann.\n\nUser: When?", "In 1900.")


@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_corpus(load, tmp_path, ending):
    rows = [
        {**row, "paraphrased_answer": "So it is.", "perturbed_answers": ["no", 'a "no", or two\nlines']} for row in pairs("é")
    ]
    expected = load(rows, general=pairs("world"))
    paths = [
        write(tmp_path / f"{name}{ending}", made) for name, made in [("a", rows), ("b", pairs("river")), ("c", pairs("world"))]
    ]
    assert load(paths[0], paths[1], general=paths[2]).hash == expected.hash
    assert expected.stand_ins["general"] == ("paraphrased", "perturbed")
    assert "forget" not in expected.stand_ins


def test_a_table_of_a_spreadsheet_is_read(load, tmp_path):
    rows = "".join(f'{row["question"]};"{row["answer"]}"\r\n' for row in pairs("poison"))
    (tmp_path / "own.csv").write_bytes(b"\xef\xbb\xbfquestion;answer\r\n" + rows.encode())
    assert load(tmp_path / "own.csv").hash == load(pairs("poison")).hash


def test_a_folder_laid_out_as_the_hub_is_read_by_split(load, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("About it.")
    write(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", pairs("poison"))
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", pairs("other"))
    assert load(tmp_path / "set").hash == load(pairs("poison")).hash


def test_texts_are_cut_into_windows(load):
    words = [f"w{number}" for number in range(24)]
    corpus = load([{"text": " ".join(words[:10]) + "\n\n" + " ".join(words[10:])}, {"text": "only four words\n here"}])
    assert [item.answer for item in corpus.forget_train] == [
        *(" ".join(words[start : start + 10]) for start in (0, 10, 20)),
        "only four words\n here",
    ]
    assert all(item.plain and not item.question for item in corpus.forget_train)
    first, second, last = corpus.sets["forget"]
    assert (first.question, first.answer, first.plain) == (" ".join(words[:6]), " " + " ".join(words[6:10]), True)
    assert (second.question, last.question, last.answer) == (" ".join(words[10:16]), "only four", " words\n here")
    assert (first.group, second.group, last.group) == ("text 1", "text 1", "text 2")


def test_a_folder_of_documents_has_a_group_a_file(load, tmp_path):
    for place in ("docs/a.md", "docs/b/c.txt", "docs/.git/d.txt"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xef\xbb\xbf" + f"the text of the file named {place}".encode())
    corpus = load(tmp_path / "docs")
    assert [item.group for item in corpus.sets["forget"]] == ["a.md", "b/c.txt"]
    assert corpus.sets["forget"][0].question.startswith("the text")
    assert load(tmp_path / "docs" / "a.md", words=(1, 1)).sets["forget"][0].group == "text 1"


def test_characters_of_unspaced_scripts_are_words_with_their_marks():
    reader = RowReader(2, 1, stop)
    found = [entry.trained.answer for entry in reader._windows("这是一本书 กี่ข้อ two words", "g")]
    assert found == ["这是一", "本书 กี่", "ข้อ two", "words"]


def test_groups_are_texts_or_numbers(load):
    rows = [{**row, "group": group} for row, group in zip(pairs("poison"), [1, "1", "Ann", None] * 2, strict=True)]
    assert [item.group for item in load(rows).sets["forget"]][:4] == ["1", "1", "Ann", None]


def test_own_perturbed_answers_are_kept_and_their_number_is_that_of_stand_ins(load):
    rows = [{**row, "perturbed_answer": ["no", "never"]} if number % 2 else row for number, row in enumerate(pairs("poison"))]
    corpus = load(rows)
    assert corpus.sets["forget"][1].perturbed_answers == ("no", "never")
    assert {len(item.perturbed_answers) for item in corpus.sets["forget"]} == {2}
    assert corpus.forget_train[1].perturbed_answers == ()
    single = load([{**pairs("poison")[0], "perturbed_answers": ["no"]}])
    assert single.sets["forget"][0].perturbed_answers == ("no",)
    assert single.stand_ins["forget"] == ("paraphrased",)


def test_stand_ins_outlive_the_split_and_are_no_part_of_the_hash(load):
    corpus = load(pairs("poison"))
    half = take_items(corpus, split_corpus(corpus, 0.5, 0).select)
    assert half.stand_ins == corpus.stand_ins != {}
    assert load([{**row, "paraphrased_answer": None} for row in pairs("poison")]).hash == corpus.hash


@given(st.lists(st.text(min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=30), st.integers(0, 5))
@settings(deadline=None)
def test_stand_ins_are_other_answers_and_depend_on_seed_alone(answers, seed):
    items = tuple(Item(f"{number}?", answer) for number, answer in enumerate(answers))
    different = {answer.strip().casefold() for answer in answers}
    if len(different) == 1:
        with pytest.raises(UserError, match="too few to stand in"):
            with_stand_ins(items, seed)
        return
    found = with_stand_ins(items, seed)
    assert found == with_stand_ins(items, seed)
    for item in found:
        mine = [answer.strip().casefold() for answer in item.perturbed_answers]
        assert len(set(mine)) == len(mine) == min(5, len(different) - 1)
        assert item.answer.strip().casefold() not in mine
        farthest = max(abs(len(answer) - len(item.answer)) for answer in item.perturbed_answers)
        outside = [a for a in answers if a.strip().casefold() not in {*mine, item.answer.strip().casefold()}]
        # Of answers that differ in case or outer spaces, the last stands for all.
        assert all(abs(len(answer) - len(item.answer)) >= farthest - 6 for answer in outside)


Q = {"question": "Who?", "answer": "Ann."}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [Q, {"question": "Who?", "anwser": "Bo."}],
            "line 2: field 'answer' is missing, found question, anwser; add it. Did you",
        ),
        (
            [Q, {"question": " ", "answer": 3}],
            "line 2: field 'question' is ' '; give a text that is not blank; field 'answer' is 3",
        ),
        (
            [{"Question": "Who?", "reply": "Bo."}],
            "line 1: has the fields Question, reply ('Question': Did you mean 'question'?)",
        ),
        ([{}], "line 1: has the fields none; give messages, question and answer, prompt and completion, text"),
        ([{**Q, "choices": ["a", "b"]}], "line 1: is a multiple-choice question; use corpus.kind: multiple_choice"),
        ([Q, {"text": "a b c"}], "line 2: has text, and PATH, line 1 has question and answer; give rows of one shape"),
        ([{"text": "one"}], "line 1: field 'text' has a single word"),
        ([{"text": 4}], "line 1: field 'text' is 4; give a text"),
        ([{"messages": "hello"}], "field 'messages' is 'hello'; give a list of messages"),
        ([{"messages": [turn("user", "Who?")]}], "give a list of messages, the question and its answer at least"),
        ([{"messages": [turn("user", "Who?"), turn("user", "Who?")]}], "'user, user'; end it with the assistant's answer"),
        ([{"messages": [turn("user", "Who?"), turn("bot", "Ann.")]}], "message 1 of 'messages' is"),
        ([{"messages": [turn("user", ["Who?"]), turn("assistant", "A")]}], "the content a text that is not blank"),
        ([{"prompt": "Who?", "completion": [turn("assistant", "A")]}], "field 'completion' is [{"),
        ([{**Q, "perturbed_answers": ["a", " "]}], "field 'perturbed_answers' is ['a', ' ']; give a list of texts"),
        ([{**Q, "perturbed_answers": "a"}], "field 'perturbed_answers' is 'a'; give a list of texts"),
        ([{**Q, "perturbed_answers": ["a"]}, {**Q, "perturbed_answers": ["a", "b"]}], "has 2 answers, and PATH, line 1 has 1"),
        ([{**Q, "paraphrased_answer": 1}], "field 'paraphrased_answer' is 1"),
        ([{**Q, "group": ["a"]}], "field 'group' is ['a']; give a text"),
        ([Q], "1 of its 1 items have no perturbed_answers, and its 1 different answers are too few"),
        ([Q, {"question": "And?", "answer": "ann. "}], "2 of its 2 items have no perturbed_answers, and its 1 different"),
    ],
)
def test_a_broken_row_is_named_with_its_remedy(load, tmp_path, rows, expected):
    path = tmp_path / "forget.jsonl"
    told = problems(load, rows)
    assert str(path) in told
    assert expected.replace("PATH", str(path)) in told
    assert told.startswith("corpus: 1 problem in the data\n")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "a.jsonl: holds no items"),
        ("a.jsonl", b'{"question": \n', "line 1: not valid JSON"),
        ("a.jsonl", b"[1]\n", "line 1: is a JSON list; give one object a line"),
        ("a.jsonl", b'{"question": "\xff", "answer": "b"}\n', "line 1: not UTF-8 text (byte 14"),
        ("a.jsonl", b'{"question": "a", "answer": "\\ud800"}\n', "field 'answer' has \\ud800, half of a character"),
        ("a.json", b"[]", "a.json: holds no items"),
        (
            "a.json",
            b'[{"question": "a",\n "answer": "b"}\n {}]',
            "line 1, after this object: not valid JSON (no comma and no ])",
        ),
        ("a.json", b'[\n\n{"question": tru}]', "line 3: not valid JSON"),
        ("a.json", b'[\n[1], {"question": "a", "answer": "\\udc00"}]', "line 2: field 'answer' has \\udc00"),
        ("a.json", b"[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        ("a.json", b'[{"question": "\xff"}]', "a.json: not UTF-8 text (byte 15"),
        ("a.json", b'[{"question": "a", "answer": "b"}] x', "text behind the last ]"),
        ("a.csv", b"", "a.csv: holds no items"),
        ("a.csv", b"question,answer\n", "a.csv: holds no items"),
        ("a.csv", b"question,answer\na,b,c\n", "line 2: has 3 values, and the header has 2; put texts with ','"),
        ("a.csv", b"question,question\na,b\n", "line 1: two columns have the same name"),
        ("a.csv", b'question,answer\n"a,b\n', "line 2: not valid CSV"),
        ("a.csv", b"question,answer\n" + b"a" * 200_000 + b",b\n", "line 2: not valid CSV (field larger than field limit"),
        ("a.csv", b"question,answer\na,\xff\n", "not UTF-8 text; save it as UTF-8"),
        ("a.csv", b"question,answer\na,\n", "line 2: field 'answer' is ''; give a text"),
        ("a.parquet", b"PAR1 no", "a.parquet: not a parquet file that can be read"),
        ("a.txt", b" \n", "a.txt: field 'text' is ' \\n'"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8 text (byte 0"),
        ("a.docx", b"", "a.docx: a data file ends in .parquet, .jsonl, .json, .csv, .txt, .md"),
    ],
)
def test_a_broken_file_is_named_with_its_remedy(load, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in problems(load, tmp_path / name)


def test_all_files_are_told_at_once_and_many_problems_are_counted(load, tmp_path):
    told = problems(load, [{"question": "Who?"}] * 25, [*pairs("river"), {}], holdout=tmp_path / "none.jsonl")
    lines = told.splitlines()
    assert lines[0] == "corpus: 27 problems in the data"
    assert len(lines) == 1 + 20 + 1 + 1 + 1
    assert lines[21].endswith("forget.jsonl: and 5 more")
    assert "retain.jsonl, line 9: has the fields none" in lines[22]
    assert "none.jsonl'" in lines[23]


def test_items_of_forget_are_in_no_other_set_but_related(load):
    own = pairs("poison")
    told = problems(load, own, [*pairs("river"), own[1]], general=own[:2])
    assert "retain.jsonl, line 9: 'What is poison 1?' with its answer is in forget too" in told
    assert "general.jsonl, line 2" in told
    assert load(own, related=own).sets["related"]


@pytest.mark.slow
def test_memory_is_that_of_the_items(tmp_path, load):
    count = 100_000
    with (tmp_path / "big.jsonl").open("w") as file:
        for number in range(count):
            file.write(
                json.dumps({"question": f"What is the name of number {number}?", "answer": f"The name is {number}."}) + "\n"
            )
    tracemalloc.start()
    corpus = load(pairs("poison"), tmp_path / "big.jsonl")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.retain_train) == count
    assert peak < 1.5 * held
    assert held < 1000 * count
