"""Evaluation logs: exact round trips, the shape other readers expect, and every kind of damage."""

import copy
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from uipe_core.errors import UserError
from uipe_core.logs.parts import EXTRA_KEY
from uipe_core.logs.tofu import PARTS, read_log, write_log
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
LOGS = SHARED / "tofu_logs"


def random_set(rng, n, k, item_hash):
    return SetScores(
        answer_loss=rng.exponential(1, n),
        answer_tokens=rng.integers(1, 30, n),
        paraphrase_loss=rng.exponential(1, n),
        paraphrase_tokens=rng.integers(1, 30, n),
        perturbed_loss=rng.exponential(2, (n, k)),
        perturbed_tokens=rng.integers(1, 30, (n, k)),
        rouge_l_recall=rng.random(n),
        rouge_1_recall=rng.random(n),
        generated=tuple(f"generated {i} \u2028 \u00e9" for i in range(n)),
        questions=tuple(f"question {i}?" for i in range(n)),
        answers=tuple(f"answer {i}." for i in range(n)),
        item_hash=item_hash,
        min_k=rng.exponential(1, n),
    )


@pytest.fixture
def report():
    rng = np.random.default_rng(0)
    # Twelve items: sorted as text, index 10 would come before index 2.
    names = (*PARTS, "related", "unrelated")
    sets = {name: random_set(rng, 12, 2 + i, f"hash{i}") for i, name in enumerate(names)}
    return ScoreReport(sets, logit_scale=1.2345678901234567, seconds={"losses": 0.5, "generation": 1.5})


@pytest.fixture
def log(report, tmp_path):
    write_log(report, tmp_path / "log.json")
    return json.loads((tmp_path / "log.json").read_text())


def assert_same(first, second):
    assert set(first.sets) == set(second.sets)
    for name, scores in first.sets.items():
        for entry in fields(scores):
            one, two = getattr(scores, entry.name), getattr(second.sets[name], entry.name)
            if isinstance(one, np.ndarray):
                assert one.dtype == two.dtype
                assert np.array_equal(one, two), (name, entry.name)
            else:
                assert one == two, (name, entry.name)


def damaged(log, tmp_path, change):
    change(log)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(log))
    return path


def test_round_trip_is_exact(report, tmp_path):
    write_log(report, tmp_path / "new" / "log.json", {"model": "a folder"})
    again = read_log(tmp_path / "new" / "log.json")
    assert_same(report, again)
    assert again.logit_scale == report.logit_scale
    assert again.seconds == report.seconds
    assert evaluate(again, again) == evaluate(report, report)


def test_log_has_the_parts_and_measurements_of_locuslab(log, report):
    assert set(log) == set(PARTS.values())
    common = {
        "avg_gt_loss gt_loss num_token_gt generated_text rouge1_recall rougeL_recall average_perturb_loss",
        "avg_paraphrased_loss truth_ratio paraphrased_loss perturb_loss num_token_paraphrased num_token_perturb",
    }
    expected = {key for line in common for key in line.split()}
    assert set(log[PARTS["retain"]]) == expected
    assert set(log[PARTS["forget"]]) == {*expected, EXTRA_KEY}
    assert set(log[PARTS["world_facts"]]) == {*expected, "normalized_gt_loss"}
    scores, part = report.sets["world_facts"], log[PARTS["world_facts"]]
    assert list(part["gt_loss"]) == [str(i) for i in range(12)]
    assert part["generated_text"]["3"] == ["question 3?", "generated 3 \u2028 \u00e9", "answer 3."]
    assert part["gt_loss"]["3"] == scores.answer_loss[3] * scores.answer_tokens[3]
    assert part["perturb_loss"]["3"] == (scores.perturbed_loss[3] * scores.perturbed_tokens[3]).tolist()
    ratio = np.exp(scores.paraphrase_loss[3] - scores.perturbed_loss[3].mean())
    assert part["truth_ratio"]["3"] == pytest.approx(ratio)
    truth, others = np.exp(-scores.answer_loss[3]), np.exp(-scores.perturbed_loss[3])
    assert part["normalized_gt_loss"]["3"] == pytest.approx(-np.log(truth / (truth + others.sum())))


def test_metadata_is_kept_and_no_temporary_file_left(report, tmp_path):
    write_log(report, tmp_path / "log.json", {"alpha": 0.5})
    write_log(report, tmp_path / "log.json", {"alpha": 1.5})
    content = json.loads((tmp_path / "log.json").read_text())
    assert content[PARTS["forget"]][EXTRA_KEY]["metadata"] == {"alpha": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["log.json"]


def test_unknown_stays_unknown(report, tmp_path):
    bare = {
        name: replace(
            scores,
            rouge_l_recall=None,
            rouge_1_recall=None,
            generated=None,
            questions=None,
            answers=None,
            item_hash=None,
            answer_tokens=np.zeros(12, dtype=np.int64),
        )
        for name, scores in report.sets.items()
    }
    write_log(ScoreReport(bare), tmp_path / "log.json")
    again = read_log(tmp_path / "log.json")
    assert_same(ScoreReport(bare), again)
    assert again.logit_scale is None


def test_texts_without_generation_round_trip(report, tmp_path):
    sets = {name: replace(scores, generated=None) for name, scores in report.sets.items()}
    write_log(ScoreReport(sets), tmp_path / "log.json")
    assert_same(ScoreReport(sets), read_log(tmp_path / "log.json"))


def test_order_of_indexes_in_the_file_does_not_matter(log, report, tmp_path):
    def reverse(content):
        losses = content[PARTS["forget"]]["avg_gt_loss"]
        content[PARTS["forget"]]["avg_gt_loss"] = dict(reversed(losses.items()))

    assert_same(report, read_log(damaged(log, tmp_path, reverse)))


def test_minimal_log_of_the_aggregation_script(log, tmp_path):
    needed = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall")

    def strip(content):
        for part in content.values():
            for key in set(part) - set(needed):
                del part[key]

    report = read_log(damaged(log, tmp_path, strip))
    assert report.sets["forget"].generated is None
    assert not report.sets["forget"].answer_tokens.any()
    assert evaluate(report).model_utility > 0


# Damage


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: no such evaluation log; write one with `uipe score --log`"):
        read_log(tmp_path / "absent.json")


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "eval_log.json": {\n', "line 3: not valid JSON"),
        (b"", "line 1: not valid JSON"),
        (b"[1, 2]", "holds a JSON list"),
        (b"\xff\xfe\x00", "not a text file"),
        (b'{"a": 1}', "missing parts eval_log.json, .* \\(found: a\\)"),
    ],
)
def test_not_an_evaluation_log(tmp_path, content, message):
    (tmp_path / "log.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_log(tmp_path / "log.json")


def part(change):
    return lambda content: change(content[PARTS["forget"]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(PARTS["retain"]), r"missing parts eval_log\.json "),
        (lambda c: c.update({PARTS["retain"]: [1]}), r"eval_log\.json is a list"),
        (lambda c: c.update({PARTS["forget"]: 3}), r"eval_log_forget\.json is a int"),
        (part(lambda p: p.pop("avg_gt_loss")), r"eval_log_forget\.json/avg_gt_loss is missing"),
        (part(lambda p: p.update(avg_gt_loss=[1.0])), "avg_gt_loss has other indexes than 0 to 11"),
        (part(lambda p: p.update(avg_gt_loss={})), "avg_gt_loss is empty"),
        (part(lambda p: p["average_perturb_loss"]["4"].pop()), "average_perturb_loss/4 has 4 numbers where .* 5"),
        (part(lambda p: p["average_perturb_loss"].update({"4": 1.0})), "average_perturb_loss/4 is not a list"),
        (part(lambda p: p["average_perturb_loss"].update({"0": []})), "average_perturb_loss/0 is not a list"),
        (part(lambda p: p["average_perturb_loss"]["4"].__setitem__(0, "x")), "average_perturb_loss/4 is 'x'"),
        (part(lambda p: p["avg_gt_loss"].update({"4": "1.0"})), "avg_gt_loss/4 is '1.0', expected a finite number"),
        (part(lambda p: p["avg_gt_loss"].update({"4": None})), "avg_gt_loss/4 is None"),
        (part(lambda p: p["avg_gt_loss"].update({"4": True})), "avg_gt_loss/4 is True"),
        (part(lambda p: p["avg_gt_loss"].update({"4": float("nan")})), "avg_gt_loss/4 is nan"),
        (part(lambda p: p["avg_gt_loss"].pop("4")), "avg_gt_loss has other indexes than 0 to 11: '4' is missing"),
        (part(lambda p: p["rougeL_recall"].pop("4")), "rougeL_recall has other indexes .* '4' is missing"),
        (part(lambda p: p["rougeL_recall"].update({"x": 1.0})), "rougeL_recall has other indexes .* 'x' is unexpected"),
        (part(lambda p: p["num_token_gt"].update({"4": 1.5})), "num_token_gt has token counts"),
        (part(lambda p: p["num_token_gt"].update({"4": 1e20})), "num_token_gt has token counts .* from 0 to 1,000,000,000"),
        (part(lambda p: [row.pop() for row in p["num_token_perturb"].values()]), "num_token_perturb has 4 counts"),
        (part(lambda p: p["generated_text"].update({"4": ["a", "b"]})), "generated_text/4 is not a list of question"),
        (part(lambda p: p[EXTRA_KEY].update(sets=[])), "uipe/sets is a list"),
        (
            part(lambda p: p[EXTRA_KEY]["sets"]["related"].pop("avg_gt_loss")),
            "uipe/sets/related/avg_gt_loss is missing",
        ),
        (part(lambda p: p[EXTRA_KEY]["item_hashes"].update(forget=3)), "uipe/item_hashes"),
        (part(lambda p: p[EXTRA_KEY].update(logit_scale="1")), "uipe/logit_scale is '1'"),
        (part(lambda p: p.update({EXTRA_KEY: 1})), "uipe is a int"),
    ],
)
def test_damaged_log_names_file_and_key(log, tmp_path, change, message):
    path = damaged(log, tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        read_log(path)
    assert str(path) in str(caught.value)


# Refused writing


def test_writing_needs_the_forget_set(report, tmp_path):
    with pytest.raises(UserError, match="lacks the sets forget"):
        write_log(ScoreReport({"retain": report.sets["retain"]}), tmp_path / "log.json")
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_tofus_sets_has_a_log_too(report, tmp_path):
    """Of questions of one's own there are forget and retain items, and perhaps general ones."""
    own = {name: report.sets[name] for name in ("forget", "retain")} | {"general": report.sets["world_facts"]}
    own = {name: replace(scores, item_hash=f"hash of {name}") for name, scores in own.items()}
    write_log(ScoreReport(own), tmp_path / "log.json")
    found = read_log(tmp_path / "log.json")
    assert set(found.sets) == {"forget", "retain", "general"}
    assert np.array_equal(found.sets["general"].answer_loss, report.sets["world_facts"].answer_loss)


def test_writing_needs_items(report, tmp_path):
    empty = random_set(np.random.default_rng(0), 0, 2, None)
    with pytest.raises(UserError, match="set 'related' has no items"):
        write_log(replace(report, sets={**report.sets, "related": empty}), tmp_path / "log.json")


def test_writing_needs_finite_numbers(report, tmp_path):
    broken = replace(report.sets["retain"], answer_loss=np.full(12, np.nan))
    with pytest.raises(UserError, match="set 'retain' has numbers that are not finite"):
        write_log(replace(report, sets={**report.sets, "retain": broken}), tmp_path / "log.json")


def test_failed_writing_keeps_the_old_log(report, tmp_path, monkeypatch):
    path = tmp_path / "log.json"
    write_log(report, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_log(replace(report, logit_scale=9.0), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.json"]


def test_folder_that_cannot_be_made(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_log(report, tmp_path / "file" / "log.json")


# Real logs


@pytest.mark.skipif(not LOGS.is_dir(), reason=f"no TOFU logs beside the checkout ({LOGS.name}) or in UIPE_SHARED_DATA")
@pytest.mark.parametrize("name", ["phi_full.json", "phi_retain90.json"])
def test_real_log_round_trips(name, tmp_path):
    report = read_log(LOGS / name)
    assert {key: len(scores) for key, scores in report.sets.items()} == {
        "retain": 300,
        "real_authors": 100,
        "world_facts": 117,
        "forget": 300,
    }
    write_log(report, tmp_path / name)
    again = read_log(tmp_path / name)
    assert_same(report, again)
    assert evaluate(again, again) == evaluate(report, report)
    original, ours = (json.loads(path.read_text()) for path in (LOGS / name, tmp_path / name))
    for key, content in original.items():
        assert set(ours[key]) - {EXTRA_KEY} == set(content)
        for measurement in ("gt_loss", "truth_ratio", "paraphrased_loss"):
            assert ours[key][measurement] == pytest.approx(content[measurement], rel=1e-5)


# Logs as others write them


def test_plain_lists_and_indexes_that_are_floats_are_read(report, tmp_path):
    write_log(report, tmp_path / "log.json")
    log = json.loads((tmp_path / "log.json").read_text())
    lists, floats = copy.deepcopy(log), copy.deepcopy(log)
    for part in PARTS.values():
        for key, values in log[part].items():
            if key != EXTRA_KEY:
                lists[part][key] = list(values.values())
                floats[part][key] = {f"{index}.0": value for index, value in values.items()}
    for name, content in (("lists.json", lists), ("floats.json", floats)):
        (tmp_path / name).write_text(json.dumps(content))
        assert_same(report, read_log(tmp_path / name))


def test_integers_beyond_every_float_are_no_numbers(report, tmp_path):
    write_log(report, tmp_path / "log.json")
    log = json.loads((tmp_path / "log.json").read_text())
    log[PARTS["forget"]]["avg_gt_loss"]["0"] = 10**400
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(UserError, match=r"avg_gt_loss/0 is 1000.*expected a finite number"):
        read_log(tmp_path / "log.json")


def test_a_log_that_is_a_pipe_or_nested_without_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_log(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_log(tmp_path / "deep.json")
