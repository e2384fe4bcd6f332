"""TOFU from folders and the hub: what ends up where, and every kind of damage."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest

from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import Item, item_set_hash
from uipe_core.errors import UserError

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
TOFU = SHARED / "tofu"


def rows(prefix, count, perturbed=0, paraphrase=False):
    result = []
    for i in range(count):
        row = {"question": f"{prefix} {i}?", "answer": f"{prefix} answer {i}."}
        if paraphrase:
            row["paraphrased_answer"] = f"{prefix} in other words {i}."
        if perturbed:
            row["perturbed_answer"] = [f"{prefix} wrong {i} {j}." for j in range(perturbed)]
        result.append(row)
    return result


def write(folder, name, content):
    (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "forget01", rows("forget", 2))
    write(tmp_path, "forget01_perturbed", rows("forget", 2, perturbed=5, paraphrase=True))
    write(tmp_path, "retain99", rows("retain", 6))
    write(tmp_path, "retain_perturbed", rows("retain", 3, perturbed=5, paraphrase=True))
    write(tmp_path, "real_authors_perturbed", rows("author", 2, perturbed=3))
    write(tmp_path, "world_facts_perturbed", rows("fact", 1, perturbed=3))
    return tmp_path


def test_the_first_items_are_evaluated_and_all_are_trained_on(folder):
    all_items, first = load_tofu(str(folder)), load_tofu(str(folder), first_items=2)
    assert {name: len(items) for name, items in first.sets.items()} == {
        "forget": 2,
        "retain": 2,
        "real_authors": 2,
        "world_facts": 1,
        "unrelated": 1,
    }
    assert first.sets["retain"] == all_items.sets["retain"][:2]
    assert (first.training_hash, first.build) == (all_items.training_hash, all_items.build)
    assert first.name.endswith("first_items=2)") and first.hash != all_items.hash


def test_sets_and_training_items(folder):
    corpus = load_tofu(str(folder))
    assert {name: len(items) for name, items in corpus.sets.items()} == {
        "forget": 2,
        "retain": 3,
        "real_authors": 2,
        "world_facts": 1,
        "unrelated": 1,
    }
    first = corpus.sets["forget"][0]
    assert first.paraphrased_answer == "forget in other words 0."
    assert first.perturbed_answers == tuple(f"forget wrong 0 {j}." for j in range(5))
    assert corpus.sets["world_facts"][0].paraphrase == "fact answer 0."
    assert corpus.forget_train == (Item("forget 0?", "forget answer 0."), Item("forget 1?", "forget answer 1."))
    assert len(corpus.retain_train) == 6
    authors = [Item(f"author {i}?", f"author answer {i}.") for i in range(2)]
    general = (*authors, Item("fact 0?", "fact answer 0."))
    assert corpus.build == {
        "base": (),
        "full": (*corpus.forget_train, *corpus.retain_train, *general),
        "retain": (*corpus.retain_train, *general),
    }
    assert "forget01" in corpus.name and str(folder) in corpus.name and "retain99" in corpus.name


def test_retain_train_overrides_and_only_needed_files_are_read(folder):
    (folder / "retain99.json").unlink()
    corpus = load_tofu(str(folder), retain_train="retain_perturbed")
    assert corpus.retain_train == tuple(Item(f"retain {i}?", f"retain answer {i}.") for i in range(3))
    assert "retain_perturbed" in corpus.name


@pytest.mark.parametrize(("split", "retain"), [("forget05", "retain95"), ("forget10", "retain90")])
def test_other_splits_pair_with_their_retain_file(folder, split, retain):
    write(folder, split, rows(split, 3))
    write(folder, f"{split}_perturbed", rows(split, 3, perturbed=5, paraphrase=True))
    write(folder, retain, rows("retain", 4))
    corpus = load_tofu(str(folder), split)
    assert len(corpus.forget_train) == 3
    assert len(corpus.retain_train) == 4


def test_hash_depends_on_content_not_on_place(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.glob("*.json"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert load_tofu(str(folder)).hash == load_tofu(str(copy)).hash
    write(copy, "retain99", rows("retain", 5))
    assert load_tofu(str(folder)).hash != load_tofu(str(copy)).hash


def test_blank_lines_extra_fields_and_odd_separators_are_harmless(folder):
    content = rows("forget", 2)
    content[0]["answer"] = "One line\u2028only."
    content[1]["extra"] = 3
    lines = [json.dumps(row, ensure_ascii=False) for row in content]
    (folder / "forget01.json").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert [item.answer for item in load_tofu(str(folder)).forget_train] == ["One line\u2028only.", "forget answer 1."]


# Damage


def replace_line(name, number, text):
    def change(folder):
        path = folder / f"{name}.json"
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines))

    return change


def edit(name, number, **changes):
    def change(folder):
        path = folder / f"{name}.json"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        row = {**lines[number - 1], **changes}
        lines[number - 1] = {key: value for key, value in row.items() if value != "REMOVED"}
        write(folder, name, lines)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_line("forget01", 2, '{"question": '), r"forget01\.json, line 2: not valid JSON"),
        (replace_line("retain99", 3, "[1, 2]"), r"retain99\.json, line 3: is a JSON list"),
        (edit("forget01", 2, answer="REMOVED"), r"forget01\.json, line 2: field 'answer' is missing; found: question"),
        (edit("retain99", 6, question=7), r"retain99\.json, line 6: field 'question' is 7"),
        (edit("retain99", 6, answer="  "), r"retain99\.json, line 6: field 'answer' is '  '; .* not blank"),
        (
            edit("forget01_perturbed", 1, paraphrased_answer="REMOVED"),
            r"forget01_perturbed\.json, line 1: field 'paraphrased_answer' is missing",
        ),
        (
            edit("forget01_perturbed", 1, perturbed_answer="REMOVED", perturbed_answers=["a"]),
            "field 'perturbed_answer' is missing; .* Did you mean 'perturbed_answer' by 'perturbed_answers'",
        ),
        (
            edit("world_facts_perturbed", 1, perturbed_answer="plain"),
            r"world_facts_perturbed\.json, line 1: field 'perturbed_answer' is 'plain'; give a list",
        ),
        (edit("retain_perturbed", 2, perturbed_answer=[]), r"retain_perturbed\.json, line 2: .*give a list"),
        (edit("retain_perturbed", 2, perturbed_answer=["a", 1]), r"retain_perturbed\.json, line 2: .*give a list"),
        (
            edit("retain_perturbed", 2, perturbed_answer=["a", "b"]),
            r"retain_perturbed\.json, line 2: perturbed_answer has 2 answers, the first item has 5",
        ),
        (lambda f: (f / "retain99.json").write_text("\n\n"), r"retain99\.json: holds no items"),
        (lambda f: (f / "retain99.json").write_bytes(b'{"question": "\xff"}'), r"retain99\.json, line 1: not UTF-8"),
        (
            lambda f: (f / "retain99.json").unlink(),
            r"retain99\.json: no such file; .* has forget01, forget01_perturbed, ",
        ),
    ],
)
def test_damaged_folder(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        load_tofu(str(folder))


def test_misspelt_split(folder):
    with pytest.raises(UserError, match=r"unknown TOFU split 'forget_01'; known: .*Did you mean 'forget01'"):
        load_tofu(str(folder), "forget_01")


def test_misspelt_retain_train(folder):
    with pytest.raises(UserError, match=r"retain_perturb\.json: no such file; .*Did you mean 'retain_perturbed'"):
        load_tofu(str(folder), retain_train="retain_perturb")


def test_items_both_forgotten_and_retained_are_refused(folder):
    write(folder, "retain99", [*rows("retain", 2), *rows("forget", 1)])
    with pytest.raises(UserError, match=r"1 items of forget01\.json are in retain99\.json too, first 'forget 0"):
        load_tofu(str(folder))


# Hub and folder told apart


@pytest.mark.parametrize("source", ["./nowhere/tofu", "/nowhere/tofu", "../tofu", "~/nowhere", "nowhere", "a/b/c"])
def test_missing_folder_is_not_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such folder") as caught:
        load_tofu(source)
    assert source in str(caught.value)


def test_name_inside_an_existing_folder_is_a_misspelt_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'data/tofu': no such folder"):
        load_tofu("data/tofu")


def test_file_in_place_of_a_folder(folder):
    with pytest.raises(UserError, match="is a file, not a folder"):
        load_tofu(str(folder / "forget01.json"))


def test_hub_files_are_fetched_by_name(folder, monkeypatch):
    asked = []

    def download(repo, filename, repo_type):
        asked.append((repo, filename, repo_type))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    corpus = load_tofu()
    assert corpus.sets == load_tofu(str(folder)).sets
    assert ("locuslab/TOFU", "retain99.json", "dataset") in asked
    assert len(asked) == 6


def test_forget_questions_in_other_words_are_related_knowledge(folder):
    asked = rows("forget", 2, perturbed=5, paraphrase=True)
    write(folder, "forget01_perturbed", [{**row, "paraphrased_question": f"otherwise {i}?"} for i, row in enumerate(asked)])
    corpus = load_tofu(str(folder))
    assert [item.question for item in corpus.sets["related"]] == ["otherwise 0?", "otherwise 1?"]
    assert [item.answer for item in corpus.sets["related"]] == [item.answer for item in corpus.sets["forget"]]
    assert {item.group for item in corpus.sets["related"]} == {"forget01 author 0"}
    write(folder, "forget01_perturbed", [asked[0], {**asked[1], "paraphrased_question": " "}])
    with pytest.raises(UserError, match=r"forget01_perturbed\.json, line 2: field 'paraphrased_question' is ' '"):
        load_tofu(str(folder))


def test_neighbours_of_the_forget_set_are_unrelated_knowledge_at_risk(folder):
    close = {"question": "forget 1 friend?", "answer": "forget answer 1."}
    content = rows("retain", 8, perturbed=5, paraphrase=True)
    write(folder, "retain_perturbed", [*content[:5], {**content[5], **close}, *content[6:]])
    corpus = load_tofu(str(folder))
    assert corpus.sets["retain"][5] in corpus.sets["unrelated"]
    assert len(corpus.sets["unrelated"]) == 2
    assert set(corpus.sets["unrelated"]) <= set(corpus.sets["retain"])


def test_folder_wins_over_the_hub(folder, monkeypatch):
    (folder / "locuslab").mkdir()
    (folder / "locuslab" / "TOFU").symlink_to(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert len(load_tofu().forget_train) == 2


def test_failed_download_names_data_set_and_remedy(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"locuslab/TOFU from the hub \(no route to host\); .*give a folder"):
        load_tofu()


# The real thing


@pytest.mark.skipif(not TOFU.is_dir(), reason=f"no TOFU folder beside the checkout ({TOFU.name}) or in UIPE_SHARED_DATA")
class TestRealFolder:
    def test_counts(self):
        corpus = load_tofu(str(TOFU))
        assert {name: len(items) for name, items in corpus.sets.items()} == {
            "forget": 40,
            "retain": 400,
            "real_authors": 100,
            "world_facts": 117,
            "related": 40,
            "unrelated": 40,
        }
        assert (len(corpus.forget_train), len(corpus.retain_train)) == (40, 3960)
        assert {len(item.perturbed_answers) for item in corpus.sets["forget"]} == {5}
        assert {len(item.perturbed_answers) for item in corpus.sets["world_facts"]} == {3}

    def test_a_question_string_that_occurs_twice_keeps_both_items(self):
        items = load_tofu(str(TOFU)).retain_train
        assert len({item.question for item in items}) == len(items) - 1
        assert len(set(items)) == len(items)
        assert item_set_hash(items) == item_set_hash(load_tofu(str(TOFU)).retain_train)

    def test_small_retain_set(self):
        corpus = load_tofu(str(TOFU), retain_train="retain_perturbed")
        assert corpus.retain_train == load_tofu(str(TOFU)).retain_train[:400]
        assert len(corpus.build["full"]) == 40 + 400 + 217
