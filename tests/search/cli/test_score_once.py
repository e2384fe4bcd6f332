"""Scoring a model on its own, and logs of both kinds on the command line and in a study file."""

import json

import numpy as np
import pytest

from search.cli.score_once import corpus_named
from search.evaluation.inputs import check_inputs
from search.evaluation.prepared import prepare
from search.spec.study import load_study
from uipe_core.errors import UserError
from uipe_core.logs.open_unlearning import EVAL_FILE, SUMMARY_FILE, write_open_unlearning
from uipe_core.logs.tofu import read_log, write_log
from uipe_core.metrics.answers import rouge_recall
from uipe_core.metrics.definitions import DEFINITIONS
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate
from uipe_core.models.tiny import tiny_model


@pytest.fixture(scope="module")
def logs(finished, tmp_path_factory):
    """The study's two logs in the other format, a folder each."""
    folder = tmp_path_factory.mktemp("open-unlearning")
    for name in ("initial", "retain"):
        write_open_unlearning(read_log(finished.out / "logs" / f"{name}.json"), folder / name)
    return folder


@pytest.fixture(scope="module")
def models(preparation):
    """Folders of the study's initial and retain model."""
    stages = {"initial": "full", "retain": "retain"}
    return {
        name: tiny_model(preparation.models.config, preparation.corpus, stage, preparation.models.store)
        for name, stage in stages.items()
    }


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_definition_on_logs_of_every_kind(finished, logs, call, definition):
    pairs = {
        "tofu": (finished.out / "logs" / "initial.json", finished.out / "logs" / "retain.json"),
        "open-unlearning": (logs / "initial" / EVAL_FILE, logs / "retain"),
        "mixed": (finished.out / "logs" / "initial.json", logs / "retain" / EVAL_FILE),
    }
    found = {}
    for name, (log, reference) in pairs.items():
        code, output, error = call("metrics", log, "--reference", reference, "--definition", definition, "--json")
        assert code == 0, error
        found[name] = json.loads(output)
        assert found[name]["definition"] == definition
        assert found[name]["collapsed"] is None
    for name in ("model_utility", "forget_quality", "ks_statistic"):
        assert found["open-unlearning"][name] == pytest.approx(found["tofu"][name], rel=1e-9)
        assert found["mixed"][name] == pytest.approx(found["tofu"][name], rel=1e-9)
    assert found["mixed"]["memorization"] == found["tofu"]["memorization"]
    code, output, _ = call("metrics", pairs["mixed"][0], "--definition", definition)
    assert code == 0
    assert f"definition {definition}" in " ".join(output.split())
    assert "forget: extraction strength" in output


def test_a_reference_may_be_a_model_which_is_scored_first(models, call, tmp_path):
    common = ("--corpus", "people", "--max-new-tokens", 4, "--definition", "open-unlearning")
    folder = tmp_path / "retain"
    code, _, error = call(
        "score", "--model", models["retain"], *common, "--log", folder, "--log-format", "open-unlearning", "--json"
    )
    assert code == 0, error
    assert sorted(path.name for path in folder.iterdir()) == [EVAL_FILE, SUMMARY_FILE]
    by_log, by_model = (
        call("score", "--model", models["initial"], *common, "--reference", reference, "--json")
        for reference in (folder, models["retain"])
    )
    assert (by_log[0], by_model[0]) == (0, 0), by_model[2]
    assert json.loads(by_log[1])["forget_quality"] < 1
    first, second = json.loads(by_log[1]), json.loads(by_model[1])
    assert second["forget_quality"] == pytest.approx(first["forget_quality"], rel=1e-9)
    assert second["related"]["related"]["ks_statistic"] == first["related"]["related"]["ks_statistic"]
    assert second["model_utility"] == first["model_utility"]


def test_the_log_has_the_forget_quality_against_the_reference(finished, logs, models, call, tmp_path):
    # The study's own corpus is smaller than the command's, so the log is made by the command too.
    common = ("--corpus", "people", "--max-new-tokens", 4, "--log-format", "open-unlearning", "--json")
    call("score", "--model", models["retain"], *common, "--log", tmp_path / "retain")
    code, _, error = call(
        "score", "--model", models["initial"], *common, "--log", tmp_path / "initial", "--reference", tmp_path / "retain"
    )
    assert code == 0, error
    summary = json.loads((tmp_path / "initial" / SUMMARY_FILE).read_text())
    expected = evaluate(read_log(tmp_path / "initial"), read_log(tmp_path / "retain"), "open-unlearning")
    assert summary["forget_quality"] == pytest.approx(expected.forget_quality.p_value, rel=1e-9)
    assert summary["model_utility"] == pytest.approx(expected.model_utility, rel=1e-9)


def test_a_log_of_open_unlearning_serves_as_the_retain_model_of_a_study(models, logs, finished, write_study, tmp_path):
    model = {"kind": "pretrained", "initial": str(models["initial"]), "retain": str(logs / "retain" / EVAL_FILE)}
    study = load_study(write_study(tmp_path / "study.yaml", model=model))
    assert all(note.startswith("Forget quality on 8 items") for note in check_inputs(study))
    preparation = prepare(study)
    assert preparation.models.identities["retain"].startswith("log:")
    reference = read_log(preparation.models.retain_log)
    own = {name: read_log(finished.out / "logs" / f"{name}.json") for name in ("initial", "retain")}
    found, expected = (evaluate(own["initial"], other) for other in (reference, own["retain"]))
    assert found.forget_quality == expected.forget_quality
    assert evaluate(reference, reference).model_utility == pytest.approx(evaluate(own["retain"]).model_utility, rel=1e-12)


def test_a_study_names_what_its_log_lacks(models, logs, write_study, tmp_path):
    content = json.loads((logs / "retain" / EVAL_FILE).read_text())
    del content["wf_Q_A_PERT_Prob"]
    (tmp_path / "partial.json").write_text(json.dumps(content))
    model = {"kind": "pretrained", "initial": str(models["initial"]), "retain": str(tmp_path / "partial.json")}
    with pytest.raises(UserError, match=r"partial\.json: wf_Q_A_PERT_Prob is missing; evaluate the model again"):
        check_inputs(load_study(write_study(tmp_path / "study.yaml", model=model)))


def test_logs_over_other_items_are_refused_with_the_first_that_differs(finished, call, tmp_path):
    log = json.loads((finished.out / "logs" / "retain.json").read_text())
    forget = log["eval_log_forget.json"]
    forget["uipe"]["item_hashes"]["forget"] = "0" * 16
    forget["generated_text"]["3"][0] = "Who is somebody else?"
    (tmp_path / "other.json").write_text(json.dumps(log))
    code, _, error = call("metrics", finished.out / "logs" / "initial.json", "--reference", tmp_path / "other.json")
    count = len(forget["avg_gt_loss"])
    assert code == 2
    assert f"set 'forget' has {count} items, the reference has {count}" in error
    assert "the first item that differs is 3" in error and "against 'Who is somebody else?'" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("score", "--model", "{nowhere}", "--corpus", "people", "--log-format", "xml"), "give tofu or open-unlearning"),
        (("score", "--model", "{model}", "--corpus", "people", "--reference", "{nowhere}"), "no such folder"),
        (("score", "--model", "{model}", "--corpus", "people", "--reference", "{nowhere}.json"), "no such evaluation log"),
        (
            ("score", "--model", "{model}", "--corpus", "people", "--reference", "{summary}"),
            f"give the {EVAL_FILE} of the same folder",
        ),
        (("metrics", "{log}", "--reference", "{model}"), "cannot be read"),
        (("metrics", "{log}", "--definition", "open_unlearning"), "Did you mean 'open-unlearning'"),
    ],
)
def test_bad_arguments_end_with_2_and_say_what_to_do(models, logs, call, tmp_path, arguments, said):
    places = {
        "nowhere": tmp_path / "nowhere",
        "model": models["initial"],
        "log": logs / "initial",
        "summary": logs / "initial" / SUMMARY_FILE,
    }
    code, _, error = call(*(str(argument).format(**places) for argument in arguments))
    assert code == 2
    assert said in error


def log_of_texts(path, answers, generated, unicode=False):
    """Write a log of three sets with these texts, with the ROUGE of rouge-score or that over words of any script."""
    n = len(answers)
    recall = np.array([rouge_recall(*pair, unicode) for pair in zip(answers, generated, strict=True)])
    losses, tokens = np.ones(n), np.full(n, 3)
    each = SetScores(
        answer_loss=losses,
        answer_tokens=tokens,
        paraphrase_loss=losses,
        paraphrase_tokens=tokens,
        perturbed_loss=np.full((n, 2), 2.0),
        perturbed_tokens=np.full((n, 2), 3),
        rouge_l_recall=recall[:, 0],
        rouge_1_recall=recall[:, 1],
        generated=tuple(generated),
        questions=tuple(f"Что это, {row}?" for row in range(n)),
        answers=tuple(answers),
    )
    write_log(ScoreReport(dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), each)), path)
    return path


def test_answers_of_a_log_in_which_rouge_sees_no_word_get_a_note(call, tmp_path):
    answers = ("красный дом", "дом 7", "синий дом")
    log = log_of_texts(tmp_path / "log.json", answers, answers)
    for definition in ("tofu", "tofu-utils", "open-unlearning"):
        code, output, error = call("metrics", log, "--definition", definition, "--json")
        assert code == 0, error
        found = json.loads(output)
        assert len(found["notes"]) == 4
        assert found["notes"][1] == (
            "2 of 3 retain answers ('красный дом') have no letter a-z and no digit, all that ROUGE of the definition "
            f"{definition} counts, so their recall is 0 for every model; --definition tofu-unicode computes ROUGE again from "
            "the texts in the log"
        )
    code, output, _ = call("metrics", log)
    assert code == 0
    assert "note: 2 of 3 forget answers ('красный дом')" in output
    code, output, _ = call("metrics", log, "--definition", "tofu-unicode", "--json")
    assert code == 0
    assert "notes" not in json.loads(output)
    assert json.loads(output)["components"]["ROUGE Retain"] == 1.0


def test_answers_without_any_word_get_a_note_under_every_definition(call, tmp_path):
    log = log_of_texts(tmp_path / "log.json", ("?!", "Paris"), ("?!", "Paris"))
    code, output, _ = call("metrics", log, "--definition", "tofu-unicode", "--json")
    assert code == 0
    first = json.loads(output)["notes"][0]
    assert first.startswith("1 of 2 forget answers ('?!') have no letter and no digit")
    assert first.endswith("give answers with words, or leave these items out")


def test_rouge_that_a_log_has_from_words_of_another_tokenizer_gets_no_note(call, tmp_path):
    log = log_of_texts(tmp_path / "log.json", ("красный дом",) * 2, ("красный дом",) * 2, unicode=True)
    code, output, _ = call("metrics", log, "--json")
    assert code == 0
    assert "notes" not in json.loads(output)


def test_a_log_of_the_forget_set_alone_gives_forget_quality_and_says_what_it_lacks(finished, call, tmp_path):
    logs = finished.out / "logs"
    content = json.loads((logs / "initial.json").read_text())
    (tmp_path / "forget.json").write_text(json.dumps({"eval_log_forget.json": content["eval_log_forget.json"]}))
    whole, alone = (
        call("metrics", log, "--reference", logs / "retain.json", "--json")
        for log in (logs / "initial.json", tmp_path / "forget.json")
    )
    assert (whole[0], alone[0]) == (0, 0), alone[2]
    found = json.loads(alone[1])
    assert found["forget_quality"] == json.loads(whole[1])["forget_quality"]
    assert found["model_utility"] is None
    assert found["notes"][0].startswith("model utility: not in this log, which has no ")


MORE_TASKS = [f"eval_log_{name}_{task}.json" for name in ("forget", "retain") for task in ("rephrase", "inverse")]
NINE_TASKS = [*MORE_TASKS, "eval_log_forget_onehop.json"]


def nine_tasks(log):
    """As repositories write it that add questions to TOFU's: the retain set has another key, and five more tasks are there."""
    content = json.loads(log.read_text())
    forget = content["eval_log_forget.json"]
    forget.pop("uipe", None)
    content["eval_log_retain.json"] = content.pop("eval_log.json")
    return {**content, **dict.fromkeys(NINE_TASKS, forget)}


def test_a_log_of_nine_tasks_has_the_numbers_of_tofus_four(finished, call, tmp_path):
    log, retain = (finished.out / "logs" / f"{name}.json" for name in ("initial", "retain"))
    content = nine_tasks(log)
    assert len(content) == 9
    (tmp_path / "nine.json").write_text(json.dumps(content))
    whole, nine = (call("metrics", path, "--reference", retain, "--json") for path in (log, tmp_path / "nine.json"))
    assert (whole[0], nine[0]) == (0, 0), nine[2]
    before, found = json.loads(whole[1]), json.loads(nine[1])
    for name in ("model_utility", "forget_quality", "components"):
        assert found[name] == before[name]
    (note,) = found["notes"]
    assert note.startswith("not in any number here: ") and all(task in note for task in NINE_TASKS)
    # Of a retain set without what the truth ratio compares, forget quality is left.
    del content["eval_log_retain.json"]["avg_paraphrased_loss"]
    (tmp_path / "less.json").write_text(json.dumps(content))
    code, output, error = call("metrics", tmp_path / "less.json", "--reference", retain, "--json")
    assert code == 0, error
    found = json.loads(output)
    assert (found["forget_quality"], found["model_utility"]) == (before["forget_quality"], None)
    assert found["notes"][0] == "model utility: not in this log, which has no retain"


def test_an_aggregated_log_without_a_set_is_not_told_to_be_aggregated(finished, call, tmp_path):
    content = nine_tasks(finished.out / "logs" / "initial.json")
    del content["eval_log_retain.json"]
    (tmp_path / "eight.json").write_text(json.dumps(content))
    code, _, error = call("metrics", tmp_path / "eight.json")
    assert code == 2 and "missing parts eval_log.json (found: eval_real_author" in error
    assert "made without them: add the evaluations of these sets under these keys, or score the model" in error
    assert "give an aggregated" not in error


def test_a_reference_of_another_tokenizer_gets_a_note(finished, call, tmp_path):
    log, retain = (finished.out / "logs" / f"{name}.json" for name in ("initial", "retain"))
    content = json.loads(retain.read_text())
    forget = content["eval_log_forget.json"]
    for row, count in forget["num_token_paraphrased"].items():
        more = 1 + int(row) % 3
        forget["num_token_paraphrased"][row] = count + more
    (tmp_path / "other.json").write_text(json.dumps(content))
    code, output, error = call("metrics", log, "--reference", tmp_path / "other.json")
    assert code == 0, error
    assert "note: the reference's answers have other numbers of tokens: it is of another model family" in output
    assert "note: the reference" not in call("metrics", log, "--reference", retain)[1]


def test_scoring_asks_for_no_training_files(tmp_path):
    for name in ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        row = {"question": f"Who is {name}?", "answer": "A.", "perturbed_answer": ["B."], "paraphrased_answer": "It is A."}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    assert corpus_named(f"tofu:{tmp_path}", "forget01", 0, None).forget_train == ()
    with pytest.raises(UserError, match=r"forget01\.json|retain99\.json"):
        corpus_named(f"tofu:{tmp_path}", "forget01", 0, None, for_training=True)


def test_an_unknown_corpus_is_refused():
    with pytest.raises(UserError, match=r"--corpus: 'peple' is unknown; give people, .*choices or choices:FOLDER"):
        corpus_named("peple", "forget01", 0, None)


@pytest.mark.parametrize("number", [0, -3, 1_000_001, 10**400])
@pytest.mark.parametrize("option", ["--batch-size", "--max-new-tokens", "--first-items"])
def test_numbers_that_no_study_may_have_are_refused_before_anything_is_loaded(call, option, number):
    code, output, error = call("score", "--model", "/no/such/model", "--corpus", "people", option, number)
    assert (code, output) == (2, "")
    assert f"{option}: {number} is too " in error and "give at least 1 and at most 1000000" in error
    assert "/no/such/model" not in error


@pytest.mark.parametrize(("option", "number", "most"), [("--batch-size", 0, 1_000_000), ("--adapter-rank", 70_000, 65_536)])
def test_finetuning_has_a_studys_bounds_too(call, tmp_path, option, number, most):
    code, _, error = call("finetune", "/no/such/model", "--corpus", "people", "--to", tmp_path / "to", option, number)
    assert code == 2 and f"{option}: {number} is too " in error and f"at least 1 and at most {most}" in error
