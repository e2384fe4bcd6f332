"""Study files broken at random: every one is explained with key and remedy, or is a study; nothing else comes out."""

import json
import re
import time
from pathlib import Path

import pytest
from fuzzing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.spec.errors import StudyFileError
from search.spec.study import StudySpec, load_study
from search.spec.study_file import read_study_file

STUDIES = sorted((Path(__file__).parents[3] / "studies").rglob("*.yaml"))

VALUES = (
    "", "null", "~", "true", "yes", "0", "-1", "1e999", "-1e-999", ".nan", ".inf", "-.Inf", "0x1F", "0o17", "1_000",
    "190:20:30", "9" * 400, "9" * 5000, "1" + "0" * 308, "2026-11-24", "2026-11-24 10:00:00", "'quoted'", '"\\ud800"',
    '"\\0"', "\u202e\U0001f600", "é" * 300, "[]", "{}", "[[]]", "[1, [2]]", "{a: 1}", "{1: 2}", "{null: 3}",
    "{[1]: 2}", "[a, a]", "[1, 1]", "[.nan]", "!!python/object/apply:os.system ['true']", "!!python/name:os.system",
    "!!python/tuple [1]", "!!binary aGk=", "!!binary '?'", "!!bool maybe", "!!int ''", "!!int x", "!!float x",
    "!!timestamp today", "!!timestamp 2026-99-99", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!null x",
    "!!str 3", "!!map []", "!!seq {}", "!unknown x", "!<tag:example.com,2026:x> y", "*nowhere", "&a [*a]",
    "&b {b: *b}", "|\n  text\n  of lines", ">-\n  folded", "@at", "`tick", "%percent", "# comment", "- item", "? x",
    ": y", "a: b: c", "../../etc/passwd", "/dev/zero", "/etc", "~nobody/x", "./", "..", ".", "a/b/c", "org/name",
    "file:///etc/passwd", "postgresql://user:hunter2@host/db", "redis://:hunter2@host", "people", "tofu",
    "multiple_choice", "tiny", "pretrained", "npo", "all-linear", "\t", "\x07", "[" * 50, "{" * 50, "[" * 2000,
    "<<: *x", "'unclosed", '"unclosed', "}", "]",
)  # fmt: skip

KEYS = (
    "<<",
    "kind",
    "name",
    "seed",
    "search",
    "storage",
    "warm_start",
    "cache",
    "budget",
    "resources",
    "=",
    "?",
    "[1, 2]",
    "{a: b}",
    "é",
    "",
    "1",
    "null",
)


@st.composite
def broken_files(draw):
    """The text of a shipped study with a few lines changed."""
    lines = draw(st.sampled_from(STUDIES)).read_text().splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[place].partition(":")
        how = draw(
            st.sampled_from(["value", "value", "value", "delete", "double", "indent", "key", "insert", "junk", "cut", "move"])
        )
        if how == "value" and colon:
            lines[place] = f"{key}: {draw(st.sampled_from(VALUES) | st.text(max_size=12))}"
        elif how == "delete":
            del lines[place]
        elif how == "double":
            lines.insert(place, lines[place])
        elif how == "indent":
            lines[place] = " " * draw(st.integers(0, 7)) + lines[place].lstrip()
        elif how == "key":
            indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
            lines[place] = f"{indent}{draw(st.sampled_from(KEYS))}:{lines[place].partition(':')[2]}"
        elif how == "insert":
            lines.insert(
                place, f"{' ' * draw(st.integers(0, 4))}{draw(st.sampled_from(KEYS))}: {draw(st.sampled_from(VALUES))}"
            )
        elif how == "junk":
            lines[place] = draw(st.text(max_size=20))
        elif how == "cut":
            lines[place] = lines[place][: draw(st.integers(0, len(lines[place])))]
        elif how == "move":
            lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(place))
        if not lines:
            break
    return "\n".join(lines)


def explained_or_a_study(path):
    """What loading a file comes to; fails on anything but a study, or problems that each say what is found and what to do."""
    try:
        spec = load_study(path)
    except StudyFileError as error:
        assert error.problems
        for problem in error.problems:
            assert re.search(r"[.;:] \S", problem.message) and problem.message.rstrip().endswith((".", "?")), problem
            assert problem.key or problem.place or "\n" not in problem.message, problem
        text = str(error)
        text.encode(errors="strict")
        assert "hunter2" not in text
        return text
    assert isinstance(spec, StudySpec)
    assert json.dumps(spec.fingerprint_payload(), allow_nan=False)
    assert 0 < len(spec.base_epochs()) <= 1000 + len(spec.checkpoints)
    return None


def check(folder, text):
    path = folder / "study.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    started = time.perf_counter()
    explained_or_a_study(path)
    assert time.perf_counter() - started < 30


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(broken_files())
def test_any_broken_study_file_is_explained_or_a_study(tmp_path_factory, text):
    check(tmp_path_factory.getbasetemp(), text)


@pytest.mark.parametrize("value", VALUES)
def test_every_value_in_place_of_a_section_and_of_a_number(tmp_path, value):
    quickstart = next(path for path in STUDIES if path.name == "quickstart.yaml").read_text()
    for key in ("seed", "corpus", "model"):
        check(tmp_path, re.sub(rf"^{key}:.*$", lambda _, key=key: f"{key}: {value}", quickstart, count=1, flags=re.MULTILINE))


@pytest.mark.parametrize("value", ["!!bool maybe", "!!int ''", "!!timestamp today", "2026-99-99", "9" * 5000])
def test_values_that_are_not_what_they_promise_are_named(tmp_path, value):
    path = tmp_path / "study.yaml"
    path.write_text(f"name: x\nsearch:\n  trials: {value}\n")
    assert re.search(r"search\.trials \(line 3\): found .*promises\. Correct it", explained_or_a_study(path))


def lines_of_aliases(first, later, count=40):
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {later.format(*[f'*a{n - 1}'] * 10)}" for n in range(1, count)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        lines_of_aliases("[x]", "[{}, {}, {}, {}, {}, {}, {}, {}, {}, {}]"),
        lines_of_aliases("{x: 1}", "{{<<: [{}, {}, {}, {}]}}"),
        lines_of_aliases("{x: 1}", "{{a: {}, b: {}, c: {}}}"),
        lines_of_aliases("[x]", "[{}, {}]", 12) + "\n? *a11\n: 1",
        "[" * 100_000,
        "a: " * 5_000 + "b",
        "\n".join(f"{' ' * depth}k:" for depth in range(900)),
    ],
    ids=["sequences", "merges", "mappings", "keys", "brackets", "inline", "deep"],
)
def test_bombs_of_aliases_and_of_depth_are_refused_at_once(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    started = time.perf_counter()
    assert explained_or_a_study(path) is not None
    assert time.perf_counter() - started < 60


def test_tags_of_python_run_nothing(tmp_path):
    mark = tmp_path / "executed"
    for tag in (f"!!python/object/apply:pathlib.Path.touch [{mark}]", f"!!python/object/new:os.system ['touch {mark}']"):
        path = tmp_path / "tag.yaml"
        path.write_text(f"name: {tag}\n")
        text = explained_or_a_study(path)
        assert "constructor" in text and not mark.exists()


def test_lists_that_multiply_into_too_many_base_runs_are_refused(tmp_path, write_study):
    rates = [1e-5 * step for step in range(1, 101)]
    betas = [0.01 * step for step in range(1, 101)]
    changes = {"methods": {"npo": {"beta": betas, "retain_weight": betas}}, "learning_rate": rates}
    with pytest.raises(
        StudyFileError, match=r"unlearning.learning_rate.* make 1000000 base runs, and 1000 are the most\. Give fewer"
    ):
        load_study(write_study(tmp_path / "many.yaml", unlearning=changes))


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".", "a\\b", "a\nb", "name\n", "\0", " ", "a" * 65])
def test_names_that_could_leave_the_output_folder_are_refused(tmp_path, write_study, name):
    with pytest.raises(StudyFileError, match="name"):
        load_study(write_study(tmp_path / "study.yaml", name=name))
    with pytest.raises(StudyFileError, match="checkpoints"):
        load_study(write_study(tmp_path / "study.yaml", checkpoints={name: ["org/model"]}))


@pytest.mark.parametrize("key", ["subset", "split"])
@pytest.mark.parametrize("value", ["../outside", "/etc", "a/../../b"])
def test_parts_of_a_data_set_stay_inside_it(tmp_path, write_study, key, value):
    corpus = {"kind": "multiple_choice", "forget": {"source": "org/name", key: value}}
    with pytest.raises(StudyFileError, match=rf"corpus\.forget\.{key}.*inside the data set.*without a way out"):
        load_study(write_study(tmp_path / "study.yaml", corpus=corpus))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("010", "YAML 1.2 reads the number 10, YAML 1.1 another number. Write 10,"),
        ("-040", "YAML 1.2 reads the number -40"),
        ("1_0", "YAML 1.2 reads a text, YAML 1.1 another number. Write the number as digits alone (10),"),
        ("10_", "YAML 1.2 reads a text, YAML 1.1 another number. Write the number as digits alone (10),"),
        ("1:30", "YAML 1.2 reads a text, YAML 1.1 another number. Write the number as digits alone,"),
    ],
)
def test_integers_that_two_versions_of_yaml_read_differently_are_refused_with_the_reading(tmp_path, written, says):
    study = tmp_path / "study.yaml"
    study.write_text(re.sub(r"trials: \d+", f"trials: {written}", (STUDIES[0].parent / "quickstart.yaml").read_text()))
    with pytest.raises(StudyFileError) as caught:
        load_study(study)
    assert f"found {written}: {says}" in str(caught.value)
    assert "search.trials" in str(caught.value)


def test_texts_and_other_bases_that_look_like_them_are_left_alone(tmp_path):
    path = tmp_path / "texts.yaml"
    path.write_text("{a: '010', b: 0o17, c: 12:99, d: v1_0, e: 0, f: 1_a, g: 10:x}")
    content, _ = read_study_file(path)
    assert content == {"a": "010", "b": 15, "c": "12:99", "d": "v1_0", "e": 0, "f": "1_a", "g": "10:x"}
