"""The objective privacy: scored in every trial of a study, modelled by `line`, resampled, and refused without holdout items."""

import numpy as np
import pytest

import search
from search.results.study_result import StudyResult
from search.spec.study import load_study
from uipe_core.errors import UserError
from uipe_core.metrics.composites import auc, privacy
from uipe_core.metrics.uncertainty import group_weights


@pytest.fixture(scope="module")
def chosen(place, finished, write_study, tmp_path_factory):
    """A study that maximises privacy too; its models are those of the tiny study."""
    folder = tmp_path_factory.mktemp("privacy")
    # Stronger unlearning than the tiny study's, after which members still look like members.
    changes = {"objectives": {"third": "privacy"}, "search": {"trials": 3, "sampler": "line"}}
    changes["unlearning"] = {"learning_rate": 0.01}
    spec = load_study(write_study(folder / "study.yaml", **changes))
    return search.run_study(spec, folder / "out", quiet=True)


def min_k(result, number, control=False):
    items = result.store.items(int(number), control=control)
    return items["forget/min_k"], items["holdout/min_k"]


@pytest.mark.slow
def test_every_trial_and_control_has_it_against_the_retain_model(chosen):
    result = chosen
    retain = result.control("retain")
    reference = auc(*min_k(result, retain["trial"], True))
    assert retain["membership_auc"] == pytest.approx(reference) and retain["privacy"] == 1.0
    for row in result.trials.to_dict("records"):
        own = auc(*min_k(result, row["trial"]))
        assert row["membership_auc"] == pytest.approx(own)
        assert row["privacy"] == pytest.approx(float(privacy(own, reference)))
    initial = result.control("initial")
    assert initial["privacy"] < 0.2 < result.trials["privacy"].max()
    assert not [trial for trial in result.store.trials(controls=True) if trial.state.name == "FAIL"]
    assert not {kind for kind in ("retain", "other_retain") if result.control(kind) is None}


@pytest.mark.slow
def test_an_audit_finds_the_same_auc(chosen):
    result = chosen
    number = int(result.trials["trial"].iloc[0])
    audited = search.audit_study(result.out, [number], tests=("membership",), quiet=True)
    rows = audited.controls[(audited.controls["kind"] == "membership") & (audited.controls["of_trial"] == number)]
    assert float(rows["min_k_auc"].iloc[0]) == pytest.approx(result.trial(number)["membership_auc"], abs=1e-9)


@pytest.mark.slow
def test_line_models_it_and_intervals_resample_it(chosen, monkeypatch):
    from search.evaluation.task import TASKS
    from search.results import uncertainty

    result = chosen
    monkeypatch.setattr(uncertainty, "FEW_GROUPS", 1)  # two people to forget
    sure = uncertainty.certainty(result.store, result.trials, result.controls).set_index("trial")
    for row in result.trials.to_dict("records"):
        low, high = (sure.loc[row["trial"], f"privacy_{end}"] for end in ("low", "high"))
        assert 0 <= low <= high <= 1
    trial, retain = result.trials.iloc[0], result.control("retain")
    groups = result.store.record.corpus.groups
    weights = {name: group_weights(groups[name], 0) for name in groups}
    arrays, reference = result.store.items(int(trial["trial"])), result.store.items(int(retain["trial"]), control=True)
    drawn = TASKS["free_text"].draws(arrays, weights, reference, result.objectives, "tofu")
    assert drawn.shape[1] == 3
    members, others = arrays["forget/min_k"], arrays["holdout/min_k"]
    one = [np.repeat(values, weights[name][0].astype(int)) for name, values in (("forget", members), ("holdout", others))]
    theirs = [np.repeat(reference[f"{name}/min_k"], weights[name][0].astype(int)) for name in ("forget", "holdout")]
    assert drawn[0, 2] == pytest.approx(float(privacy(auc(*one), auc(*theirs))))


@pytest.mark.slow
def test_line_proposed_what_was_searched(chosen, preparation):
    """It says nothing of an objective that it cannot model, and its curves give every trial's numbers back."""
    from search.samplers.outcomes import OutcomeModel

    result = chosen
    reference = result.store.items(int(result.control("retain")["trial"]), control=True)
    curves = OutcomeModel("tofu", result.objectives, reference)
    for row in result.trials.to_dict("records"):
        found = curves.objectives(curves.of(result.store.items(int(row["trial"]))))
        assert found[2] == pytest.approx(row["privacy"], abs=1e-9)
    assert (result.out / "gram.npz").is_file()
    # The models are those of the study without it: only what is scored is more.
    assert result.store.record.models["initial"] == preparation.models.identities["initial"]
    assert result.store.record.corpus.hash != preparation.corpus.hash


@pytest.mark.slow
def test_an_export_has_the_trials_numbers(chosen):
    result = chosen
    folder = result.export(result.trials.iloc[0], result.out / "exported", "model")
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("corpus", "lacking"),
    [
        ({"kind": "people", "forget_people": 200, "retain_people": 100, "pretraining_people": 60}, "holdout"),
        ({"kind": "tofu", "source": "locuslab/TOFU"}, "holdout"),
    ],
)
def test_a_corpus_without_holdout_items_is_refused(write_study, tmp_path, corpus, lacking):
    model = {"base": None} if corpus["kind"] == "tofu" else {}
    path = write_study(tmp_path / "study.yaml", corpus=corpus, objectives={"third": "privacy"}, model=model)
    with pytest.raises(UserError, match=r"objectives\.third.*privacy") as error:
        load_study(path)
    assert lacking in str(error.value)


@pytest.mark.slow
def test_an_open_study_reads_it(chosen):
    assert "privacy" in StudyResult.open(chosen.out).front.columns
