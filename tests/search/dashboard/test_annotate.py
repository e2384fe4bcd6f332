"""Notes, artifacts and figures of a real study: once, without harm, and never in the way of showing it."""

import csv
import hashlib
import io
import sqlite3
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from optuna_dashboard import get_note, save_note

from search.dashboard.annotate import annotate
from search.dashboard.artifacts import item_table
from search.dashboard.notes import OURS, plain, trial_note
from search.dashboard.view import StudyView, named_attributes
from search.problem.trial import INITIAL
from search.results.study_result import StudyResult


def attributes_of(folder):
    with sqlite3.connect(folder / "study.db") as database:
        return dict(database.execute("SELECT study_id || key, value_json FROM study_system_attributes").fetchall())


def files_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (folder / "artifacts").iterdir()}


def held(result, trial):
    study = result.study
    return SimpleNamespace(study=study, storage=study._storage, _trial_id=study.trials[trial]._trial_id)


def test_everything_is_written_once_and_again_what_has_changed(copied):
    annotate(StudyResult.open(copied))
    attributes, files = attributes_of(copied), files_of(copied)
    assert len(files) == 3 * 9  # curves, items and recipe of every trial
    annotate(StudyResult.open(copied))
    assert (attributes_of(copied), files_of(copied)) == (attributes, files)

    # What is lost comes back under its name; a note that its reader wrote stays.
    result = StudyResult.open(copied)
    lost = copied / "artifacts" / min(files)
    lost.unlink()
    save_note(held(result, 0), "my own words")
    save_note(held(result, 1), f"outdated\n\n{OURS}")
    result.store.storage.set_study_system_attr(result.study._study_id, "uipe:annotated", "of before")
    annotate(result)
    assert files_of(copied) == files
    assert get_note(held(result, 0)) == "my own words"
    assert get_note(held(result, 1)).startswith("# Trial 1: ")


def test_nothing_that_goes_wrong_keeps_the_study_from_being_shown(copied, caplog):
    damaged = copied / "items" / "trials" / "00000.npz"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"no archive")
    annotate(StudyResult.open(copied))
    assert "not all there" in caplog.text and f"{damaged}: the item scores of trial 0 are damaged" in caplog.text
    damaged.write_bytes(whole)
    (copied / "artifacts").write_text("in the way")
    caplog.clear()
    result = StudyResult.open(copied)
    annotate(result)
    assert "not all there" in caplog.text
    assert get_note(result.study).startswith("# tiny")


def test_a_note_says_what_a_trial_is_and_shows_answers_letter_by_letter(copied, result, monkeypatch):
    row = result.front.iloc[0].to_dict()
    number, first = int(row["trial"]), int(result.control(INITIAL)["trial"])
    strange = "<img src=x onerror=alert(1)> | a\nline `code` [link](http://x)"
    for control, trial, answer in ((False, number, strange), (True, first, "Rome")):
        path = copied / "items" / ("controls" if control else "trials") / f"{trial:05d}.npz"
        with np.load(path) as arrays:
            kept = {name: arrays[name] for name in arrays.files if not name.startswith("texts/")}
        np.savez_compressed(path, **kept, **{"texts/forget": np.array([["Where was she born?", "Rome", answer]])})
    own = StudyResult.open(copied)
    note = trial_note(own, {**row, "collapsed": "mean loss of 22 nats", "flagged": True})
    assert "**Collapsed, so no rule chooses it: mean loss of 22 nats**" in note
    assert "**Flagged: " in note
    assert "| to forget | Where was she born? | Rome | &lt;img src=x onerror=alert\\(1\\)&gt; \\| a line" in note
    assert "<img" not in note
    assert note.endswith(OURS)
    assert "| forget | to forget | " in note


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**bold**", r"\*\*bold\*\*"),
        ("a\x1b[31mb\r\nc", r"a \[31mb c"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("http://evil", r"http\://evil"),
        ("x" * 400, "x" * 296 + r" \.\.\."),
        (None, "None"),
    ],
)
def test_texts_are_shown_letter_by_letter(text, shown):
    assert plain(text) == shown


def test_the_item_table_has_a_row_per_item_next_to_the_initial_models(result):
    number = int(result.trials.iloc[0]["trial"])
    rows = list(csv.DictReader(io.StringIO(item_table(result, number).decode())))
    scores, before = result.store.items(number), result.store.items(int(result.control(INITIAL)["trial"]), control=True)
    forget = [row for row in rows if row["set"] == "forget"]
    assert np.allclose([float(row["answer_loss"]) for row in forget], scores["forget/answer_loss"], rtol=1e-4)
    assert np.allclose([float(row["initial_answer_loss"]) for row in forget], before["forget/answer_loss"], rtol=1e-4)
    assert {row["set"] for row in rows} == {name.partition("/")[0] for name in scores}


FLAT = {
    "kind": "search",
    "base": "npo",
    "epoch": 2,
    "alpha": 0.5,
    "forget_rouge": 0.123456,
    "model_utility": 0.5,
    "components": {"Prob Retain": 0.98765, "Odd One": 2.0},
    "related_log10_forget_quality": -3.0,
    "flagged": True,
    "collapsed": "mean loss of 21 nats",
    "seconds": 3.0,
}


def test_attributes_are_named_alike_however_they_were_stored():
    found = named_attributes(FLAT, ["log10_forget_quality", "model_utility"], valued=True)
    assert found == {
        "kind": "search",
        "base": "npo",
        "epoch": 2,
        "alpha": 0.5,
        "forget_rouge": 0.12346,
        "flags": "collapsed: mean loss of 21 nats; flagged",
        "retain": {"probability": 0.988},
        "related": {"log10 FQ": -3.0},
        "numbers": {"Odd One": 2.0},
    }
    assert named_attributes(FLAT, ["model_utility"], valued=False)["model_utility"] == 0.5


def ours(storage, name, directions=("maximize", "maximize")):
    study = optuna.create_study(study_name=name, storage=storage, directions=list(directions))
    study.set_user_attr("fingerprint", "f")
    study.set_metric_names(["log10_forget_quality", "model_utility"])
    return study


def test_old_and_new_trials_and_other_peoples_studies_in_one_database():
    storage = optuna.storages.InMemoryStorage()
    old, controls = ours(storage, "old"), ours(storage, "old.controls")
    foreign = optuna.create_study(study_name="foreign.controls", storage=storage)
    for study, attributes in ((old, FLAT), (old, {"kind": "search", "evidence": FLAT}), (controls, {"evidence": FLAT})):
        trial = optuna.trial.create_trial(values=[-1.0, 0.7], user_attrs=attributes, system_attrs={"constraints": [-0.1]})
        study.add_trial(trial)
    foreign.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"collapsed": "mine"}))
    view = StudyView(storage)
    first, second = view.get_all_trials(old._study_id)
    assert first.user_attrs == second.user_attrs and "evidence" not in second.user_attrs
    assert first.values == [-1.0, 0.7] and first.system_attrs["constraints"] == [-0.1, 1.0]
    (control,) = view.get_all_trials(controls._study_id)
    assert (control.state, control.values) == (TrialState.PRUNED, None)
    assert control.user_attrs["model_utility"] == 0.7
    assert view.get_all_trials(controls._study_id, states=[TrialState.COMPLETE]) == []
    (other,) = view.get_all_trials(foreign._study_id)
    assert (other.state, other.user_attrs, other.system_attrs) == (TrialState.COMPLETE, {"collapsed": "mine"}, {})
    assert [trial.state for trial in storage.get_all_trials(controls._study_id)] == [TrialState.COMPLETE]
