"""From a study to what identifies it and its parts."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from search.evaluation.inputs import check_inputs, check_words
from search.evaluation.prepared import prepare
from search.spec.study import load_study
from uipe_core.corpora.types import REFUSALS, Corpus, Item
from uipe_core.errors import UserError
from uipe_core.models.tiny import tiny_model
from uipe_core.storage.content_store import content_key


@pytest.fixture
def prepared(write_study, tmp_path):
    def make(**changes):
        return prepare(load_study(write_study(tmp_path / "study.yaml", **changes)))

    return make


@pytest.fixture(scope="session")
def model_folder(preparation, finished, tmp_path_factory):
    folder = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
    copy = tmp_path_factory.mktemp("models") / "initial"
    return shutil.copytree(folder, copy)


def pretrained(folder, retain, **more):
    return {"model": {"kind": "pretrained", "initial": str(folder), "retain": str(retain), **more}}


@pytest.mark.parametrize(
    "changes",
    [
        {"search": {"trials": 99}},
        {"resources": {"max_concurrent": 3, "trial": {"threads": 2}}},
        {"budget": {"hours": 2}},
        {"storage": "sqlite:////elsewhere/study.db"},
        {"cache": {"deltas": "/elsewhere"}},
    ],
)
def test_what_may_change_from_run_to_run_keeps_the_fingerprint(prepared, changes):
    assert prepared(**changes).fingerprint == prepared().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"name": "other"},
        {"unlearning": {"learning_rate": 0.001}},
        {"corpus": {"forget_people": 3}},
        {"model": {"hidden_size": 64}},
        {"scoring": {"max_new_tokens": 13}},
        {"search": {"alpha": {"low": 0}}},
        {"search": {"sampler": "random"}},
        {"hypervolume": {"forget_quality_cap": 0.2}},
    ],
)
def test_everything_else_changes_the_fingerprint(prepared, changes):
    assert prepared(**changes).fingerprint != prepared().fingerprint


def test_base_runs_have_different_addresses_and_keep_them(prepared):
    first, again = prepared(), prepared(search={"trials": 50}, scoring={"batch_size": 8})
    inputs = [first.base_run_inputs(first.unlearning(run)) for run in first.spec.variants()]
    assert inputs[0] != inputs[1]
    assert inputs == [again.base_run_inputs(again.unlearning(run)) for run in again.spec.variants()]


def test_a_constant_schedule_trains_the_epoch_that_serves_as_control(prepared):
    assert prepared().trained_epochs == 3
    assert prepared(unlearning={"schedule": "linear"}).trained_epochs == 2


def test_caches_follow_the_study_then_the_environment(prepared, place, tmp_path):
    assert prepared().delta_root == place["cache"] / "deltas"
    assert prepared(cache={"deltas": "mine"}).delta_root == tmp_path / "mine"
    assert prepared(cache={"models": "mine"}).models.store.root == tmp_path / "mine"


def test_the_corpus_follows_the_seed(prepared):
    assert prepared(seed=1).corpus.hash != prepared().corpus.hash
    assert prepared().corpus.hash == prepared().spec.corpus.load(prepared().spec.seed).hash


def test_a_model_folder_is_known_by_its_content_wherever_it_lies(prepared, model_folder, finished, tmp_path):
    log = finished.out / "logs" / "retain.json"
    here = prepared(**pretrained(model_folder, log))
    moved = prepared(**pretrained(shutil.copytree(model_folder, tmp_path / "moved"), log))
    assert here.fingerprint == moved.fingerprint
    assert here.models.retain_log == log
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text().replace("\n", "\n\n", 1))
    assert prepared(**pretrained(tmp_path / "moved", log)).fingerprint != here.fingerprint


def test_inputs_that_are_there_pass_the_check(write_study, model_folder, finished, tmp_path):
    file = write_study(tmp_path / "study.yaml", **pretrained(model_folder, finished.out / "logs" / "retain.json"))
    (note,) = check_inputs(load_study(file))
    assert "Forget quality on 8 items: truth ratios 2.3 standard" in note and "`split` leaves 8 of 16 forget items" in note


def test_a_split_that_leaves_forget_quality_too_few_of_enough_items_is_refused(write_study, tmp_path):
    many = {"corpus": {"kind": "people", "forget_people": 26, "retain_people": 30, "pretraining_people": 10}}
    few = load_study(write_study(tmp_path / "few.yaml", **many, split={"select": 0.4}))
    with pytest.raises(UserError, match=r"split.select: 0.4 leaves forget quality \d+ of 208 forget items.*give 0.49 or more"):
        check_inputs(few)
    assert check_inputs(load_study(write_study(tmp_path / "enough.yaml", **many, split={"select": 0.5}))) == []


def test_inputs_on_the_hub_are_noted_and_not_fetched(write_study, tmp_path):
    corpus = {"corpus": {"kind": "tofu"}}
    file = write_study(tmp_path / "study.yaml", **pretrained("some/model", "other/model"), **corpus)
    notes = check_inputs(load_study(file))
    assert [note.split(":")[0] for note in notes] == ["corpus.source", "model.initial", "model.retain"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_a_damaged_model_folder_is_refused_before_anything_is_spent(
    write_study, model_folder, finished, tmp_path, damage, said
):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    damage(folder)
    file = write_study(tmp_path / "study.yaml", **pretrained(folder, finished.out / "logs" / "retain.json"))
    with pytest.raises(UserError, match=said):
        check_inputs(load_study(file))


def test_small_models_can_spell_refusals_where_a_method_writes_them_and_are_what_they_were_elsewhere(prepared):
    with_it = prepared(unlearning={"methods": {"npo": {}, "idk_dpo": {}}})
    without = prepared(unlearning={"methods": {"npo": {}, "simnpo": {}}})
    assert with_it.models.config.extra_texts == REFUSALS
    assert without.models.config == prepared().models.config
    assert without.models.identities == prepared().models.identities
    assert with_it.models.identities != without.models.identities


def rmu(layer):
    return {"unlearning": {"methods": {"rmu": {"layer": layer, "coefficient": 2}}}}


@pytest.mark.parametrize("check", [check_inputs, prepare])
def test_a_layer_the_model_has_not_is_refused_before_anything_is_spent(check, write_study, model_folder, finished, tmp_path):
    log = finished.out / "logs" / "retain.json"
    for model in ({}, pretrained(model_folder, log)):
        check(load_study(write_study(tmp_path / "study.yaml", **model, **rmu(0))))
        with pytest.raises(UserError, match=r"rmu\.layer: found 1, but the model has 1 decoder layer, .*; choose 0$"):
            check(load_study(write_study(tmp_path / "study.yaml", **model, **rmu([0, 1]))))


def test_a_log_that_is_none_is_refused_before_anything_is_spent(write_study, model_folder, tmp_path):
    (tmp_path / "log.json").write_text("{}")
    file = write_study(tmp_path / "study.yaml", **pretrained(model_folder, tmp_path / "log.json"))
    with pytest.raises(UserError, match="missing parts"):
        check_inputs(load_study(file))


def test_answers_in_which_rouge_sees_no_word_are_refused_with_the_definition_that_does():
    cyrillic = (Item("Что это?", "красный дом", "дом красный", ("синий дом",)),)
    mixed = (Item("Что это?", "дом 7", "дом номер 7", ("дом 8",)),)
    corpus = Corpus(name="cyrillic", sets={"forget": mixed, "retain": cyrillic}, forget_train=mixed, retain_train=cyrillic)
    with pytest.raises(UserError, match=r"1 of 1 retain answers \('красный дом'\) have no letter a-z.*tofu-unicode"):
        check_words(corpus, "tofu")
    check_words(corpus, "tofu-unicode")


def test_a_study_goes_on_with_the_base_runs_it_began_with(prepared):
    study = prepared(unlearning={"batch_size": 5})  # its last step of an epoch is incomplete
    run, other = study.spec.variants()
    config = study.unlearning(run)
    former = replace(config, whole_last_step=True)
    recorded = {run.label: content_key(study.base_run_inputs(former)), other.label: "0" * 32}
    assert not config.whole_last_step
    assert replace(study, recorded=recorded).unlearning(run) == former
    assert replace(study, recorded=recorded).unlearning(other) == study.unlearning(other)
    kept = {run.label: content_key(study.base_run_inputs(config))}
    assert replace(study, recorded=kept).unlearning(run) == config


def test_sampled_alternates_are_kept_by_model_and_items(prepared, tmp_path, monkeypatch):
    study = prepared(unlearning={"methods": {"alt_po": {}, "npo": {}}}, cache={"models": str(tmp_path / "models")})
    calls = []

    def sample(loaded, items):
        calls.append(loaded)
        return tuple((f"not {item.answer}",) for item in items)

    monkeypatch.setattr("search.evaluation.prepared.sample_alternates", sample)
    source = SimpleNamespace(load=lambda dtype: dtype)
    first = study.training_corpus("alt_po", source)
    assert first.alternates[0] == (f"not {study.corpus.forget_train[0].answer}",)
    assert study.training_corpus("alt_po", source).alternates == first.alternates and len(calls) == 1
    assert study.training_corpus("npo", source) is study.corpus
    alt_po, npo = (
        study.base_run_inputs(study.unlearning(next(run for run in study.spec.variants() if run.method == method)))
        for method in ("alt_po", "npo")
    )
    assert "alternates" in alt_po and "alternates" not in npo


def test_given_alternates_make_another_study_and_another_base_run(prepared, tmp_path):
    plain = prepared(unlearning={"methods": {"alt_po": {}, "npo": {}}})
    rows = [{"question": item.question, "alternate": f"not {item.answer}"} for item in plain.corpus.forget_train]
    path = tmp_path / "alternates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = prepared(unlearning={"methods": {"alt_po": {}, "npo": {}}}, corpus={"alternates": "./alternates.jsonl"})
    assert given.fingerprint != plain.fingerprint
    assert str(tmp_path) not in json.dumps(given.spec.fingerprint_payload())
    keys = [[each.base_run_inputs(each.unlearning(run)) for run in each.spec.variants()] for each in (plain, given)]
    methods = [run.method for run in plain.spec.variants()]
    npo, alt_po = methods.index("npo"), methods.index("alt_po")
    assert keys[0][npo] == keys[1][npo] and keys[0][alt_po] != keys[1][alt_po]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match=r"corpus\.alternates: .* has no alternate of the forget item"):
        prepared(unlearning={"methods": {"alt_po": {}}}, corpus={"alternates": "./alternates.jsonl"})
