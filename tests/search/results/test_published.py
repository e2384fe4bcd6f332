"""Published numbers next to a study's: what matches what, and files that are wrong."""

import pytest

from search.problem.trial import TrialSpec
from search.results.published import compare, read_published
from search.results.study_result import StudyResult
from uipe_core.errors import UserError

HEAD = "name,model,source,forget_quality,model_utility\n"


@pytest.fixture
def result(new_store, made_up_evidence):
    """A study of three trials, of which one has collapsed."""
    store = new_store()

    def score(job, forgetting, utility, **more):
        if job.is_control:
            number = store.ask_control(job)
        else:
            place = {"base": job.base, "epoch": job.epoch, "alpha": job.alpha}
            number, _ = store.ask_point(store.spec.search_space(), place, job.kind)
        store.complete(job, number, made_up_evidence(job, forgetting, utility, **more))

    score(TrialSpec("initial", model="initial"), -9.0, 0.8)
    score(TrialSpec("alpha_zero", "npo", 1, 0.0), -3.0, 0.6)
    score(TrialSpec("search", "npo", 1, 1.0), -0.1, 0.4)
    score(TrialSpec("search", "npo", 1, 1.5), -0.1, 0.79, collapsed="empty answers")
    return StudyResult.of(store)


@pytest.fixture
def write(tmp_path):
    def make(text):
        (tmp_path / "published.csv").write_text(text)
        return tmp_path / "published.csv"

    return make


def rows(result, path):
    return {row["name"]: row for row in compare(result, path)["models"]}


def test_a_model_is_matched_by_a_trial_as_good_in_both_objectives(result, write):
    found = rows(result, write(f"{HEAD}a,unlearned,x,1e-3,0.6\nb,unlearned,x,1e-3,0.61\nc,unlearned,x,1e-4,0.5\n"))
    assert [found[name]["matched"] for name in "abc"] == [True, False, True]
    # Of the trials that match, the one of most utility; of those that do not, the nearest.
    assert all(row["ours"]["trial"] == 0 for row in found.values())


def test_above_the_noise_ceiling_more_counts_for_nothing_and_collapsed_trials_match_nothing(result, write):
    found = rows(result, write(f"{HEAD}a,unlearned,x,0.999,0.4\nb,unlearned,x,0.999,0.41\n"))
    assert found["a"]["matched"] and found["a"]["ours"]["trial"] == 1
    assert not found["b"]["matched"] and found["b"]["ours"]["trial"] == 1


def test_reference_models_are_set_next_to_those_of_the_study(result, write):
    text = f"{HEAD}# a comment\nfull,initial,x,1e-9,0.8\nideal,retain,x,1,0.8\npart,unlearned,x,,0.5\n"
    answer = compare(result, write(text))
    full, ideal, part = answer["models"]
    assert full["ours"]["numbers"] == {"log10_forget_quality": -9.0, "model_utility": 0.8} and full["matched"] is None
    assert ideal["ours"] is None and part["ours"] is None and part["matched"] is None
    assert (answer["published"], answer["matched"]) == (0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no published numbers"),
        (HEAD, "no published numbers"),
        ("name,model\na,unlearned\n", "line 1: no column 'source'"),
        ("name,model,source,model_utilty\na,unlearned,x,1\n", "no number 'model_utilty'.*Did you mean 'model_utility'"),
        ("name,model,source,epoch\na,unlearned,x,1\n", "no number 'epoch'"),
        ("name,name,model,source\na,a,unlearned,x\n", "columns given twice: name"),
        (f"{HEAD}a,unlearned,x,0.1\n", "line 2: 4 cells, and 5 columns"),
        (f"{HEAD}a,other,x,0.1,0.5\n", "line 2: model 'other' is unknown; give unlearned, initial, retain"),
        (f"{HEAD}a,unlearned,x,much,0.5\n", "line 2: forget_quality: 'much' is no number"),
        (f"{HEAD}a,unlearned,x,0,0.5\n", "line 2: forget_quality: 0 is no p-value above 0"),
        (f"{HEAD}a,unlearned,x,0.1,nan\n", "line 2: model_utility: nan is no finite number"),
        ("\x00\xff,x\n1,2\n", "no column 'name'"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(write, text, said):
    with pytest.raises(UserError, match=said):
        read_published(write(text), ["log10_forget_quality", "model_utility"])


def test_all_that_is_wrong_is_told_at_once(write):
    with pytest.raises(UserError, match=r"(?s)line 2: .*line 3: "):
        read_published(write(f"{HEAD}a,other,x,0.1,0.5\nb,unlearned,x,2,0.5\n"), ["model_utility"])
