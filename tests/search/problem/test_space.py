"""The search space of a study, its given points, and the samplers."""

from itertools import pairwise

import optuna
import pytest

from search.problem.space import Point, own_alpha, sampled_alpha
from search.problem.trial import TrialSpec
from search.samplers.registry import SAMPLERS
from search.spec.errors import StudyFileError
from search.spec.study import StudySpec, parse_study


def study(low: float = -1, high: float = 2, methods: object = None, **search: object) -> StudySpec:
    stage = {"epochs": 1, "learning_rate": 0.01, "batch_size": 8}
    return parse_study(
        {
            "schema_version": 1,
            "name": "test",
            "corpus": {"kind": "people"},
            "model": {"kind": "tiny", "base": stage, "finetune": stage},
            "unlearning": {
                "methods": methods or {"npo": {"beta": [0.1, 1]}, "grad_ascent": {}},
                "epochs": 3,
                "learning_rate": 0.01,
            },
            "search": {"alpha": {"low": low, "high": high}, **search},
        }
    )


def test_space_is_flat() -> None:
    space = study().search_space()
    assert space == {
        "base": optuna.distributions.CategoricalDistribution(["grad_ascent", "npo[beta=0.1]", "npo[beta=1]"]),
        "epoch": optuna.distributions.IntDistribution(1, 3),
        "alpha": optuna.distributions.FloatDistribution(-1, 2),
    }


@pytest.mark.parametrize(("low", "high", "count"), [(-1, 2, 9), (0, 2, 9), (-1, 0, 9), (0.5, 2, 0), (-1, -0.5, 0)])
def test_given_points_are_every_epoch_where_alpha_reaches_zero(low: float, high: float, count: int) -> None:
    points = study(low, high).given_points()
    assert len(set(points)) == len(points) == count
    assert all(point.alpha == 0 and 1 <= point.epoch <= 3 for point in points)


def ranged(**search: object) -> StudySpec:
    ranges = {"task_vector": {"low": -0.5, "high": 7.3}}
    return study(methods={"npo": {}, "task_vector": {}}, alpha_by_method=ranges, **search)


def test_a_method_has_its_own_range_of_alpha_in_the_same_flat_space() -> None:
    spec = ranged()
    assert spec.alpha_ranges() == {"npo": (-1.0, 2.0), "task_vector": (-0.5, 7.3)}
    assert spec.search_space()["alpha"] == optuna.distributions.FloatDistribution(-1, 2)
    assert (spec.range_key("npo"), spec.range_key("task_vector")) == ("search.alpha", "search.alpha_by_method.task_vector")
    assert {point.alpha for point in spec.given_points()} == {0.0} and len(spec.given_points()) == 6
    grid = ranged(sampler="grid", trials=6 * 4).grid_points()
    assert [point.alpha for point in grid if (point.base, point.epoch) == ("task_vector", 1)] == [-0.5, 2.1, 4.7, 7.3]
    assert {point.alpha for point in grid if point.base == "npo"} == {-1.0, 1.0, 2.0}


@pytest.mark.parametrize("own", [(-1.0, 2.0), (-0.5, 7.3), (0.25, 0.75), (-1.0, 1000.0)])
def test_the_sampled_range_is_stretched_onto_a_base_runs_own(own: tuple[float, float]) -> None:
    whole = (-1.0, 2.0)
    assert (own_alpha(-1.0, whole, own), own_alpha(2.0, whole, own)) == own
    for step in range(101):
        alpha = own[0] + (own[1] - own[0]) * step / 100
        sampled = sampled_alpha(alpha, whole, own)
        assert whole[0] <= sampled <= whole[1]
        assert own_alpha(sampled, whole, own) == pytest.approx(alpha, abs=1e-8)
        assert own[0] <= own_alpha(sampled, whole, own) <= own[1]
    assert own != whole or own_alpha(0.1 + 0.2, whole, own) == 0.1 + 0.2  # untouched, to the last digit


@pytest.mark.parametrize(
    ("alpha", "walk"),
    [
        (-1, "initial model"),
        (-0.999, "interpolation"),
        (-1e-12, "interpolation"),
        (0, "unlearned epoch"),
        (-0.0, "unlearned epoch"),
        (1e-12, "extrapolation"),
    ],
)
def test_walk(alpha: float, walk: str) -> None:
    assert Point("npo", 1, alpha).walk == walk


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_propose_within_the_space_and_repeat_by_seed(name: str) -> None:
    spec = study()
    runs = []
    for _ in range(2):
        optimisation = optuna.create_study(directions=["maximize"] * 2, sampler=SAMPLERS[name].make(0))
        for point in spec.given_points():
            optimisation.enqueue_trial(point.params)
        for _ in range(12):
            trial = optimisation.ask(spec.search_space())
            optimisation.tell(trial, [trial.params["alpha"], -(trial.params["alpha"] ** 2)])
        runs.append([trial.params for trial in optimisation.trials])
    assert runs[0] == runs[1]
    assert [Point(**params) for params in runs[0][:9]] == spec.given_points()
    assert all(-1 <= params["alpha"] <= 2 for params in runs[0])


def test_a_grid_is_every_epoch_at_evenly_spaced_alphas_and_zero_only_once() -> None:
    points = study(-1, 2, sampler="grid", trials=9 * 4 + 8).grid_points()
    assert sorted({point.alpha for point in points}) == [-1.0, 1.0, 2.0]
    assert len(points) == len(set(points)) == 9 * 3
    assert {(point.base, point.epoch) for point in points} == {(point.base, point.epoch) for point in study().given_points()}


def test_a_grid_stays_within_its_range_and_fits_the_space() -> None:
    spec = study(-0.1, 0.7, sampler="grid", trials=9 * 13)
    alphas = sorted({point.alpha for point in spec.grid_points()})
    assert (alphas[0], alphas[-1], len(alphas)) == (-0.1, 0.7, 13)
    assert len({round(second - first, 6) for first, second in pairwise(alphas)}) == 1


def test_a_grid_with_too_few_trials_is_refused_with_how_many_it_takes() -> None:
    assert len(study(sampler="grid", trials=18).grid_points()) == 18
    with pytest.raises(StudyFileError, match=r"search\.trials") as caught:
        study(sampler="grid", trials=17)
    assert "9 base epochs" in str(caught.value) and "at least 18 trials" in str(caught.value)


def test_a_base_run_trained_again_is_named_after_its_own_seed_alone():
    names = {
        TrialSpec("confirm", base, 1, 0.0, seed=seed).run
        for base, seed in (("npo", 5), ("npo@0", 5), ("npo@1", 5), ("npo", None))
    }
    assert names == {"npo@5", "npo"}
