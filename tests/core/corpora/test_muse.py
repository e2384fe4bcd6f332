"""MUSE: files of the hub's layout, what becomes of them, and everything that is wrong with them at once."""

import json

import pytest

from benchmarks.muse_folder import write_muse
from uipe_core.corpora.files import DataSet
from uipe_core.corpora.muse import ENDS, FORGET_TEXTS, SETS, load_muse
from uipe_core.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("muse")
    write_muse(place, forget_people=2, retain_people=12)
    return place


@pytest.fixture
def small(tmp_path):
    """The least that MUSE is: a row or two in every file that is read."""
    write(tmp_path / "raw" / "forget.json", [{"text": "one two three four five"}, {"text": "six seven"}])
    write(tmp_path / "raw" / "retain1.json", [{"text": "kept words"}])
    write(tmp_path / "verbmem" / "forget.json", [{"prompt": "one two", "gt": "three"}, {"prompt": "six\n", "gt": "seven"}])
    write(tmp_path / "knowmem" / "forget_qa.json", [{"question": "First?", "answer": "one"}])
    write(tmp_path / "knowmem" / "forget_qa_icl.json", [{"question": "Shot?", "answer": "bang"}])
    write(tmp_path / "knowmem" / "retain_qa.json", [{"question": f"Kept {n}?", "answer": f"words {n}"} for n in "ab"])
    write(tmp_path / "knowmem" / "retain_qa_icl.json", [{"question": "Other?", "answer": "shot"}])
    write(tmp_path / "privleak" / "forget.json", [{"text": "one two three four five"}])
    write(tmp_path / "privleak" / "holdout.json", [{"text": "never seen"}])
    return tmp_path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def test_items_are_as_muse_asks_them(small):
    corpus = load_muse(str(small))
    assert list(corpus.sets) == list(SETS)
    first, second = corpus.sets["forget"]
    # The space between the hub's prompt and its continuation is put back, where there is none.
    assert (first.question, first.answer, first.length, first.stops) == ("one two", " three", 128, ())
    assert (second.question, second.answer) == ("six\n", "seven")
    (asked,) = corpus.sets["knowmem"]
    assert asked.question == "Question: Shot?\nAnswer: bang\n\nQuestion: First?\nAnswer: "
    assert (asked.answer, asked.length, asked.stops, asked.plain) == ("one", 32, ENDS, True)
    assert corpus.sets["retain"][0].question.startswith("Question: Other?\nAnswer: shot\n\nQuestion: Kept a?")
    (member,), (other,) = corpus.sets["privleak_forget"], corpus.sets["privleak_holdout"]
    assert (member.question, member.answer, member.length) == ("", "one two three four five", None)
    assert (other.answer, other.perturbed_answers) == ("never seen", ("never seen",))


def test_texts_are_trained_on_in_windows(small):
    corpus = load_muse(str(small), window_words=3)
    assert [item.answer for item in corpus.forget_train] == ["one two three", "four five", "six seven"]
    assert [item.answer for item in corpus.retain_train] == ["kept words"]
    assert all(item.plain and item.question == "" and item.length is None for item in corpus.forget_train)
    full, retained = (corpus.build[name] for name in ("full", "retain"))
    assert len(full) == 3 + 2 + 1 + 1 + 2  # texts, continuations, questions on them; texts to keep, questions on them
    assert set(retained) <= set(full)
    assert not {item.answer for item in retained} & {"one", " three", "seven", "one two three"}


def test_wrong_answers_of_other_items_stand_in(small):
    corpus = load_muse(str(small))
    assert [item.perturbed_answers for item in corpus.sets["forget"]] == [("seven",), (" three",)]
    assert [item.perturbed_answers for item in corpus.sets["retain"]] == [("words b",), ("words a",)]
    assert set(corpus.stand_ins) == set(SETS)


def test_a_request_takes_the_place_of_the_texts_to_forget(folder):
    by_name = {name: load_muse(str(folder), name) for name in FORGET_TEXTS}
    main = by_name["raw"]
    assert [len(by_name[f"scal_{number}"].forget_train) for number in range(1, 5)] == [2, 4, 6, 8]
    sust = [set(by_name[f"sust_{number}"].forget_train) for number in range(1, 5)]
    assert len(set.union(*sust)) == 8 == sum(map(len, sust))
    assert by_name["sust_1"].training_hash == by_name["scal_1"].training_hash == main.training_hash
    assert {corpus.sets["retain"] for corpus in by_name.values()} == {main.sets["retain"]}
    assert len({corpus.hash for corpus in by_name.values()}) == 7


def test_the_hubs_parquet_gives_the_same_corpus_as_json_lines_also_with_both_there(folder, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for path in folder.rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        target = tmp_path / path.parent.name / f"{path.stem}-00000-of-00001.parquet"
        target.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    expected = load_muse(str(folder)).hash
    assert load_muse(str(tmp_path)).hash == expected
    for path in folder.rglob("*.jsonl"):  # as in the hub's repository, which keeps what its parts were made of
        (tmp_path / path.parent.name / path.name).write_text(path.read_text())
    assert load_muse(str(tmp_path)).hash == expected


def test_a_split_is_not_the_one_whose_name_begins_alike(small):
    def read(exact):
        return [row.where for _, row in DataSet(str(small), ("knowmem",), "forget_qa", exact=exact).rows()]

    assert [where.endswith("forget_qa.json, line 1") for where in read(exact=True)] == [True]
    assert len(read(exact=False)) == 2
    with pytest.raises(UserError, match=r"no file of split 'forget_aq'; it has .*Did you mean 'forget_qa'"):
        list(DataSet(str(small), ("knowmem",), "forget_aq", exact=True).rows())


def test_everything_that_is_wrong_is_said_at_once(small):
    (small / "knowmem" / "retain_qa.json").unlink()
    (small / "privleak" / "holdout.json").rename(small / "privleak" / "held_out.json")
    write(small / "verbmem" / "forget.json", [{"prompt": "one two", "gold": "three"}] * 9)
    write(small / "raw" / "retain1.json", [{"text": " "}, {"text": "kept"}])
    with pytest.raises(UserError) as found:
        load_muse(str(small))
    lines = str(found.value).splitlines()
    assert lines[0] == f"corpus.source {small}: 12 problems in the data"
    said = "\n".join(lines)
    assert "no file of split 'retain_qa'; it has forget_qa, forget_qa_icl, retain_qa_icl" in said
    assert "no file of split 'holdout'; it has forget, held_out" in said
    assert "line 1: field 'gt' is missing; found: prompt, gold" in said
    assert f"{small}:verbmem:forget: and 6 more" in said
    assert "field 'text' is ' '; give a text that is not blank" in said
    assert lines[-1].strip().startswith("give muse-bench/MUSE-News")


def test_a_missing_configuration_a_file_and_no_source(small, tmp_path, monkeypatch):
    for path in (small / "verbmem").iterdir():
        path.unlink()
    (small / "verbmem").rmdir()
    with pytest.raises(UserError, match=r"no subset 'verbmem'; it has knowmem, privleak, raw"):
        load_muse(str(small))
    with pytest.raises(UserError, match=r"no subset 'scal'"):
        load_muse(str(small), "scal_2")
    with pytest.raises(UserError, match=r"is a file; give a folder"):
        load_muse(str(small / "raw" / "forget.json"))
    with pytest.raises(UserError, match=r"1 problem in the data\n.*no such file or folder"):
        load_muse(str(tmp_path / "nowhere"))


def test_the_hub_is_asked_once_where_it_cannot_be_reached(monkeypatch):
    import huggingface_hub

    asked = []

    def refuse(name, repo_type, allow_patterns):
        asked.append(allow_patterns)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"MUSE-News from the hub \(no route to host\)"):
        load_muse()
    assert asked == [["raw/forget*", "raw/forget/*"]]


def test_too_few_answers_to_stand_in(small):
    write(small / "knowmem" / "retain_qa.json", [{"question": "Kept?", "answer": "words"}])
    with pytest.raises(UserError, match=r"corpus\.source .*: retain: 1 of its 1 items .*at least 2 answers"):
        load_muse(str(small))
