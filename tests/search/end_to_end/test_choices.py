"""A study over multiple-choice questions: read, refused, really run, exported and scored again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from search.evaluation.inputs import check_inputs
from search.evaluation.prepared import prepare
from search.planning.planner import plan_study
from search.problem.objectives import CHOICE_FORGETTING, CHOICE_UTILITY
from search.problem.trial import TrialSpec
from search.report.conclusions import conclusions
from search.spec.errors import StudyFileError
from search.spec.study import load_study, parse_study
from uipe_core.errors import UserError
from uipe_core.logs.multiple_choice import read_choice_log


def study(world, **changes):
    subsets = {"forget": "forget", "utility": "utility", "forget_texts": "forget-sheets", "retain_texts": "utility-sheets"}
    sources = {key: {"source": str(world), "subset": subset} for key, subset in subsets.items()}
    return {
        "schema_version": 1,
        "name": "choices",
        "corpus": {"kind": "multiple_choice", **sources},
        "model": {
            "kind": "tiny",
            "hidden_size": 32,
            "layers": 1,
            "heads": 2,
            "base": None,
            "finetune": {"epochs": 20, "learning_rate": 0.01, "batch_size": 8},
        },
        "unlearning": {
            "methods": {"grad_diff": {"retain_weight": 2}},
            "epochs": 3,
            "learning_rate": 0.02,
            "weight_decay": 0.0,
        },
        "search": {"alpha": {"low": -1, "high": 0.5}, "trials": 6},
        **changes,
    }


@pytest.fixture(scope="module")
def world(make_choice_world, tmp_path_factory):
    return make_choice_world(tmp_path_factory.mktemp("world"))


def pretrained(world, **model):
    return study(world, model={"kind": "pretrained", "initial": "org/initial", **model})


def problems(data, folder=None):
    with pytest.raises(StudyFileError) as caught:
        parse_study(data, folder)
    return {problem.key: problem.message for problem in caught.value.problems}


# The study file


def test_defaults_are_wmdp_bio_and_mmlu(world):
    spec = parse_study(pretrained(world) | {"corpus": {"kind": "multiple_choice"}})
    assert str(spec.corpus.forget.data_set()) == "cais/wmdp:wmdp-bio:test"
    assert str(spec.corpus.utility.data_set()) == "cais/mmlu:all:test"
    assert spec.model.retain is None
    assert spec.definition == "letters"
    assert spec.maximised == (CHOICE_FORGETTING, CHOICE_UTILITY)
    notes = check_inputs(spec)
    assert [note.partition(":")[0] for note in notes] == ["corpus.forget.source", "corpus.utility.source", "model.initial"]


def test_paths_are_relative_to_the_study_file_and_stay_out_of_its_identity(world, tmp_path):
    (tmp_path / "data").symlink_to(world)
    data = study(world)
    data["corpus"]["forget"]["source"] = "./data"
    data["corpus"]["forget_texts"] = {"source": "data/forget-sheets/test.jsonl"}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(data))
    spec = load_study(file)
    assert Path(spec.corpus.forget.source).is_absolute()
    assert Path(spec.corpus.forget_texts.source).is_file()
    payload = spec.fingerprint_payload()["corpus"]
    assert "source" not in payload["forget"]
    assert payload["forget"]["subset"] == ["forget"]
    assert "source" not in payload["forget_texts"]


BAD = [
    ("corpus.forget.source", "./nowhere", ["'./nowhere'", "there is no folder", "relative to the study file"]),
    ("corpus.utility.source", "nowhere.jsonl", ["'nowhere.jsonl'", "there is no file"]),
    ("corpus.forget.subset", [], ["must not be empty"]),
    ("corpus.forget.subset", ["a", "a"], ["differ from each other"]),
    ("corpus.forget.sub_set", "a", ["unknown", "Did you mean corpus.forget.subset?"]),
    ("corpus.forget_texts", "some/texts", ["'some/texts'", "a mapping"]),
    ("corpus.texts", 0, ["found 0", "at least 1"]),
    ("corpus.text_characters", 10, ["found 10", "at least 50"]),
    ("corpus.pretraining_people", 3, ["unknown", "belongs to corpus.kind: people"]),
    ("model.other_retain_seeds", [1], ["held against chance", "Remove it"]),
    ("unlearning.methods.idk_dpo", {}, ["answers questions", "Remove the method, or forget_texts"]),
    ("search.third_objective", "related_log10_forget_quality", ["no related facts", "Remove it"]),
    ("model.base", {"epochs": 1, "learning_rate": 0.1, "batch_size": 8}, ["no texts for a base stage", "base: null"]),
    ("hypervolume.reference_point.forgetting_to_chance", 0.5, ["found 0.5", "below 0"]),
    ("hypervolume.reference_point.utility_accuracy", 1, ["below 1"]),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD, ids=lambda item: str(item)[:40])
def test_bad_value_is_named_with_allowed_values_and_remedy(world, tmp_path, key, value, expected):
    data = study(world)
    *above, last = key.split(".")
    here = data
    for part in above:
        here = here.setdefault(part, {})
    here[last] = value
    found = problems(data, tmp_path)
    assert len(found) == 1
    assert next(iter(found)).startswith(key.rpartition(".")[0])
    for part in expected:
        assert part in next(iter(found.values()))


def test_a_retain_model_belongs_to_the_other_corpora_and_objectives_that_compare_need_one(world):
    found = problems(pretrained(world, retain="org/retain"))
    assert "held against chance" in found["model.retain"]
    assert "Remove it" in found["model.retain"]
    without = pretrained(world) | {"corpus": {"kind": "tofu"}}
    assert [each.name for each in parse_study(without).maximised] == ["memorization_score", "retain_utility"]
    found = problems(without | {"objectives": {"forgetting": "log10_forget_quality"}})
    assert "Give model.retain, a model or its log" in found["objectives.forgetting"]
    assert (
        "has objectives of its own"
        in problems(study(world) | {"objectives": {"utility": "retain_utility"}})["objectives.utility"]
    )


def test_validate_reads_the_questions(world, tmp_path, call):
    data = study(world)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(data))
    code, output, _ = call("validate", file)
    assert code == 0
    assert "1 base runs of 3 epochs" in output
    (tmp_path / "forget.jsonl").write_text('{"question": "q?", "choices": ["a", "b"], "answer": 2}\n')
    data["corpus"]["forget"] = {"source": "./forget.jsonl"}
    file.write_text(yaml.safe_dump(data))
    code, _, error = call("validate", file)
    assert code == 2
    assert "forget.jsonl, line 1: field 'answer' is 2; give the index of the right choice, 0 to 1" in error


def test_a_changed_question_is_another_study(world, place, make_choice_world, tmp_path):
    before = prepare(parse_study(study(world)))
    other = make_choice_world(tmp_path / "world", seed=5)
    assert prepare(parse_study(study(other))).fingerprint != before.fingerprint
    same = make_choice_world(tmp_path / "same")
    assert prepare(parse_study(study(same))).fingerprint == before.fingerprint
    assert set(before.models.identities) == {"initial"}


# One study, really run


@pytest.fixture(scope="module")
def ran(world, place, environment, tmp_path_factory, run_command):
    """The small study, run by the command: its folder and what it printed."""
    file = tmp_path_factory.mktemp("choice-study") / "study.yaml"
    file.write_text(yaml.safe_dump(study(world)))
    out = tmp_path_factory.mktemp("choice-runs") / "out"
    return out, json.loads(run_command("run", file, "--out", out, "--json"))


@pytest.fixture(scope="module")
def choice_result(ran):
    from search.results.study_result import StudyResult

    return StudyResult.open(ran[0])


def test_the_front_reaches_from_knowing_to_chance(ran, choice_result):
    front, initial = choice_result.front, choice_result.control("initial")
    assert initial["forget_accuracy"] > 0.9
    assert initial["utility_accuracy"] > 0.9
    assert len(front) > 0
    assert front["forget_accuracy"].min() < initial["forget_accuracy"] - 0.3
    best = choice_result.select("utility-floor", 0.7)
    assert best["forget_accuracy"] < initial["forget_accuracy"] - 0.3
    assert best["utility_accuracy"] >= 0.7 * initial["utility_accuracy"]
    assert (choice_result.trials["forgetting_to_chance"] <= 0).all()
    summary = ran[1]
    assert summary["definition"] == "letters"
    assert summary["trials"] == {"complete": 9, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert summary["front"][0].keys() >= {"forgetting_to_chance", "forget_accuracy", "utility_accuracy", "flagged"}
    assert summary["hypervolume"]["front"] >= summary["hypervolume"]["alpha_zero"] > 0


def test_controls_are_those_that_mean_something_for_accuracy(choice_result):
    kinds = set(choice_result.controls["kind"])
    assert kinds - {"random_direction"} == {"initial", "next_epoch"}
    moved = choice_result.front[choice_result.front["alpha"] != 0]
    assert (choice_result.controls["kind"] == "random_direction").sum() == len(moved)


def test_the_initial_models_answers_are_kept_question_by_question(ran, choice_result, world):
    report = read_choice_log(ran[0] / "logs" / "initial.json")
    assert report.sets["forget"].log_likelihood.shape == (20, 4)
    assert np.mean(report.sets["utility"].correct) == choice_result.control("initial")["utility_accuracy"]
    assert report.sets["forget"].item_hash == choice_result.store.record.corpus.sets["forget"]
    assert not (ran[0] / "logs" / "retain.json").exists()
    best = choice_result.front.iloc[0]
    assert np.mean(choice_result.store.items(int(best["trial"]))["forget/correct"]) == best["forget_accuracy"]


def test_report_and_verdict_speak_of_accuracy_and_chance(ran, choice_result):
    page = (ran[0] / "report" / "report.html").read_text()
    assert "minus forget accuracy above chance (letters)" not in page  # it is on the axes of the picture
    for part in ("minus forget accuracy above chance", "utility accuracy", "metrics: letters", "20 forget items", "guessing"):
        assert part in page
    for part in ("forget quality", "retain model,", "log10"):
        assert part not in page.partition('id="controls"')[0]
    text = " ".join(conclusions(choice_result))
    assert "forget accuracy" in text
    assert "utility accuracy" in text


@pytest.mark.parametrize("command", [("pareto",), ("select", "--rule", "knee"), ("select", "--floor", "0.7"), ("report",)])
def test_commands_on_its_folder(ran, call, command):
    code, output, error = call(command[0], ran[0], *command[1:])
    assert code == 0, error
    assert "accuracy" in output or command == ("report",)


def test_exported_it_has_the_numbers_of_its_trial_also_by_the_score_command(ran, choice_result, world, call, tmp_path):
    row = choice_result.front.iloc[0]
    folder = choice_result.export(row, tmp_path / "exported", "model")
    card = (folder / "README.md").read_text()
    assert "- reference: chance" in card
    assert f"| forget accuracy (chance 0.2500) | {row['forget_accuracy']:.4f} ±" in card
    log = tmp_path / "scores.json"
    code, output, error = call("score", "--model", folder, "--corpus", f"choices:{world}", "--log", log, "--json")
    assert code == 0, error
    numbers = json.loads(output)
    assert numbers["forget_accuracy"] == row["forget_accuracy"]
    assert numbers["utility_accuracy"] == row["utility_accuracy"]
    assert numbers["definition"] == "letters"
    assert np.mean(read_choice_log(log).sets["forget"].correct) == row["forget_accuracy"]


def test_an_export_whose_numbers_are_not_the_trials_is_withdrawn(choice_result, tmp_path):
    from search.results.export import export
    from search.results.recipe import recipe_of
    from uipe_core.errors import ExportMismatchError

    recipe = recipe_of(choice_result.store.record, choice_result.spec, choice_result.front.iloc[0].to_dict())
    wrong = replace(recipe, expected={**recipe.expected, "forget_accuracy": 0.99})
    with pytest.raises(ExportMismatchError, match=r"forget_accuracy: trial 0\.99"):
        export(wrong, tmp_path / "exported", "model")
    assert not (tmp_path / "exported").exists()


def evaluator(choice_result, spec, corpus=None):
    """An evaluator of the study that ran, of another split or corpus."""
    from search.evaluation.evaluator import Evaluator, StudyContext

    preparation = prepare(spec)
    source = preparation.models.source("initial", str(preparation.models.store.find(preparation.models.identities["initial"])))
    context = StudyContext(
        corpus=corpus or preparation.corpus,
        split=preparation.split,
        source=source,
        deltas=preparation.delta_root,
        references={"initial": read_choice_log(choice_result.out / "logs" / "initial.json")},
        scoring=preparation.scoring,
        definition=spec.definition,
        objectives=spec.maximised,
        seed=0,
        threads=1,
    )
    return Evaluator(context)


def with_delta(spec, job):
    """A job as the driver hands it out: with the entries of the delta store that hold its base run."""
    from uipe_core.deltas.store import DeltaStore

    preparation = prepare(spec)
    inputs = {run.label: preparation.base_run_inputs(preparation.unlearning(run)) for run in spec.variants()}
    return replace(job, delta=DeltaStore(preparation.delta_root).find(inputs[job.base]).keys)


def test_halves_are_scored_apart(choice_result, world):
    whole = choice_result.trial(1)
    data = study(world, split={"select": 0.4})
    spec = parse_study(data)
    halves = evaluator(choice_result, spec)
    point = ("grad_diff", int(whole["epoch"]), float(whole["alpha"]))
    kinds = {"search": TrialSpec("search", *point), "held_out": TrialSpec("held_out", *point, of_trial=1)}
    found = [halves.evaluate(with_delta(spec, job)) for job in kinds.values()]
    (selected, shorter), (reported, longer) = ((metrics.as_dict(), report) for metrics, report in found)
    sizes = {name: (len(shorter.sets[name]), len(longer.sets[name])) for name in ("forget", "utility")}
    assert sizes == {"forget": (8, 12), "utility": (11, 17)}
    for name, (few, many) in sizes.items():
        accuracy = (few * selected[f"{name}_accuracy"] + many * reported[f"{name}_accuracy"]) / (few + many)
        assert accuracy == pytest.approx(whole[f"{name}_accuracy"])
    initial, _ = halves.evaluate(TrialSpec("held_out", model="initial"))
    assert initial.numbers["forget_accuracy"] > 0.9


def test_how_sure_the_front_is(choice_result):
    sure = choice_result.certainty.set_index("trial")
    trials = choice_result.trials.set_index("trial")
    assert set(sure.index) == set(trials.index)
    for name in ("forgetting_to_chance", "utility_accuracy"):
        assert (sure[f"{name}_low"] <= trials[name] + 1e-9).all()
        assert (sure[f"{name}_high"] >= trials[name] - 1e-9).all()
        assert (sure[f"{name}_high"] - sure[f"{name}_low"]).max() > 0.1
    best = trials["on_front"]
    assert sure.loc[best, "front_probability"].min() > sure.loc[~best, "front_probability"].mean()


def test_an_evaluator_flags_below_chance(choice_result):
    spec = choice_result.spec
    preparation = prepare(spec)
    turned = tuple(replace(item, answer=(item.answer + 1) % 4) for item in preparation.corpus.choices["forget"])
    corpus = replace(preparation.corpus, choices={**preparation.corpus.choices, "forget": turned})
    job = with_delta(spec, TrialSpec("search", "grad_diff", 1, -1.0))
    metrics, report = evaluator(choice_result, spec, corpus).evaluate(job)
    evidence = metrics.as_dict()
    assert evidence["forget_accuracy"] < 0.1
    assert evidence["forgetting_to_chance"] == 0.0
    assert evidence["below_chance"] is True
    assert evidence["flagged"] is True
    assert evidence["logit_scale"] == pytest.approx(1.0)
    assert report.arrays()["forget/correct"].sum() <= 2


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("choices:nowhere", r"folder nowhere: no such folder; give one with the files forget\.jsonl and utility\.jsonl"),
        ("choice", "give people, tofu, tofu:FOLDER, choices or choices:FOLDER"),
    ],
)
def test_score_refuses_what_is_no_corpus(call, corpus, message):
    import re

    code, _, error = call("score", "--model", "x", "--corpus", corpus)
    assert code == 2
    assert re.search(message, error)


def test_a_folder_without_questions_is_refused(tmp_path):
    from uipe_core.corpora.multiple_choice import load_multiple_choice, sets_in_folder

    with pytest.raises(UserError, match="no subset 'forget'; it has none"):
        load_multiple_choice(*sets_in_folder(tmp_path))


def test_metrics_of_its_results_are_read_back(ran, choice_result, call):
    code, output, error = call("metrics", ran[0] / "logs" / "initial.json", "--json")
    assert code == 0, error
    assert json.loads(output)["utility_accuracy"] == choice_result.control("initial")["utility_accuracy"]
    code, output, _ = call("metrics", ran[0] / "logs" / "initial.json")
    assert code == 0
    assert "forget_accuracy" in output


def test_a_reference_has_no_place_beside_chance(world, call):
    code, _, error = call("score", "--model", "x", "--corpus", f"choices:{world}", "--reference", "y.json")
    assert code == 2
    assert "multiple choice is held against chance; leave it out" in error


def test_letters_are_audited_in_few_bits_and_texts_are_not_asked_for(ran, choice_result, call):
    out, best = ran[0], int(choice_result.front["trial"].iloc[0])
    code, output, error = call("audit", out, "--trial", best, "--json")
    assert code == 0, error
    facts = json.loads(output)
    by_kind = {audit["kind"]: audit for audit in facts["audits"]}
    assert [kind for kind, audit in by_kind.items() if audit["state"] == "done"] == ["int8", "int4", "nf4"]
    assert by_kind["prompts"]["reasons"] == {"all": "needs answers that are texts, and this study scores letters"}
    assert facts["retain"] == "no retain model"
    accuracy = next(each["values"] for each in by_kind["int8"]["numbers"] if each["key"] == "forgetting_to_chance")
    assert accuracy[str(best)] == pytest.approx(choice_result.trial(best)["forgetting_to_chance"], abs=0.2)
    code, _, error = call("audit", out, "--trial", best, "--tests", "fluency")
    assert code == 2 and "needs answers that are texts" in error


def test_a_plan_counts_no_audits_of_texts_where_letters_are_scored(world, tmp_path):
    spec = parse_study(study(world, audit={"top": 2, "tests": ["quantisation", "prompts", "relearning"]}))
    lines = {line.what: line.value for line in plan_study(spec, tmp_path / "out", None, lambda _: None).lines}
    assert lines["audits of finalists, in scorings"] == 3 * 3  # int8, int4, NF4 of two finalists and the initial model
    assert "audits of finalists, in training steps" not in lines
