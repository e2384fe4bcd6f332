"""Studies next to each other and to published numbers: what matches what, and files that are wrong."""

import pytest

from search.problem.trial import TrialSpec
from search.results.comparison import compare_published, compare_studies, read_published
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
    return {row["name"]: row for row in compare_published(result, path)["models"]}


def test_a_model_is_matched_by_a_trial_as_good_in_both_objectives(result, write):
    found = rows(result, write(f"{HEAD}a,unlearned,x,1e-3,0.6\nb,unlearned,x,1e-3,0.61\nc,unlearned,x,1e-4,0.5\n"))
    assert [found[name]["matched"] for name in "abc"] == [True, False, True]
    # Of the trials that match, the one of most utility; of those that do not, the nearest.
    assert all(row["ours"]["trial"] == 0 for row in found.values())


def test_above_the_noise_ceiling_more_counts_for_nothing_and_collapsed_trials_match_nothing(result, write):
    found = rows(result, write(f"{HEAD}a,unlearned,x,0.999,0.4\nb,unlearned,x,0.999,0.41\n"))
    assert found["a"]["matched"] and found["a"]["ours"]["trial"] == 1
    assert not found["b"]["matched"] and found["b"]["ours"]["trial"] == 1


def test_a_line_of_the_studys_own_definition_counts(result, write):
    head = "name,model,source,definition,forget_quality,model_utility\n"
    found = rows(result, write(f"{head}a,unlearned,x,tofu,1e-3,0.6\nb,unlearned,x,,1e-3,0.6\n"))
    assert [found[name]["matched"] for name in "ab"] == [True, True]


def test_reference_models_are_set_next_to_those_of_the_study(result, write):
    text = f"{HEAD}# a comment\nfull,initial,x,1e-9,0.8\nideal,retain,x,1,0.8\npart,unlearned,x,,0.5\n"
    answer = compare_published(result, write(text))
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
        (
            "name,model,source,definition,model_utility\na,unlearned,x,open-unlearning,0.5\n",
            "line 2: definition 'open-unlearning': the study's numbers are those of 'tofu'; run it with scoring.definition",
        ),
        ("\x00\xff,x\n1,2\n", "no column 'name'"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(write, text, said):
    with pytest.raises(UserError, match=said):
        read_published(write(text), ["log10_forget_quality", "model_utility"], "tofu")


def test_all_that_is_wrong_is_told_at_once(write):
    with pytest.raises(UserError, match=r"(?s)line 2: .*line 3: "):
        read_published(write(f"{HEAD}a,other,x,0.1,0.5\nb,unlearned,x,2,0.5\n"), ["model_utility"], "tofu")


@pytest.fixture
def studies(new_store, made_up_evidence, tmp_path):
    """Two studies of the same world: one forgets more, the other keeps more."""

    def make(name, points, **changes):
        store = new_store(tmp_path / name, name=name, **changes)
        number = store.ask_control(job := TrialSpec("initial", model="initial"))
        store.complete(job, number, made_up_evidence(job, -7.0, 0.8, memorization_score=0.1))
        for epoch, (forgetting, utility) in enumerate(points, 1):
            job = TrialSpec("alpha_zero" if epoch == 1 else "search", "npo", epoch, 0.0 if epoch == 1 else 0.5)
            place = {"base": "npo", "epoch": epoch, "alpha": job.alpha}
            number, _ = store.ask_point(store.spec.search_space(), place, job.kind)
            store.complete(job, number, made_up_evidence(job, forgetting, utility, memorization_score=0.5))
        return StudyResult.of(store)

    return make


def test_studies_are_compared_on_a_common_reference_point(studies):
    first, second = studies("first", [(-6.0, 0.7), (-2.0, 0.5)]), studies("second", [(-5.0, 0.6), (-3.0, 0.7)])
    found = compare_studies([first, second])
    one, other = found["studies"]
    # By hand, from the lowest log10 forget quality and 0: the initial model at (-7, 0.8), and the steps of the front.
    start = (-7 - found["reference_point"]["log10_forget_quality"]) * 0.8
    assert one["hypervolume"] == pytest.approx(start + 1 * 0.7 + 4 * 0.5)
    assert one["given"] == pytest.approx(start + 1 * 0.7)
    assert other["hypervolume"] == pytest.approx(start + 4 * 0.7)
    # (-6, 0.7) is beaten by the second study's (-3, 0.7); (-5, 0.6) is on no front.
    assert [point["joint"] for point in one["points"]] == [True, False] and (one["joint"], other["joint"]) == (1, 1)
    assert len(other["points"]) == 1 and found["notes"] == []


def test_studies_of_other_objectives_or_definitions_are_refused(studies):
    first = studies("first", [(-6.0, 0.7)])
    with pytest.raises(UserError, match="its numbers are defined as open-unlearning has them"):
        compare_studies([first, studies("second", [(-5.0, 0.6)], scoring={"definition": "open-unlearning"})])
    changes = {"objectives": {"forgetting": "memorization", "utility": "model_utility"}}
    with pytest.raises(UserError, match=r"third: its objectives are memorization_score and model_utility"):
        compare_studies([first, studies("third", [(-5.0, 0.6)], **changes)])


def test_other_items_or_models_are_noted(studies):
    first, second = studies("first", [(-6.0, 0.7)]), studies("second", [(-5.0, 0.6)])
    second.store.record.corpus.sets["forget"] = "other"
    assert "scores other items" in compare_studies([first, second])["notes"][0]
    second.store.record.corpus.sets.clear()
    second.store.record.models["initial"] = "other"
    assert "starts from another initial model" in compare_studies([first, second])["notes"][0]


def test_the_command_compares_draws_and_explains(studies, call, tmp_path):
    outs = [studies(name, [(-6.0, 0.7), (-2.0, 0.5)]).out for name in ("first", "second")]
    code, output, error = call("compare", *outs, "--picture", tmp_path / "fronts.png")
    assert code == 0, error
    assert "hypervolume: from" in output and (tmp_path / "fronts.png").stat().st_size > 10_000
    for arguments, said in (
        ([outs[0]], "give two studies or more"),
        ([*outs, "--picture", tmp_path / "fronts.gif"], "give .png, .svg, .pdf"),
        ([*outs, "--picture", tmp_path / "none" / "fronts.png"], "No such file or directory"),
        ([outs[0], tmp_path / "nowhere"], "nowhere"),
    ):
        code, output, error = call("compare", *arguments)
        assert (code, output) == (2, "") and said in error
