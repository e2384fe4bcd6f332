"""A study from one command to its results: what is there, where it is, and what the same command does again."""

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from search.results.study_result import StudyResult
from search.store.study_store import StudyStore
from uipe_core.corpora.split import take_items
from uipe_core.corpora.types import RELATED_SETS
from uipe_core.deltas.store import DeltaStore
from uipe_core.logs.tofu import read_log
from uipe_core.metrics.tofu import evaluate
from uipe_core.models.tiny import tiny_model
from uipe_core.scoring.scorer import Scorer
from uipe_core.unlearning.training import train_base_run

OBJECTIVES = ("log10_forget_quality", "model_utility")

GIVEN = 4
CONTROLS = {"initial": 1, "retain": 1, "other_retain": 1, "never_finetuned": 1, "temperature": 1, "next_epoch": 2}


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def ray_sessions(out):
    return sorted(path.name for path in (out / "ray").glob("session_2*"))


def test_prints_one_json_object_with_the_promised_keys(finished):
    summary = json.loads(finished.stdout)
    assert finished.stdout.count("\n") == 1
    assert summary["study"] == "tiny"
    assert summary["out"] == str(finished.out)
    assert summary["trials"] == {"complete": GIVEN + 5, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert {"trial", "method", "epoch", "alpha", *OBJECTIVES, "forget_quality"} <= summary["front"][0].keys()
    assert summary["hypervolume"].keys() == {"front", "alpha_zero", "extrapolation_only", "random_direction"}
    assert summary["seconds"].keys() == {"models", "references", "training", "given", "trials"}
    assert min(seconds for stage, seconds in summary["seconds"].items() if stage != "training") > 0  # it may be over in time
    assert Path(summary["report"]).is_file()
    assert summary["storage"].startswith("sqlite:///")


def test_progress_goes_to_standard_error(finished):
    for words in ("training: initial model", "unlearning: npo", "scoring: retain model", "searching:", "report"):
        assert words in finished.stderr
    assert "Traceback" not in finished.stderr


def test_every_trial_carries_its_evidence(result):
    trials = result.trials
    assert len(trials) == GIVEN + 5
    assert set(trials["definition"]) == {"tofu"}
    assert set(trials["dtype"]) == {"float32"}
    assert trials["kind"].value_counts().to_dict() == {"search": 5, "alpha_zero": GIVEN}
    walks = [("unlearned epoch" if a == 0 else "interpolation" if a < 0 else "extrapolation") for a in trials["alpha"]]
    assert list(trials["walk"]) == walks
    sets, kinds = ("Retain", "Real Authors", "Real World"), ("Prob", "ROUGE", "Truth Ratio")
    nine = [f"{kind} {name}" for name in sets for kind in kinds]
    numbers = [*OBJECTIVES, "forget_quality", "ks_statistic", "logit_scale", "update_norm", "seconds", *nine]
    numbers += [f"{name}_log10_forget_quality" for name in RELATED_SETS]
    assert np.isfinite(trials[numbers].to_numpy(dtype=float)).all()
    assert trials["flagged"].isin([True, False]).all()
    harmonic = 9 / (1 / trials[nine]).sum(axis=1)
    assert np.allclose(harmonic, trials["model_utility"])
    assert np.allclose(10.0 ** trials["log10_forget_quality"], trials["forget_quality"])


def test_controls_are_scored(result):
    controls = result.controls
    moved = result.front[result.front["alpha"] != 0]
    counts = controls["kind"].value_counts().to_dict()
    randoms = counts.pop("random_direction", 0)
    # The initial and the retain model are held out too.
    assert (counts.pop("held_out"), counts.pop("matched_scale")) == (len(result.front) + 2, len(result.front))
    assert counts == CONTROLS
    assert randoms == len(moved) > 0
    mirrors = controls[controls["kind"] == "random_direction"].set_index("of_trial")
    for row in moved.to_dict("records"):
        mirror = mirrors.loc[row["trial"]]
        assert (mirror["base"], mirror["epoch"], mirror["alpha"]) == (row["base"], row["epoch"], row["alpha"])
        assert mirror["update_norm"] == pytest.approx(row["update_norm"], rel=1e-5)
    assert set(controls.loc[controls["kind"] == "next_epoch", "epoch"]) == {3}
    temperature = controls[controls["kind"] == "temperature"].iloc[0]
    assert (temperature["temperature"], temperature["logit_scale"]) == (0.67, pytest.approx(1 / 0.67, rel=1e-4))
    initial, retain = result.control("initial"), result.control("retain")
    assert initial["logit_scale"] == 1.0
    assert (retain["forget_quality"], retain["ks_statistic"]) == (1.0, 0.0)


def test_optuna_sees_the_same_front(result):
    assert result.study.metric_names == list(OBJECTIVES)
    assert [direction.name for direction in result.study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert {trial.number for trial in result.study.best_trials} == set(result.front["trial"])
    assert result.store.controls.metric_names == list(OBJECTIVES)


def test_flags_are_for_utility_above_both_references(result):
    best = max(result.control("initial")["model_utility"], result.control("retain")["model_utility"])
    assert list(result.trials["flagged"]) == list(result.trials["model_utility"] > best)


def test_points_at_alpha_zero_are_the_unlearned_models_themselves(result, preparation):
    folder = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
    rows = preparation.split.select
    corpus = take_items(preparation.corpus, rows)
    reference = read_log(result.out / "logs" / "retain.json").take(rows, corpus.set_hashes)
    for run in preparation.spec.variants():
        loaded = preparation.models.source("initial", str(folder)).load()
        scorer = Scorer(corpus, loaded.prompts, preparation.scoring)
        for epoch in train_base_run(loaded, preparation.corpus, preparation.unlearning(run)):
            if epoch.epoch > preparation.spec.unlearning.epochs:
                break
            metrics = evaluate(scorer.score(loaded), reference, "tofu")
            rows = result.trials.query("base == @run.label and epoch == @epoch.epoch and alpha == 0")
            assert len(rows) == 1
            assert rows["model_utility"].item() == pytest.approx(metrics.model_utility, abs=1e-9)
            assert rows["forget_quality"].item() == pytest.approx(metrics.forget_quality.p_value, abs=1e-9)


def test_everything_written_is_in_the_output_folder_or_the_caches(finished, place):
    assert finished.strays == []
    assert {path.name.partition("-")[0] for path in finished.cwd.iterdir()} == {"stdout", "stderr"}
    assert {path.name for path in place["cache"].iterdir()} == {"models", "deltas"}
    visible = {path.name for path in finished.out.iterdir() if not path.name.startswith(".")}
    # SQLite's own files lie beside the database as long as somebody reads it.
    visible -= {"study.db-wal", "study.db-shm"}
    assert visible == {"study.json", "study.db", "gram.npz", "items", "logs", "ray", "report"}


def test_the_same_command_does_nothing_again(finished, call, place):
    sessions, caches = ray_sessions(finished.out), files_below(place["cache"])
    code, output, error = call("run", finished.file, "--out", finished.out, "--json")
    assert code == 0
    assert "starting Ray" not in error
    assert json.loads(output) == json.loads(finished.stdout)
    assert ray_sessions(finished.out) == sessions
    assert files_below(place["cache"]) == caches


@pytest.mark.slow
def test_more_trials_extend_a_moved_study_by_exactly_those(finished, copied, write_study, call, place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(copied.parent))  # too long for Ray's sockets
    file = write_study(copied.parent / "again.yaml", resources={"max_concurrent": 1})
    deltas = files_below(place["cache"] / "deltas")
    before = StudyResult.open(finished.out).trials.set_index("trial")
    code, output, error = call("run", file, "--out", copied, "--trials", 7, "--json")
    assert code == 0, error
    assert json.loads(output)["trials"]["complete"] == GIVEN + 7
    extended = StudyResult.open(copied)
    after = extended.trials.set_index("trial")
    assert after.index.tolist() == list(range(GIVEN + 7))
    for name in (*OBJECTIVES, "alpha", "epoch", "base", "seconds"):
        assert after[name].loc[before.index].tolist() == before[name].tolist()
    assert len(after[["base", "epoch", "alpha"]].drop_duplicates()) == GIVEN + 7
    moved = extended.front[extended.front["alpha"] != 0]
    mirrored = extended.controls.loc[extended.controls["kind"] == "random_direction", "of_trial"]
    assert set(moved["trial"]) <= set(mirrored)
    assert not mirrored.duplicated().any()
    assert {path: time for path, time in files_below(place["cache"] / "deltas").items() if "lock" not in path} == {
        path: time for path, time in deltas.items() if "lock" not in path
    }
    assert len(StudyResult.open(finished.out).trials) == GIVEN + 5
    assert "unlearning:" not in error


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"unlearning": {"learning_rate": 0.003}}, "unlearning"),
        ({"search": {"alpha": {"low": 0}, "trials": 6}}, "search"),
        ({"corpus": {"forget_people": 3}, "name": "other"}, "name, corpus"),
    ],
)
def test_another_study_is_refused_by_what_differs(finished, write_study, call, tmp_path, changes, named):
    before = (finished.out / "study.json").read_bytes()
    code, _, error = call("run", write_study(tmp_path / "other.yaml", **changes), "--out", finished.out)
    assert code == 2
    assert f"differ in {named};" in error
    assert "--out" in error
    assert (finished.out / "study.json").read_bytes() == before


def test_another_seed_on_the_command_line_is_refused(finished, call):
    code, _, error = call("run", finished.file, "--out", finished.out, "--seed", 1, "--trials", 9)
    assert code == 2
    assert "differ in seed;" in error


def test_other_resources_are_the_same_study(finished, write_study, call, tmp_path):
    file = write_study(
        tmp_path / "other.yaml",
        resources={"max_concurrent": 1, "trial": {"threads": 2}, "base_run": {"threads": 2}},
        search={"trials": 3},
    )
    code, output, error = call("run", file, "--out", finished.out, "--json")
    assert code == 0
    assert "starting Ray" not in error
    assert json.loads(output)["trials"]["complete"] == GIVEN + 5


def test_a_folder_in_use_by_another_driver_is_refused(finished, copied, preparation, call):
    store = StudyStore.create(copied, preparation.spec, preparation.fingerprint, preparation.facts())
    try:
        code, _, error = call("run", finished.file, "--out", copied)
    finally:
        store.close()
    assert code == 2
    assert "under way" in error


def test_a_place_that_cannot_be_written_is_refused(finished, call, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, error = call("run", finished.file, "--out", out)
        assert code == 2
        assert str(out) in error and "--out" in error


def test_a_folder_with_other_things_is_refused(finished, call, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    code, _, error = call("run", finished.file, "--out", tmp_path)
    assert code == 2
    assert "not empty" in error
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["thesis.tex"]


def test_a_cache_that_cannot_be_written_is_refused_by_name(write_study, call, tmp_path):
    (tmp_path / "file").write_text("")
    file = write_study(tmp_path / "s.yaml", cache={"models": str(tmp_path / "file" / "models")}, seed=5)
    code, _, error = call("run", file, "--out", tmp_path / "out")
    assert code == 2
    assert "cache" in error and str(tmp_path / "file") in error


@pytest.fixture(scope="module")
def adapted(finished, write_study, tmp_path_factory):
    """A study of LoRA adapters on the models of the shared one, from Python, in a folder with a long and awkward name."""
    import search

    folder = tmp_path_factory.mktemp("long") / ("a folder, 100% #1? " + "x" * 100)
    changes = {"adapter": {"rank": 4, "alpha": 8}, "methods": {"npo": {"beta": 1}}, "epochs": 1, "learning_rate": 0.01}
    scoring = {"temperatures": []}
    file = write_study(folder / "lora.yaml", name="lora", unlearning=changes, scoring=scoring, search={"trials": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLCONFIGDIR", raising=False)
        return search.run_study(search.load_study(file), folder / "out", quiet=True)


@pytest.mark.slow
def test_adapters_are_searched_as_low_rank_updates(adapted):
    assert adapted.store.counts() == {"complete": 5, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    from search.evaluation.prepared import prepare

    preparation = prepare(adapted.spec)
    found = DeltaStore(preparation.delta_root).find(
        preparation.base_run_inputs(preparation.unlearning(adapted.spec.variants()[0]))
    )
    update = found.load(1)
    assert update.kind == "low_rank"
    assert all(".lora_" in name for name in update.tensors)
    # The sampler that knows the line had the geometry of the merged update, which nobody ever made.
    with np.load(adapted.out / "gram.npz") as kept:
        assert kept["gram"] == pytest.approx(np.array([[update.norm**2]]), rel=1e-5)
    assert adapted.trials["model_utility"].nunique() > 1
    assert "temperature" not in set(adapted.controls["kind"])


@pytest.mark.slow
def test_a_long_path_with_odd_characters_holds_the_whole_study(adapted):
    assert len(str(adapted.out)) > 107
    assert (adapted.out / "study.db").is_file()
    assert adapted.report_path.is_file()
    reopened = StudyResult.open(adapted.out)
    assert reopened.summary() == adapted.summary()
    assert re.search(r"out/study\.db", adapted.store.record.storage)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "model"])
def test_adapter_studies_export_both_forms(adapted, tmp_path, form):
    row = adapted.trials[adapted.trials["alpha"] > 0].iloc[0]
    folder = adapted.export(row, tmp_path / form, form)
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "README.md", "tokenizer.json"} <= names
    assert ("adapter_model.safetensors" in names) == (form == "adapter")
    assert ("model.safetensors" in names) == (form == "model")


@pytest.mark.slow
def test_ray_has_left_this_process(adapted):
    import ray

    assert not ray.is_initialized()


def test_given_points_are_every_epoch_of_every_base_run(result):
    zero = result.trials[result.trials["alpha"] == 0]
    places = {(row["base"], row["epoch"]) for row in zero.to_dict("records")}
    assert places == {(point.base, point.epoch) for point in result.spec.given_points()}
    assert all(math.isfinite(value) for value in result.gain.values())
