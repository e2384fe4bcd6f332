"""Studies that begin from the fronts of earlier ones: what is taken over, what is told of, what is refused."""

import pytest

from search.evaluation.inputs import check_inputs, earlier_fronts
from search.problem.space import Point
from search.spec.errors import StudyFileError
from search.spec.study import parse_study
from uipe_core.errors import UserError


@pytest.fixture
def earlier(new_store, made_up_evidence, tmp_path):
    """Writes a study with trials of the given (base, epoch, alpha, log10 forget quality, utility); returns its folder."""

    def make(name, points, **changes):
        store = new_store(tmp_path / name, name=name, **changes)
        for base, epoch, alpha, quality, utility in points:
            number, job = store.ask_point(store.spec.search_space(), Point(base, epoch, alpha).params)
            extra = {"related_log10_forget_quality": -1.0} if store.spec.search.third_objective else {}
            assert store.complete(job, number, made_up_evidence(job, quality, utility, **extra)) is None
        store.close()
        return store.out

    return make


def begin(write_study, tmp_path, *folders, **changes):
    from search.spec.study import load_study

    return load_study(write_study(tmp_path / "new" / "study.yaml", warm_start=[str(folder) for folder in folders], **changes))


def test_the_front_is_taken_over_and_nothing_else(earlier, write_study, tmp_path):
    first = earlier("first", [("npo", 1, 0.5, -1.0, 0.5), ("npo", 2, 1.5, -2.0, 0.4), ("grad_diff", 2, -0.5, -5.0, 0.9)])
    second = earlier("second", [("npo", 1, 0.5, -1.0, 0.5), ("npo", 1, 0.7, -0.5, 0.2)])
    found = earlier_fronts(begin(write_study, tmp_path, first, second))
    assert found.points == (Point("npo", 1, 0.5), Point("grad_diff", 2, -0.5), Point("npo", 1, 0.7))
    assert [point.warm_start for point in found.points] == ["first", "first", "second"]
    assert found.notes == ()


def test_points_this_study_does_not_have_are_told_of(earlier, write_study, tmp_path):
    points = [("npo", 1, 0.5, -1.0, 0.5), ("npo", 2, 0.25, -2.0, 0.6), ("grad_diff", 1, -0.5, -3.0, 0.7)]
    points += [("npo", 1, 1.5, -0.5, 0.4), ("npo", 1, 0.0, -9.0, 0.9)]
    spec = begin(
        write_study,
        tmp_path,
        earlier("first", points),
        unlearning={"methods": {"npo": {"beta": 1}}, "epochs": 1},
        search={"alpha": {"low": -1, "high": 1}},
    )
    found = earlier_fronts(spec)
    assert found.points == (Point("npo", 1, 0.5),)
    told = "\n".join(found.notes)
    assert len(found.notes) == 4
    for words in (
        "npo, epoch 2, alpha 0.25 of first is left out: npo has 1 epochs here",
        "grad_diff, epoch 1, alpha -0.5 of first is left out: this study has no base run grad_diff (it has npo)",
        "npo, epoch 1, alpha 1.5 of first is left out: search.alpha goes from -1 to 1",
        "npo, epoch 1, alpha 0 of first is left out: it is scored anyway",
    ):
        assert words in told
    assert set(found.notes) <= set(check_inputs(spec))


def test_studies_with_other_objectives_are_refused(earlier, write_study, tmp_path):
    three = earlier("three", [("npo", 1, 0.5, -1.0, 0.5)], search={"third_objective": "related_log10_forget_quality"})
    with pytest.raises(
        UserError, match=r"warm_start\[0\].*maximises .*related_log10_forget_quality, this one .*same objectives"
    ):
        earlier_fronts(begin(write_study, tmp_path, three))


def test_folders_without_a_study_or_a_trial_are_refused(earlier, write_study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"warm_start\[1\]: .*empty: not a study folder"):
        earlier_fronts(begin(write_study, tmp_path, earlier("some", [("npo", 1, 0.5, -1.0, 0.5)]), tmp_path / "empty"))
    with pytest.raises(UserError, match=r"warm_start\[0\]: .*no trial of this study is complete.*remove it"):
        earlier_fronts(begin(write_study, tmp_path, earlier("none", [])))
    with pytest.raises(StudyFileError, match=r"warm_start\[0\].*there is no folder"):
        begin(write_study, tmp_path, tmp_path / "nowhere")


def test_it_is_no_part_of_what_a_study_is(earlier, write_study, tmp_path):
    spec = begin(write_study, tmp_path, earlier("first", [("npo", 1, 0.5, -1.0, 0.5)]))
    plain = parse_study({**spec.model_dump(mode="json"), "warm_start": []})
    assert spec.fingerprint_payload() == plain.fingerprint_payload()
