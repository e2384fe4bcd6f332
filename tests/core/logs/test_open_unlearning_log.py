"""Logs of open-unlearning: round trips, the shape its code expects, parts that may be missing, and damage."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from uipe_core.errors import UserError
from uipe_core.logs.open_unlearning import EVAL_FILE, PREFIXES, SUMMARY_FILE, write_open_unlearning
from uipe_core.logs.parts import EXTRA_KEY
from uipe_core.logs.tofu import is_log, read_log, write_log
from uipe_core.metrics.definitions import DEFINITIONS
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import CHOICE_SETS, evaluate

N = 12
"""Sorted as text, index 10 comes before index 2."""


def random_set(rng, k, name, item_hash):
    answer = rng.exponential(1, N)
    return SetScores(
        answer_loss=answer,
        answer_tokens=np.zeros(N, dtype=np.int64),
        paraphrase_loss=answer if name in CHOICE_SETS else rng.exponential(1, N),
        paraphrase_tokens=np.zeros(N, dtype=np.int64),
        perturbed_loss=rng.exponential(2, (N, k)),
        perturbed_tokens=np.zeros((N, k), dtype=np.int64),
        rouge_l_recall=rng.random(N),
        rouge_1_recall=rng.random(N),
        generated=tuple(f"generated {i} \u2028 \u00e9" for i in range(N)),
        questions=tuple(f"question {i}?" for i in range(N)),
        answers=tuple(f"answer {i}." for i in range(N)),
        item_hash=item_hash,
        exact_memorization=rng.random(N),
        extraction_strength=rng.random(N),
    )


def random_report(seed=0):
    rng = np.random.default_rng(seed)
    names = (*PREFIXES, "related")
    sets = {name: random_set(rng, 2 + i, name, f"hash{i}") for i, name in enumerate(names)}
    return ScoreReport(sets, logit_scale=1.2345678901234567, seconds={"losses": 0.5})


@pytest.fixture
def report():
    return random_report()


@pytest.fixture
def log(report, tmp_path):
    write_open_unlearning(report, tmp_path)
    return json.loads((tmp_path / EVAL_FILE).read_text())


@pytest.fixture
def rewritten(log, tmp_path):
    """Writes the log again after a change."""

    def write(change=lambda content: None):
        change(log)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(log))
        return path

    return write


def assert_same(first, second):
    assert set(first.sets) == set(second.sets)
    for name, scores in first.sets.items():
        for entry in fields(scores):
            one, two = getattr(scores, entry.name), getattr(second.sets[name], entry.name)
            if isinstance(one, np.ndarray):
                assert np.array_equal(one, two), (name, entry.name)
            else:
                assert one == two, (name, entry.name)


def test_round_trip_is_exact(report, tmp_path):
    write_open_unlearning(report, tmp_path / "new", {"model": "a folder"})
    again = read_log(tmp_path / "new" / EVAL_FILE)
    assert_same(report, again)
    assert (again.logit_scale, again.seconds) == (report.logit_scale, report.seconds)
    assert_same(report, read_log(tmp_path / "new"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [EVAL_FILE, SUMMARY_FILE]


def test_the_numbers_in_the_log_are_those_of_the_definition(report, tmp_path):
    reference = random_report(1)
    write_open_unlearning(report, tmp_path, reference=reference)
    expected = evaluate(report, reference, "open-unlearning")
    log, summary = (json.loads((tmp_path / name).read_text()) for name in (EVAL_FILE, SUMMARY_FILE))
    assert summary["model_utility"] == pytest.approx(expected.model_utility, rel=1e-9)
    assert summary["forget_quality"] == pytest.approx(expected.forget_quality.p_value, rel=1e-9)
    # The aggregates again from the values by index, as open-unlearning's own code takes them.
    ratios = np.array([row["score"] for row in log["retain_Truth_Ratio"]["value_by_index"].values()])
    assert log["retain_Truth_Ratio"]["agg_value"] == pytest.approx(np.maximum(0, 1 - ratios).mean(), rel=1e-9)
    ratios = np.array([row["score"] for row in log["forget_truth_ratio"]["value_by_index"].values()])
    assert summary["forget_truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / (ratios + 1e-10)).mean(), rel=1e-9)
    probabilities = [row["prob"] for row in log["ra_Q_A_Prob_normalised"]["value_by_index"].values()]
    assert summary["ra_Q_A_Prob_normalised"] == pytest.approx(np.mean(probabilities), rel=1e-9)
    nine = ["retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"]
    nine += [f"{prefix}_{name}" for prefix in ("ra", "wf") for name in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")]
    assert summary["model_utility"] == pytest.approx(9 / sum(1 / summary[name] for name in nine), rel=1e-9)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_log_read_back_gives_the_same_numbers(report, tmp_path, definition):
    reference = random_report(1)
    write_open_unlearning(report, tmp_path / "model")
    write_open_unlearning(reference, tmp_path / "reference")
    first = evaluate(report, reference, definition)
    second = evaluate(read_log(tmp_path / "model"), read_log(tmp_path / "reference", as_reference=True), definition)
    assert second.model_utility == pytest.approx(first.model_utility, rel=1e-9)
    assert second.forget_quality.p_value == pytest.approx(first.forget_quality.p_value, rel=1e-9)
    assert second.related == first.related


def test_both_kinds_of_log_carry_the_same(report, tmp_path):
    write_log(report, tmp_path / "tofu.json")
    write_open_unlearning(report, tmp_path)
    assert_same(read_log(tmp_path / "tofu.json"), read_log(tmp_path / EVAL_FILE))


def test_log_has_the_metrics_of_open_unlearning(log):
    row = {"rougeL_recall", "rougeL_f1", "rouge1_recall", "input", "ground_truth", "generation"}
    assert set(log["forget_Q_A_ROUGE"]["value_by_index"]["3"]) == row
    assert set(log["forget_Q_A_PERT_Prob"]["value_by_index"]["3"]) == {"prob", "avg_loss"}
    assert len(log["forget_Q_A_PERT_Prob"]["value_by_index"]["3"]["avg_loss"]) == 2
    assert list(log["forget_Q_A_Prob"]["value_by_index"]) == [str(index) for index in range(N)]
    assert "ra_Q_A_PARA_Prob" not in log and "wf_Q_A_PARA_Prob" not in log and "retain_Q_A_PARA_Prob" in log
    assert {"exact_memorization", "model_utility"} <= set(log)
    # Without token counts open-unlearning's convention is not known.
    assert "extraction_strength" not in log
    assert "forget_quality" not in log
    assert all("agg_value" in metric for name, metric in log.items() if name != EXTRA_KEY)


def test_a_paraphrase_of_a_choice_set_is_kept(report, tmp_path):
    scores = report.sets["world_facts"]
    other = ScoreReport({**report.sets, "world_facts": replace(scores, paraphrase_loss=scores.paraphrase_loss + 1)})
    write_open_unlearning(other, tmp_path)
    assert_same(ScoreReport(other.sets), read_log(tmp_path))


def test_a_log_of_open_unlearning_itself(report, rewritten):
    """Nothing of ours; further fields and metrics; a single perturbed answer as a number."""

    def foreign(content):
        del content[EXTRA_KEY]
        content["mia_loss"] = {"agg_value": 0.5, "auc": 0.5}
        content["forget_quality"] = {"agg_value": None}
        for row in content["forget_Q_A_ROUGE"]["value_by_index"].values():
            row["rougeL_f1"] = 0.5
        for row in content["wf_Q_A_PERT_Prob"]["value_by_index"].values():
            row.update(prob=row["prob"][0], avg_loss=row["avg_loss"][0])
        content["extraction_strength"] = {"value_by_index": {str(index): {"score": 0.5} for index in range(N)}}
        content["extraction_strength"]["value_by_index"]["4"]["score"] = None

    found = read_log(rewritten(foreign))
    assert set(found.sets) == set(PREFIXES)
    assert found.sets["world_facts"].perturbed_loss.tolist() == report.sets["world_facts"].perturbed_loss[:, :1].tolist()
    assert found.sets["forget"].item_hash is None
    assert np.array_equal(found.sets["forget"].exact_memorization, report.sets["forget"].exact_memorization)
    assert found.sets["forget"].extraction_strength is None
    assert found.sets["forget"].extraction_strength_open_unlearning is None
    assert found.sets["retain"].exact_memorization is None
    assert evaluate(found, found, "open-unlearning").forget_quality.p_value == 1


# As a reference


def keep(*names):
    def change(content):
        for name in set(content) - set(names):
            del content[name]

    return change


def test_a_reference_needs_the_forget_truth_ratios_inputs_only(report, rewritten):
    path = rewritten(keep("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio", "retain_Q_A_Prob"))
    reference = read_log(path, as_reference=True)
    assert set(reference.sets) == {"forget"}
    assert np.isnan(reference.sets["forget"].answer_loss).all()
    assert evaluate(report, reference, "open-unlearning").forget_quality.p_value == 1
    with pytest.raises(UserError, match="'forget', item 0: answer_loss"):
        evaluate(ScoreReport({**report.sets, "forget": reference.sets["forget"]}))
    with pytest.raises(UserError, match=r"changed\.json: forget_Q_A_Prob is missing; evaluate the model again"):
        read_log(path)


def test_a_reference_in_the_other_format_needs_the_forget_part_only(report, tmp_path):
    write_log(report, tmp_path / "log.json")
    log = json.loads((tmp_path / "log.json").read_text())
    forget = log["eval_log_forget.json"]
    kept = {key: forget[key] for key in ("avg_paraphrased_loss", "average_perturb_loss")}
    (tmp_path / "log.json").write_text(json.dumps({"eval_log_forget.json": kept, "eval_log.json": {"avg_gt_loss": {}}}))
    reference = read_log(tmp_path / "log.json", as_reference=True)
    assert set(reference.sets) == {"forget"}
    assert evaluate(report, reference).forget_quality.p_value == 1


@pytest.mark.parametrize("name", ["forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob"])
def test_a_reference_without_the_forget_losses_is_refused(rewritten, name):
    path = rewritten(lambda content: content.pop(name))
    with pytest.raises(UserError, match=rf"changed\.json: {name} is missing; .*forget_quality included"):
        read_log(path, as_reference=True)


# Damage


def at(metric, index, change):
    return lambda content: change(content[metric]["value_by_index"], index)


def put(field, value):
    return lambda rows, index: rows[index].update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("retain_Q_A_PERT_Prob"), "retain_Q_A_PERT_Prob is missing; evaluate the model again"),
        (lambda c: c.pop("ra_Q_A_Prob"), "ra_Q_A_Prob is missing"),
        (lambda c: c.update(wf_Q_A_Prob=[1]), "wf_Q_A_Prob is a list"),
        (lambda c: c["forget_Q_A_Prob"].pop("value_by_index"), "forget_Q_A_Prob/value_by_index is missing"),
        (lambda c: c["forget_Q_A_Prob"].update(value_by_index=[]), "forget_Q_A_Prob/value_by_index is empty"),
        (lambda c: c["forget_Q_A_PARA_Prob"].update(value_by_index={}), "forget_Q_A_PARA_Prob/value_by_index is empty"),
        (at("forget_Q_A_Prob", "4", dict.pop), "forget_Q_A_Prob/value_by_index has other indexes .* '4' is missing"),
        (at("forget_Q_A_Prob", "4", lambda rows, i: rows.update({i: 1.0})), "forget_Q_A_Prob/value_by_index/4 is 1.0"),
        (at("retain_Q_A_Prob", "4", lambda rows, i: rows[i].pop("avg_loss")), "value_by_index/4/avg_loss is missing"),
        (at("retain_Q_A_Prob", "4", put("avg_loss", float("nan"))), "retain_Q_A_Prob/value_by_index/4/avg_loss is nan"),
        (at("retain_Q_A_Prob", "4", put("avg_loss", float("inf"))), "4/avg_loss is inf, expected a finite number"),
        (at("retain_Q_A_Prob", "4", put("avg_loss", "1")), "4/avg_loss is '1'"),
        (at("retain_Q_A_Prob", "4", put("avg_loss", None)), "4/avg_loss is None"),
        (at("retain_Q_A_Prob", "4", put("avg_loss", True)), "4/avg_loss is True"),
        (at("wf_Q_A_PERT_Prob", "4", put("avg_loss", [1.0])), "4/avg_loss has 1 numbers where item 0 has 5"),
        (at("wf_Q_A_PERT_Prob", "4", put("avg_loss", 1.0)), "4/avg_loss is not a list"),
        (at("wf_Q_A_PERT_Prob", "4", put("avg_loss", [1.0, "x", 1.0, 1.0, 1.0])), "4/avg_loss is 'x'"),
        (at("ra_Q_A_ROUGE", "4", put("rougeL_recall", "all")), "ra_Q_A_ROUGE/value_by_index/4/rougeL_recall is 'all'"),
        (at("ra_Q_A_ROUGE", "4", put("generation", 3)), "ra_Q_A_ROUGE/value_by_index/4/generation is 3, expected a text"),
        (at("exact_memorization", "4", put("score", "x")), "exact_memorization/value_by_index/4/score is 'x'"),
        (lambda c: c.update({EXTRA_KEY: 1}), "uipe is a int"),
        (lambda c: c[EXTRA_KEY]["per_item"].update(retain=1), "uipe/per_item/retain is a int"),
        (lambda c: c[EXTRA_KEY]["per_item"]["retain"]["exact_memorization"].update({"4": "x"}), "'x'"),
    ],
)
def test_damaged_log_names_file_key_and_remedy(rewritten, change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_log(rewritten(change))
    assert "changed.json: " in str(caught.value)
    assert "again" in str(caught.value)


def test_the_summary_alone_will_not_do(log, tmp_path):
    with pytest.raises(UserError, match=rf"{SUMMARY_FILE}: holds aggregates only.* give the {EVAL_FILE} of the same folder"):
        read_log(tmp_path / SUMMARY_FILE)


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path)


def test_what_is_a_log_and_what_a_model(log, tmp_path):
    (tmp_path / "model").mkdir()
    assert is_log(tmp_path) and is_log(tmp_path / EVAL_FILE) and is_log("absent.json")
    assert not is_log(tmp_path / "model") and not is_log("open-unlearning/tofu_Llama-3.2-1B-Instruct_full")


def test_writing_needs_rouge_sets_and_finite_numbers(report, tmp_path):
    def changed(**changes):
        return replace(report, sets={**report.sets, "retain": replace(report.sets["retain"], **changes)})

    for broken, message in (
        (changed(rouge_l_recall=None), "'retain' has no ROUGE"),
        (changed(answer_loss=np.full(N, np.nan)), "set 'retain' has numbers that are not finite"),
        (ScoreReport({"forget": report.sets["forget"]}), "lacks the sets retain, real_authors, world_facts"),
    ):
        with pytest.raises(UserError, match=message):
            write_open_unlearning(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_open_unlearning(report, tmp_path / "file" / "logs")


def test_extraction_strength_has_open_unlearnings_convention_in_its_log_and_ours_next_to_it(report, tmp_path):
    """A missed last token counts 1 / t there, and 0 here."""
    strength = np.array([0.0, 0.5, 1.0, *np.full(N - 3, 0.25)])
    forget = replace(report.sets["forget"], extraction_strength=strength, answer_tokens=np.full(N, 5))
    write_open_unlearning(replace(report, sets={**report.sets, "forget": forget}), tmp_path)
    log = json.loads((tmp_path / EVAL_FILE).read_text())
    theirs = [log["extraction_strength"]["value_by_index"][str(index)]["score"] for index in range(N)]
    assert theirs[:4] == [0.25, 0.5, 1.0, 0.25]  # four tokens without the end token
    assert read_log(tmp_path).sets["forget"].extraction_strength.tolist() == strength.tolist()
    del log[EXTRA_KEY]
    (tmp_path / EVAL_FILE).write_text(json.dumps(log))
    scores = read_log(tmp_path).sets["forget"]
    assert scores.extraction_strength is None
    assert scores.extraction_strength_open_unlearning.tolist() == theirs
    values = evaluate(read_log(tmp_path)).as_dict()["memorization"]["forget"]
    assert values["extraction_strength_open_unlearning"] == pytest.approx(np.mean(theirs))


def test_rouge_f1_is_that_of_the_texts(log):
    row = log["forget_Q_A_ROUGE"]["value_by_index"]["3"]
    # "generated 3 <U+2028> é" and "answer 3.": one of two tokens each.
    assert row["rougeL_f1"] == pytest.approx(0.5)


def test_indexes_that_are_floats_are_read(report, log, tmp_path):
    for metric in log.values():
        if isinstance(metric.get("value_by_index"), dict):
            metric["value_by_index"] = {f"{index}.0": value for index, value in metric["value_by_index"].items()}
    (tmp_path / "floats.json").write_text(json.dumps(log))
    assert evaluate(read_log(tmp_path / "floats.json")) == evaluate(read_log(tmp_path))
