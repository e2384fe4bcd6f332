"""A study of one's own questions, with a model the study fine-tunes, and objectives that compare with no retain model."""

import json

import numpy as np
import pytest
import torch

from uipe_core.errors import UserError

COLOURS = ("red", "green", "blue", "white", "black", "brown")
PLACES = ("north", "south", "east", "west", "hill", "lake", "wood", "town")


def rows(first, count):
    """Facts on numbered people: a colour and a place, in JSON lines."""
    found = []
    for number in range(first, first + count):
        colour, place = COLOURS[number % len(COLOURS)], PLACES[(number * 5 + number // 8) % len(PLACES)]
        found.append(
            {
                "messages": [
                    {"role": "user", "content": f"Where does person {number} live ?"},
                    {"role": "assistant", "content": f"In the {colour} house of the {place} ."},
                ],
                "group": f"person {number}",
            }
        )
    return found


@pytest.fixture(scope="module")
def own(tmp_path_factory, llama3):
    """The folder of a user: two files of questions, and a base model that knows none of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("own")
    for name, (first, count) in {"forget": (0, 12), "retain": (12, 24)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(first, count)))
    words = ["Where", "does", "person", "live", "?", "In", "the", "house", "of", ".", *COLOURS, *PLACES, *map(str, range(36))]
    tokenizer = llama3.of_words([*words, "system", "user", "assistant", "Today", "Date", ":", "10", "Apr", "2025"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def study(own, write_study):
    def write(name="own", **changes):
        given = {
            "corpus": {"kind": "questions", "forget": "./forget.jsonl", "retain": "./retain.jsonl"},
            "model": {
                "kind": "finetuned",
                "base": "./base",
                "finetune": {"epochs": 30, "learning_rate": 0.01, "batch_size": 6},
                "retain": False,
                "prompt_template": "{question}",
                "device": "cpu",
            },
            "unlearning": {"methods": {"grad_diff": {}}, "epochs": 2, "learning_rate": 0.003, "batch_size": 4},
            "scoring": {"max_new_tokens": 12, "temperatures": []},
            "split": None,
            "search": {"trials": 3},
        }
        return write_study(own / f"{name}.yaml", name=name, **{**given, **changes})

    return write


@pytest.fixture(scope="module")
def ran(place, study, own):
    import search

    return search.run_study(search.load_study(study()), own / "out", quiet=True)


def test_it_runs_without_a_retain_model(ran):
    assert ran.store.counts()["complete"] == 2 + 3
    assert [objective.name for objective in ran.objectives] == ["memorization_score", "retain_utility"]
    assert ran.spec.definition == "tofu-unicode"
    assert set(ran.controls["kind"]) >= {"initial", "never_finetuned"}
    assert "retain" not in set(ran.controls["kind"])
    assert "forget_quality" not in ran.trials


def test_the_model_learned_what_is_asked_and_the_base_model_had_not(ran):
    learned, base = ran.control("initial"), ran.control("never_finetuned")
    assert learned["forget_exact_memorization"] > 0.9
    assert learned["forget_rouge"] > 0.9
    assert base["forget_rouge"] < 0.3


def test_forgetting_grows_with_training(ran):
    trials = ran.trials
    assert trials["memorization_score"].max() > ran.control("initial")["memorization_score"]
    assert np.isfinite(trials[["memorization_score", "retain_utility"]].to_numpy()).all()
    # The harmonic mean of one minus the four, from the trial's own numbers.
    row = trials.iloc[0]
    assert 0 <= row["memorization_score"] <= 1 - row["forget_extraction_strength"] + 3


def test_a_point_is_exported_loaded_again_and_compared(ran, own):
    from transformers import AutoModelForCausalLM

    row = ran.trials.sort_values("memorization_score").iloc[-1]
    folder = ran.export(row, own / "exported", "model")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    card = (folder / "README.md").read_text()
    assert "memorization score" in card
    assert "reference: none" in card


def test_an_objective_of_ones_own_is_computed_on_the_workers(ran, place, study, own, monkeypatch):
    import search

    (own / "house_objectives.py").write_text(
        "import numpy as np\n\n\ndef kept(arrays, references):\n"
        "    own, initial = (np.exp(-each['retain/answer_loss']).mean() for each in (arrays, references['initial']))\n"
        "    return own / initial\n\n\ndef broken(arrays, references):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(own)
    monkeypatch.setenv("PYTHONPATH", str(own), prepend=":")
    spec = search.load_study(study("mine", objectives={"utility": "house_objectives:kept"}, search={"trials": 1}))
    result = search.run_study(spec, own / "mine", quiet=True)
    assert [objective.name for objective in result.objectives] == ["memorization_score", "kept"]
    retain = [np.exp(-result.store.items(int(number))["retain/answer_loss"]).mean() for number in result.trials["trial"]]
    # The reference models were scored by the first study: the same model on the same items.
    assert (own / "mine" / "logs" / "initial.json").read_bytes() == (own / "out" / "logs" / "initial.json").read_bytes()
    initial = np.exp(-result.store.items(int(result.control("initial")["trial"]), control=True)["retain/answer_loss"]).mean()
    assert result.trials["kept"].to_numpy() == pytest.approx(np.array(retain) / initial, rel=1e-6)


@pytest.mark.slow
def test_the_divergence_from_the_initial_model_is_a_utility(ran, place, study, own):
    import search

    chosen = {"utility": "kl_from_initial", "third": "robust_forgetting", "floor": 0.5}
    spec = search.load_study(study("budget", objectives=chosen, search={"trials": 3}))
    result = search.run_study(spec, own / "budget", quiet=True)
    assert [objective.name for objective in result.objectives] == [
        "memorization_score",
        "agreement_with_initial",
        "robust_forgetting",
    ]
    assert not [trial for trial in result.store.trials(controls=True) if trial.state.name == "FAIL"]
    initial = result.control("initial")
    assert initial["agreement_with_initial"] == 1
    assert initial["retain_kl_from_initial"] == 0
    for row in result.trials.to_dict("records"):
        kept = result.store.items(int(row["trial"]))["retain/initial_kl"]
        assert row["agreement_with_initial"] == pytest.approx(np.exp(-kept).mean())
        assert 0 < row["agreement_with_initial"] < 1
    # `line` modelled it: it proposed what was searched, and says nothing of a missing input.
    assert result.store.counts()["complete"] == 2 + 3
    # An epoch walked further is farther from the initial model.
    by_alpha = result.trials.sort_values("alpha")[["base", "epoch", "alpha", "update_norm", "retain_kl_from_initial"]]
    assert by_alpha["update_norm"].corr(by_alpha["retain_kl_from_initial"], method="spearman") > 0.5
    # Optuna knows which trials keep the floor, and its own front is of those.
    utility = result.trials.set_index("trial")["agreement_with_initial"]
    for trial in result.study.trials:
        assert list(trial.constraints.values()) == pytest.approx([0.5 - utility[trial.number]])
    feasible = {trial.number for trial in result.study.best_trials}
    assert feasible == {number for number in result.front["trial"] if utility[number] >= 0.5}
    picked = result.select("utility-floor")  # the study's own floor
    assert picked["agreement_with_initial"] >= 0.5
    assert not search.run_study(search.load_study(study()), own / "out", quiet=True).study.trials[0].constraints
    folder = result.export(picked, own / "budget_exported", "model")
    assert "memorization score" in (folder / "README.md").read_text()
    # Forgetting after NF4 was scored in the trial itself: an audit finds the same.
    number = int(picked["trial"])
    audited = search.audit_study(own / "budget", [number], tests=("quantisation",), quiet=True)
    rows = audited.controls[(audited.controls["kind"] == "nf4") & (audited.controls["of_trial"] == number)]
    assert float(rows["memorization_score"].iloc[0]) == pytest.approx(picked["robust_forgetting"], abs=1e-6)
    starting = audited.controls[(audited.controls["kind"] == "nf4") & (audited.controls["model"] == "initial")]
    assert float(starting["memorization_score"].iloc[0]) == pytest.approx(initial["robust_forgetting"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package:kept", "cannot be imported"),
        ("json:no_such_function", "cannot be imported"),
        ("json:__doc__", "is no function"),
    ],
)
def test_an_objective_that_is_none_is_refused_before_anything_is_spent(study, call, name, words):
    code, _, error = call("validate", study("none", objectives={"utility": name}))
    assert (code, words in error) == (2, True), error


def test_data_that_lacks_a_set_is_told_with_the_objective(study, call):
    code, _, error = call("validate", study("lacking", objectives={"third": "related_extraction_strength"}))
    assert code == 2
    assert "objectives.third" in error
    assert "Give corpus.related" in error
    code, _, error = call("validate", study("quality", objectives={"forgetting": "log10_forget_quality"}))
    assert code == 2
    assert "it compares with a retain model, and the study has none" in error


def test_utility_may_be_accuracy_in_the_harness(ran, place, study, own):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm-eval)")
    import search

    tasks = own / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"Where does person {n} live ?", "label": n % 2}) + "\n" for n in range(8))
    )
    (tasks / "houses.yaml").write_text(
        "task: houses\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'rows.jsonl'}}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["In the red house", "In the green house"]\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    changes = {"objectives": {"utility": "lm_eval"}, "lm_eval": {"tasks": ["houses"], "include_path": "./tasks"}}
    spec = search.load_study(study("harness", search={"trials": 1}, **changes))
    result = search.run_study(spec, own / "harness", quiet=True)
    assert [objective.name for objective in result.objectives] == ["memorization_score", "lm_eval_accuracy"]
    assert result.trials["lm_eval_accuracy"].between(0, 1).all()
    assert set(result.controls["kind"]) >= {"initial"}
    assert result.control("initial")["lm_eval_accuracy"] >= 0
    wrong = study("unknown", **{**changes, "lm_eval": {"tasks": ["no_such_task"]}})
    with pytest.raises(UserError, match="knows no task no_such_task"):
        search.run_study(search.load_study(wrong), own / "unknown", quiet=True)


def test_the_objective_and_the_section_of_the_harness_belong_together(study, call):
    for changes in ({"objectives": {"utility": "lm_eval"}}, {"lm_eval": {"tasks": ["arc_easy"]}}):
        code, _, error = call("validate", study("apart", **changes))
        assert (code, "belong together" in error) == (2, True), error


def test_a_model_in_a_package_is_looked_for_where_the_study_runs(study, call):
    import search

    model = {"kind": "finetuned", "finetune": {"epochs": 1, "learning_rate": 0.01, "batch_size": 6}}
    code, notes, error = call("validate", study("packaged", model={**model, "base": "package:no_such_package/model.gguf"}))
    assert (code, "a package that is not installed here" in notes) == (0, True), error
    with pytest.raises(UserError, match="there is no installed package 'no_such_package'"):
        search.run_study(search.load_study(study("packaged", model={**model, "base": "package:no_such_package/model.gguf"})))
    for base, words in {
        "package:json/model.gguf": "the package json has no file 'model.gguf'",
        "package:json/decoder.py": "no such folder",
        "./forget.gguf": "there is no file",
    }.items():
        code, _, error = call("validate", study("broken", model={**model, "base": base}))
        assert (code, words in error) == (2, True), error


def test_a_file_that_is_no_gguf_is_refused_by_what_it_is(study, call, own):
    pytest.importorskip("gguf", reason="gguf is not installed (extra real)")
    (own / "text.gguf").write_text("no model")
    (own / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    model = {"kind": "finetuned", "finetune": {"epochs": 1, "learning_rate": 0.01, "batch_size": 6}}
    for name, words in {"text": "is no GGUF file", "torn": "the GGUF file is damaged"}.items():
        code, _, error = call("validate", study("gguf", model={**model, "base": f"./{name}.gguf"}))
        assert (code, words in error) == (2, True), error
