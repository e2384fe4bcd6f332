"""The Gaussian process over weight space: closed forms, symmetries, what is missing, and what is under way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.samplers import gaussian_process as line_model
from search.samplers import kernels as line_kernel
from search.samplers.gaussian_process import ERRORS, MultiOutputGP
from search.samplers.kernels import Geometry, Kernel, Points, choose, fit

KERNEL = Kernel(constant=2.0, linear=3.0, quadratic=0.5, length=0.8)
SETTINGS = ("constant", "linear", "quadratic", "length")
UNITS = {"still": 0.01, "loud": 1.0}
LOSS = {"loss": 0.0}
"""Of a group that errors of losses do not move: it is trusted."""


def vectors(seed=0, count=5, width=12):
    return np.random.default_rng(seed).normal(size=(count, width)) / np.sqrt(width)


def places(seed=1, count=9, of=5):
    generator = np.random.default_rng(seed)
    return Points(generator.integers(0, of, count), np.append(0.0, generator.uniform(0.1, 3.0, count - 1)))


def by_hand(weights, kernel):
    """Covariances of the points' weights themselves, without a Gram matrix."""
    unit = np.median((weights**2).sum(axis=1))

    def covariance(a, b):
        inner = a @ b.T / unit
        distance = np.linalg.norm(a[:, None] - b[None], axis=2) / np.sqrt(unit) / kernel.length
        root = np.sqrt(5) * distance
        matern = (1 + root + root**2 / 3) * np.exp(-root)
        return kernel.constant + kernel.linear * inner + kernel.quadratic * inner**2 + matern

    return covariance


def test_means_and_deviations_are_those_of_the_textbook():
    weights, known, asked = vectors(), places(), places(2, 4)
    values = np.random.default_rng(3).normal(size=(9, 6))
    model = MultiOutputGP(Geometry(weights @ weights.T), known, {"loss": values}, LOSS, KERNEL)
    found = model.predict(asked)

    at, wanted = known.scale[:, None] * weights[known.vector], asked.scale[:, None] * weights[asked.vector]
    covariance = by_hand(weights, KERNEL)
    own = covariance(at, at) + line_kernel.JITTER * np.diag(np.diag(covariance(at, at)))
    across = covariance(wanted, at)
    origin = values[0]  # the first point is theta_init
    assert np.allclose(found.mean["loss"], origin + across @ np.linalg.solve(own, values - origin), atol=1e-8)
    variance = np.diag(covariance(wanted, wanted)) - np.einsum("ij,ji->i", across, np.linalg.solve(own, across.T))
    assert np.allclose(found.deviation["loss"] ** 2, variance, atol=1e-5)  # theta_init differs from itself by nothing


def test_a_function_in_the_kernels_span_is_found_exactly():
    weights, known, asked = vectors(), places(count=12), places(2, 30)
    covariance = by_hand(weights, KERNEL)
    at, wanted = known.scale[:, None] * weights[known.vector], asked.scale[:, None] * weights[asked.vector]
    mix = np.random.default_rng(4).normal(size=(12, 3))
    # Less its value at theta_init, which the model takes as its zero.
    values, truth = covariance(at, at) @ mix, covariance(wanted, at) @ mix
    origin = values[:1]
    mix_again = np.linalg.solve(covariance(at, at), values - origin)
    found = MultiOutputGP(Geometry(weights @ weights.T), known, {"loss": values}, LOSS, KERNEL).predict(asked).mean["loss"]
    assert np.allclose(found, origin + covariance(wanted, at) @ mix_again, atol=2e-3 * np.abs(truth).max())


def test_what_was_scored_is_predicted_without_doubt():
    weights, known = vectors(), places()
    values = np.random.default_rng(3).normal(size=(9, 6))
    found = MultiOutputGP(Geometry(weights @ weights.T), known, {"loss": values}, LOSS, KERNEL).predict(known)
    assert np.allclose(found.mean["loss"], values, atol=1e-3)
    assert found.deviation["loss"].max() < 0.02


@given(st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
def test_the_names_of_update_vectors_do_not_matter(order):
    weights, known, asked = vectors(), places(), places(2, 4)
    values = {"loss": np.random.default_rng(3).normal(size=(9, 6))}
    gram = weights @ weights.T
    new = np.argsort(order)
    one = MultiOutputGP(Geometry(gram), known, values, LOSS).predict(asked)
    other = MultiOutputGP(Geometry(gram[np.ix_(order, order)]), Points(new[known.vector], known.scale), values, LOSS).predict(
        Points(new[asked.vector], asked.scale)
    )
    assert np.allclose(one.mean["loss"], other.mean["loss"], atol=1e-5)
    assert np.allclose(one.deviation["loss"], other.deviation["loss"], atol=1e-5)


def test_theta_init_is_the_same_point_of_every_vector_and_half_a_vector_walked_twice_is_the_vector():
    weights = vectors()
    weights = np.vstack([weights, weights[0] / 2])
    known = places()
    values = {"loss": np.random.default_rng(3).normal(size=(9, 6))}
    model = MultiOutputGP(Geometry(weights @ weights.T), known, values, LOSS, KERNEL)
    start = model.predict(Points(np.arange(6), np.zeros(6)))
    assert np.allclose(start.mean["loss"], values["loss"][0], atol=1e-3)
    assert start.deviation["loss"].max() < 0.01
    same = model.predict(Points(np.array([0, 5]), np.array([0.7, 1.4])))
    assert np.allclose(same.mean["loss"][0], same.mean["loss"][1])


def test_a_group_that_some_points_lack_is_predicted_from_the_others():
    weights, known, asked = vectors(), places(), places(2, 4)
    generator = np.random.default_rng(3)
    whole, partial = generator.normal(size=(9, 6)), generator.normal(size=(9, 3))
    partial[[2, 5, 8]] = np.nan
    geometry = Geometry(weights @ weights.T)
    both = MultiOutputGP(geometry, known, {"whole": whole, "partial": partial}, {}, KERNEL).predict(asked)
    rows = np.array([0, 1, 3, 4, 6, 7])
    alone = MultiOutputGP(geometry, known.take(rows), {"partial": partial[rows]}, {}, KERNEL).predict(asked)
    assert np.allclose(both.mean["partial"], alone.mean["partial"])
    assert np.allclose(
        both.mean["whole"], MultiOutputGP(geometry, known, {"whole": whole}, {}, KERNEL).predict(asked).mean["whole"]
    )
    assert (both.deviation["whole"] <= both.deviation["partial"] + 1e-9).all()


def test_points_under_way_take_doubt_away_as_scored_ones_do_and_leave_means_alone():
    weights, known, asked = vectors(), places(), places(2, 20)
    under_way = Points(np.array([1, 3]), np.array([0.9, 2.2]))
    values = np.random.default_rng(3).normal(size=(9, 6))
    geometry = Geometry(weights @ weights.T)
    model = MultiOutputGP(geometry, known, {"loss": values}, LOSS, KERNEL)
    found, before = model.predict(asked, under_way), model.predict(asked)
    assert np.array_equal(found.mean["loss"], before.mean["loss"])
    believed = np.vstack([values, model.predict(under_way).mean["loss"]])
    after = MultiOutputGP(geometry, known + under_way, {"loss": believed}, LOSS, KERNEL).predict(asked)
    assert np.allclose(found.deviation["loss"], after.deviation["loss"], atol=1e-3)
    assert np.allclose(found.mean["loss"], after.mean["loss"], atol=1e-3)
    assert found.deviation["loss"].sum() < before.deviation["loss"].sum()


def test_the_settings_found_are_the_likeliest():
    weights, known = vectors(), places(count=30)
    covariance = by_hand(weights, KERNEL)
    at = known.scale[:, None] * weights[known.vector]
    factor = np.linalg.cholesky(covariance(at, at) + 1e-9 * np.eye(30))
    drawn = factor @ np.random.default_rng(5).normal(size=(30, 40))
    found = fit(Geometry(weights @ weights.T), known, [(drawn @ drawn.T, 40, line_kernel.JITTER)], Kernel())

    def loss(kernel):
        own = by_hand(weights, kernel)(at, at)
        own += line_kernel.JITTER * np.diag(np.diag(own))
        scale = (drawn * np.linalg.solve(own, drawn)).sum() / drawn.size
        away = [np.log(getattr(kernel, name) / getattr(Kernel(), name)) for name in SETTINGS]
        likelihood = 20 * np.linalg.slogdet(own)[1] + 0.5 * drawn.size * np.log(scale)
        return line_kernel.WORTH / 40 * likelihood + 0.5 * (np.square(away) / line_kernel.PRIOR_SD**2).sum()

    best = loss(found)
    assert best < loss(Kernel())
    for name in SETTINGS:
        for factor in (0.9, 1.1):
            moved = Kernel(**{**vars(found), name: getattr(found, name) * factor})
            assert loss(moved) > best - 1e-3, (name, factor)


def test_of_many_points_those_are_taken_that_tell_most(monkeypatch):
    monkeypatch.setattr(line_model, "TRAINED_ON", 40)
    weights = vectors(count=3)
    known = Points(np.repeat(np.arange(3), 60), np.tile(np.linspace(0, 3, 60), 3))
    geometry = Geometry(weights @ weights.T)
    chosen = choose(geometry, KERNEL, known, 40)
    assert len(set(chosen)) == 40
    assert len(choose(geometry, KERNEL, known.take(chosen), 40)) == 40
    truth = np.sin(known.scale)[:, None] * np.array([1.0, 2.0])
    found = MultiOutputGP(geometry, known, {"loss": truth}, LOSS).predict(known).mean["loss"]
    assert np.abs(found - truth).max() < 0.01
    spread = np.array([len(set(known.vector[chosen] * (known.scale[chosen] > 0)))])
    assert spread == 3


def test_draws_of_errors_go_together_as_items_do():
    weights, known = vectors(), places()
    one = np.random.default_rng(3).normal(size=9)
    values = {"a": np.stack([one, -one], axis=1), "b": one[:, None] * 3}
    drawn = MultiOutputGP(Geometry(weights @ weights.T), known, values, {}, KERNEL).errors(np.random.default_rng(0), 50)
    assert np.allclose(drawn["a"][:, 0], -drawn["a"][:, 1])
    assert np.allclose(drawn["b"][:, 0], 3 * drawn["a"][:, 0])
    assert drawn["a"].std() > 0


@pytest.mark.parametrize(
    ("gram", "told"),
    [
        (np.zeros((2, 3)), "square"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "finite"),
        (np.array([[1.0, 0.5], [0.1, 1.0]]), "symmetric"),
        (np.zeros((2, 2)), "zero vectors"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, told):
    with pytest.raises(ValueError, match=told):
        Geometry(gram)


def test_vectors_that_are_the_same_or_zero_do_not_break_it():
    weights = vectors(count=3)
    weights = np.vstack([weights, weights[0], np.zeros(12)])
    known = Points(np.array([0, 3, 4, 1, 2, 0]), np.array([1.0, 1.0, 1.0, 0.5, 2.0, 0.0]))
    values = np.array([1.0, 1.0, 0.0, 3.0, 4.0, 0.0])[:, None]
    found = MultiOutputGP(Geometry(weights @ weights.T), known, {"loss": values}, LOSS).predict(known)
    assert np.isfinite(found.mean["loss"]).all()
    assert np.isfinite(found.deviation["loss"]).all()


def test_curves_that_say_nothing_of_errors_leave_them_at_the_least():
    weights = vectors()
    geometry = Geometry(weights @ weights.T)
    one = MultiOutputGP(geometry, Points(np.array([0]), np.array([0.0])), {"loss": np.array([[1.0, 2.0]])}, {"loss": 1.0})
    assert one.error == ERRORS[0]
    found = one.predict(Points(np.array([0, 1]), np.array([0.0, 1.0])))
    assert np.allclose(found.mean["loss"], [1.0, 2.0])
    assert found.deviation["loss"][0] < 0.02 < found.deviation["loss"][1]
    constant = MultiOutputGP(geometry, places(), {"loss": np.full((9, 3), 2.0)}, {"loss": 1.0})
    assert constant.error == ERRORS[0]
    assert np.allclose(constant.predict(places(2, 4)).mean["loss"], 2.0)
    # A group that losses do not move: no errors of losses are in it.
    moved = np.random.default_rng(3).normal(size=(9, 2))
    still = MultiOutputGP(geometry, places(), {"loss": moved}, {"loss": 0.0}, KERNEL)
    assert np.allclose(still.predict(places()).mean["loss"], moved, atol=1e-3)


@pytest.mark.parametrize("level", [0.01, 0.1])
def test_errors_are_told_from_bends_by_how_large_they_are_in_each_group(level):
    """Two groups of one smooth kind; errors are ten times as large in one of them, as its units say."""
    weights, known = vectors(), places(count=30)
    covariance = by_hand(weights, KERNEL)
    at = known.scale[:, None] * weights[known.vector]
    factor = np.linalg.cholesky(covariance(at, at) + 1e-9 * np.eye(30))
    for seed in range(4):
        generator = np.random.default_rng(seed)
        truth = {name: factor @ generator.normal(size=(30, 20)) for name in UNITS}
        values = {name: each + level * np.sqrt(UNITS[name]) * generator.normal(size=(30, 20)) for name, each in truth.items()}
        found = MultiOutputGP(Geometry(weights @ weights.T), known, values, UNITS, KERNEL)
        assert found.error == pytest.approx(level, rel=0.6)
        smooth = found.predict(known).mean
        # What is expected of scored points is closer to the truth than what was measured.
        assert np.abs(smooth["loud"] - truth["loud"]).mean() < np.abs(values["loud"] - truth["loud"]).mean()


def test_close_to_theta_init_there_is_no_more_doubt_than_it_has_itself():
    """Its own errors are theirs too: a score there is no gain."""
    weights, known = vectors(), places(count=12)
    values = {"loss": np.random.default_rng(3).normal(size=(12, 20))}
    model = MultiOutputGP(Geometry(weights @ weights.T), known, values, {"loss": 1.0})
    assert model.error > 0.1
    close = model.predict(Points(np.zeros(4, dtype=np.int64), np.array([0.001, 0.01, 0.1, 1.5]))).deviation["loss"]
    assert (np.diff(close) > 0).all()
    assert close[0] < 0.01 * close[-1]
