"""The sampler that knows the line: curves and objectives, where it looks next, and how it behaves in a study of Optuna."""

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from search.problem.objectives import (
    AGREEMENT_WITH_INITIAL,
    FORGET_QUALITY,
    KNOWMEM,
    KNOWMEM_RETAIN,
    MODEL_UTILITY,
    PRIVACY,
    PRIVLEAK,
    RELATED_FORGET_QUALITY,
    VERBMEM,
)
from search.problem.pareto import hypervolume
from search.problem.space import own_alpha
from search.samplers.acquisition import LineSearch, growth
from search.samplers.kernels import Geometry, Points
from search.samplers.line import LineSampler, LineStudy, UpdateVectors
from search.samplers.outcomes import OutcomeModel
from search.samplers.registry import SAMPLERS
from uipe_core.corpora.types import KNOWLEDGE, PRIVLEAK_SETS
from uipe_core.errors import UserError
from uipe_core.metrics.composites import composite, membership
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate, log10_p_floor

ITEMS = 12
SETS = ("forget", "retain", "real_authors", "world_facts", "related")
CORNER = [log10_p_floor(ITEMS, ITEMS), 0.0]
CEILING = [math.log10(0.3), math.inf]
EPOCHS = {"a": 3, "b": 2}
SPACE = {
    "base": CategoricalDistribution(["a", "b"]),
    "epoch": IntDistribution(1, 3),
    "alpha": FloatDistribution(-1.0, 2.0),
}


class World:
    """Scores that are smooth functions of the weights: update vectors forget, and cost a little of the rest."""

    def __init__(self, seed=0):
        generator = np.random.default_rng(seed)
        self.weights = generator.normal(0, 0.2, (5, 16))
        self.weights[:, 0] = [0.5, 1.0, 1.6, 0.4, 0.9]
        self.weights[:, 1] = [0.1, 0.4, 0.9, 0.3, 0.9]
        self.taste = {name: generator.normal(0, 0.15, (16, 3, ITEMS)) for name in SETS}
        self.start = {name: generator.uniform(0.2, 1.0, ITEMS) for name in SETS}
        self.lines = UpdateVectors(
            {("a", 1): 0, ("a", 2): 1, ("a", 3): 2, ("b", 1): 3, ("b", 2): 4}, self.weights @ self.weights.T
        )

    def report(self, vector=0, scale=0.0):
        theta = scale * self.weights[vector]
        sets = {}
        for name in SETS:
            bend = np.tensordot(theta, self.taste[name], 1)
            hurt = 3.0 * theta[0] if name in ("forget", "related") else 0.6 * theta[1] ** 2
            answer = np.logaddexp(0, self.start[name] + bend[0] + hurt)
            paraphrase = answer + np.logaddexp(0, bend[1])
            perturbed = 2.5 + np.logaddexp(0, bend[2] - 0.3 * hurt)[:, None] + np.array([-0.2, 0.2])
            one, two = np.ones(ITEMS, dtype=np.int64), np.ones((ITEMS, 2), dtype=np.int64)
            sets[name] = SetScores(
                answer, one, paraphrase, one, perturbed, two, rouge_l_recall=np.round(np.exp(-answer / 3), 1)
            )
        return ScoreReport(sets)

    @property
    def retain(self):
        return self.report(2, 0.8)

    def curves(self, objectives=(FORGET_QUALITY, MODEL_UTILITY), definition="tofu"):
        return OutcomeModel(definition, objectives, self.retain.arrays())

    def objectives(self, vector, scale):
        found = evaluate(self.report(vector, scale), self.retain)
        return [found.forget_quality.log10_p, found.model_utility]


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.mark.parametrize("definition", ["tofu", "tofu-utils", "open-unlearning"])
def test_objectives_of_curves_are_those_of_the_scores(world, definition):
    curves = world.curves((FORGET_QUALITY, MODEL_UTILITY, RELATED_FORGET_QUALITY), definition)
    for vector, scale in [(0, 0.0), (2, 0.8), (2, 2.5), (4, 1.0)]:
        report = world.report(vector, scale)
        expected = evaluate(report, world.retain, definition)
        found = curves.objectives(curves.of(report.arrays()))
        truth = [expected.forget_quality.log10_p, expected.model_utility, expected.related["related"].log10_p]
        assert found == pytest.approx(truth, abs=1e-9)


@given(st.lists(st.integers(1, 5), min_size=ITEMS, max_size=ITEMS), st.lists(st.integers(1, 5), min_size=7, max_size=7))
@settings(max_examples=40, deadline=None)
def test_privacy_of_curves_is_that_of_the_scores_ties_too(world, forget, holdout):
    def with_min_k(report, members, others):
        sets = {**report.sets, "holdout": report.sets["related"].take(range(len(others)), None)}
        sets["forget"] = replace(sets["forget"], min_k=np.array(members, dtype=float))
        sets["holdout"] = replace(sets["holdout"], min_k=np.array(others, dtype=float))
        return ScoreReport(sets)

    report = with_min_k(world.report(2, 0.8), forget, holdout)
    retain = with_min_k(world.retain, range(1, ITEMS + 1), range(3, 10))
    for reference, known in ((retain, retain.sets), (world.retain, world.retain.sets)):
        curves = OutcomeModel("tofu", (FORGET_QUALITY, MODEL_UTILITY, PRIVACY), reference.arrays())
        assert {"forget/least", "holdout/least"} <= curves.names
        found = curves.objectives(curves.of(report.arrays()))
        assert found[2] == pytest.approx(membership(report.sets, known)["privacy"], abs=1e-12)
        units = curves.units(report.arrays(), curves.of(report.arrays()))
        assert units["forget/least"] > 0 and units["holdout/least"] > 0
        many = {name: np.stack([values, values]) for name, values in curves.of(report.arrays()).items()}
        assert curves.objectives(many)[:, 2] == pytest.approx(found[2])


def test_numbers_of_muse_have_curves_that_give_them_back(world):
    def as_muse(report, seed):
        generator = np.random.default_rng(seed)
        sets = {name: report.sets[name] for name in ("forget", "retain")} | {KNOWLEDGE: report.sets["related"]}
        sets = {name: replace(each, rouge_l_f1=generator.uniform(0, 1, ITEMS)) for name, each in sets.items()}
        for name in PRIVLEAK_SETS:
            sets[name] = replace(report.sets["related"], min_k=generator.uniform(1, 5, ITEMS))
        return ScoreReport(sets)

    report, retain = as_muse(world.report(2, 0.8), 0), as_muse(world.retain, 1)
    objectives = (VERBMEM, KNOWMEM_RETAIN, PRIVLEAK, KNOWMEM)
    curves = OutcomeModel("tofu", objectives, retain.arrays())
    assert {"forget/text_f1", "knowmem/text_f1", "privleak_forget/least"} <= curves.names
    assert {"forget/text_f1", "retain/text_f1"} <= curves.noisy
    found = curves.objectives(curves.of(report.arrays()))
    expected = [composite(report, each.components, "tofu") for each in objectives if each.components]
    private = membership(report.sets, retain.sets)["privleak_privacy"]
    assert found == pytest.approx([*expected[:2], private, expected[2]], abs=1e-9)
    without_text = {name: each for name, each in report.arrays().items() if not name.endswith("rouge_l_f1")}
    assert "forget/text_f1" not in curves.of(without_text)


def test_the_divergence_from_the_initial_model_has_a_curve_that_gives_it_back(world):
    objective = AGREEMENT_WITH_INITIAL.on(["retain"])
    rng = np.random.default_rng(5)
    for spread in (0.01, 1.0, 20.0):
        report = world.report(2, 0.8)
        kl = spread * rng.random(ITEMS)
        report = replace(report, sets={**report.sets, "retain": replace(report.sets["retain"], initial_kl=kl)})
        curves = world.curves((FORGET_QUALITY, objective))
        found = curves.objectives(curves.of(report.arrays()))
        assert found[1] == pytest.approx(composite(report, objective.components, "tofu"), rel=1e-9)
    # Near the initial model the divergence is quadratic in the weights, and the curve straight.
    steps = np.array([0.01, 0.02, 0.03])
    roots = [
        curves.of({**report.arrays(), "retain/initial_kl": np.full(ITEMS, step**2)})["retain/divergence"][0] for step in steps
    ]
    assert roots == pytest.approx(steps, rel=1e-3)


def test_what_is_modelled_goes_straight_where_logits_go_straight(world):
    """One token of two: its logit moves evenly, and so does the curve; the loss does not."""
    scales = np.linspace(0, 2, 9)
    losses = np.logaddexp(0, -(5 - 4 * scales))[:, None].repeat(ITEMS, axis=1)
    arrays = world.report().arrays()
    curves = [world.curves().of({**arrays, "retain/answer_loss": loss})["retain/answer"] for loss in losses]
    assert np.array(curves) == pytest.approx((5 - 4 * scales)[:, None].repeat(ITEMS, axis=1), abs=1e-9)
    assert np.abs(np.diff(losses[:, 0], n=2)).max() > 0.2
    certain = world.curves().of({**arrays, "retain/answer_loss": np.full(ITEMS, 1e-9)})["retain/answer"]
    assert certain == pytest.approx(np.full(ITEMS, -np.log(np.expm1(1e-3))))


def test_of_text_only_what_answers_do_not_tell_is_modelled(world):
    report = world.report(2, 0.8)
    arrays = {**report.arrays(), "retain/answer_loss": np.full(ITEMS, np.log(2)), "retain/rouge_l_recall": np.full(ITEMS, 0.75)}
    curves = world.curves().of(arrays)
    assert curves["retain/text"] == pytest.approx([0.25])
    # Surer answers carry the text with them.
    surer = {**curves, "retain/answer": np.full(ITEMS, np.log(0.7 / 0.3))}
    told = {**arrays, "retain/answer_loss": np.full(ITEMS, -np.log(0.7)), "retain/rouge_l_recall": np.full(ITEMS, 0.95)}
    assert world.curves().objectives(surer) == pytest.approx(world.curves().objectives(world.curves().of(told)))


def test_objectives_take_any_number_of_draws_at_once(world):
    curves = world.curves()
    one, two = (curves.of(world.report(2, scale).arrays()) for scale in (0.5, 1.5))
    both = curves.objectives({name: np.stack([one[name], two[name]])[:, None].repeat(3, axis=1) for name in one})
    assert both.shape == (2, 3, 2)
    assert both[0, 1] == pytest.approx(curves.objectives(one))
    assert both[1, 2] == pytest.approx(curves.objectives(two))


def test_broken_models_have_curves_that_are_finite(world):
    scores = world.report().sets["retain"]
    broken = replace(scores, answer_loss=np.full(ITEMS, 5000.0), paraphrase_loss=np.full(ITEMS, 5000.0))
    curves = world.curves()
    values = curves.of({**world.report().arrays(), **ScoreReport({"retain": broken}).arrays()})
    assert all(np.isfinite(each).all() for each in values.values())
    assert curves.objectives(values)[1] < 1e-6


numbers = st.floats(-3, 3, allow_nan=False).map(lambda value: round(value, 2))


@given(
    st.integers(2, 3).flatmap(
        lambda m: st.tuples(
            st.lists(st.lists(numbers, min_size=m, max_size=m), max_size=6), st.lists(numbers, min_size=m, max_size=m)
        )
    )
)
@settings(max_examples=150, deadline=None)
def test_growth_is_the_difference_of_two_hypervolumes(drawn):
    front, point = np.array(drawn[0]).reshape(-1, len(drawn[1])), np.array(drawn[1])
    corner = np.full(len(point), -2.0)
    both = np.vstack([front, point])
    expected = hypervolume(both, corner) - (hypervolume(front, corner) if len(front) else 0.0)
    assert growth(point[None], front, corner)[0] == pytest.approx(expected, abs=1e-9)


def told(curves, report):
    """Curves of scores, and what errors do to them."""
    arrays = report.arrays() if isinstance(report, ScoreReport) else report
    found = curves.of(arrays)
    return found, curves.units(arrays, found)


def searched(world, **changes):
    search = LineSearch(Geometry(world.lines.gram), world.curves(), CORNER, CEILING)
    search.tell(0, 0.0, *told(world.curves(), world.report()))
    for vector in range(5):
        search.tell(vector, 1.0, *told(world.curves(), world.report(vector, 1.0)))
    return search


def grid(of=5):
    scales = np.setdiff1d(np.round(np.linspace(0.1, 3.0, 30), 6), [1.0])
    return Points(np.repeat(np.arange(of), len(scales)), np.tile(scales, of))


def test_a_few_scores_have_nearly_all_there_is_to_gain(world):
    search, left, generator = searched(world), grid(), np.random.default_rng(0)
    values = np.array([world.objectives(vector, scale) for vector, scale in zip(left.vector, left.scale, strict=True)])
    given_points = np.array([world.objectives(vector, 1.0) for vector in range(5)] + [world.objectives(0, 0.0)])

    def volume(points):
        return hypervolume(np.minimum(points, CEILING), CORNER)

    most = volume(np.vstack([given_points, values])) - volume(given_points)
    assert most > 0
    found = given_points
    for _ in range(15):
        chosen = search.propose(left, None, generator)
        vector, scale = int(left.vector[chosen]), float(left.scale[chosen])
        search.tell(vector, scale, *told(world.curves(), world.report(vector, scale)))
        found = np.vstack([found, values[chosen]])
        kept = np.arange(len(left)) != chosen
        left, values = left.take(kept), values[kept]
    assert volume(found) - volume(given_points) > 0.9 * most


def test_expectations_come_close_to_what_is_scored_then(world):
    search, asked = searched(world), grid()
    for vector, scale in [(2, 0.5), (2, 1.7), (4, 2.0), (1, 2.0), (3, 2.5)]:
        search.tell(vector, scale, *told(world.curves(), world.report(vector, scale)))
    truth = np.array([world.objectives(vector, scale)[1] for vector, scale in zip(asked.vector, asked.scale, strict=True)])
    near = asked.scale < 2
    assert np.abs(search.expect(asked)[:, 1] - truth)[near].mean() < 0.01


def with_errors(report, level, generator):
    """Item scores with a relative error of every loss."""
    return {
        name: each * (1.0 + level * generator.standard_normal(each.shape)) if name.endswith("_loss") else each
        for name, each in report.arrays().items()
    }


def scored_with_errors(world, level, seed, count=14):
    generator = np.random.default_rng(seed)
    search = LineSearch(Geometry(world.lines.gram), world.curves(), CORNER, CEILING)
    search.tell(0, 0.0, *told(world.curves(), with_errors(world.report(), level, generator)))
    for place in [
        *((vector, 1.0) for vector in range(5)),
        *((int(generator.integers(5)), generator.uniform(0.1, 3)) for _ in range(count)),
    ]:
        search.tell(*place, *told(world.curves(), with_errors(world.report(*place), level, generator)))
    return search


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", [0.003, 0.01, 0.05])
def test_the_error_of_the_losses_is_found(world, level, seed):
    assert scored_with_errors(world, level, seed).error == pytest.approx(level, rel=0.35)


def test_losses_without_errors_are_trusted_and_their_front_is_the_measured_one(world):
    for seed in range(3):
        search = scored_with_errors(world, 0.0, seed)
        assert search.error < 1e-3
        places = search.places
        truth = np.array([world.objectives(vector, scale) for vector, scale in zip(places.vector, places.scale, strict=True)])
        assert np.abs(search.expect(places) - truth)[:, 1].max() < 3e-3


def test_units_are_what_small_errors_do_to_curves(world):
    curves, arrays = world.curves(), world.report(2, 0.8).arrays()
    units, losses = curves.units(arrays, curves.of(arrays)), arrays["retain/answer_loss"]
    # d log odds / d loss = 1 / (1 - exp(-loss)), by hand.
    exact = np.square(losses / -np.expm1(-losses)).mean()
    drawn = np.mean(
        [
            np.square(
                (
                    curves.of(with_errors(world.report(2, 0.8), 1e-4, np.random.default_rng(seed)))["retain/answer"]
                    - curves.of(arrays)["retain/answer"]
                )
                / 1e-4
            ).mean()
            for seed in range(200)
        ]
    )
    assert drawn == pytest.approx(exact, rel=0.1)
    assert units["retain/answer"] == pytest.approx(exact, rel=0.7)
    assert units.keys() == curves.of(arrays).keys()


def test_points_under_way_are_not_proposed_again_in_other_words(world):
    search, candidates = searched(world), grid()
    first = search.propose(candidates, None, np.random.default_rng(0))
    under_way = candidates.take(np.array([first]))
    others = np.arange(len(candidates)) != first
    second = candidates.take(others).take(
        np.array([search.propose(candidates.take(others), under_way, np.random.default_rng(0))])
    )
    assert (second.vector[0], second.scale[0]) != (under_way.vector[0], under_way.scale[0])
    same = second.vector[0] == under_way.vector[0]
    assert not same or abs(second.scale[0] - under_way.scale[0]) > 0.1


def test_a_pruned_point_tells_of_the_sets_it_has(world):
    search, without = searched(world), searched(world)
    arrays = world.report(2, 2.0).arrays()
    forget = {name: each for name, each in arrays.items() if name.startswith("forget/")}
    search.tell(2, 2.0, *told(world.curves(), forget))
    asked = Points(np.array([2]), np.array([2.0]))
    truth = world.objectives(2, 2.0)[0]
    assert abs(search.expect(asked)[0, 0] - truth) <= abs(without.expect(asked)[0, 0] - truth)
    assert search.expect(asked)[0, 0] == pytest.approx(truth, abs=0.5)
    no_text = {name: each for name, each in arrays.items() if "rouge" not in name}
    search.tell(2, 2.5, *told(world.curves(), no_text))
    assert search.propose(grid(), None, np.random.default_rng(0)) >= 0


def test_curves_of_other_items_or_none_are_refused(world):
    search = searched(world)
    with pytest.raises(ValueError, match="no curves"):
        search.tell(0, 2.0, *told(world.curves(), {}))
    with pytest.raises(ValueError, match=r"other items.*forget/quality"):
        search.tell(0, 2.0, {"forget/quality": np.zeros(3)}, {"forget/quality": 1.0})
    assert len(search) == 6
    with pytest.raises(ValueError, match="no candidates"):
        search.propose(grid().take(np.zeros(0, dtype=np.int64)), None, np.random.default_rng(0))


class Never(BaseSampler):
    """In the place of the other sampler, where it must not be asked."""

    def infer_relative_search_space(self, study, trial):
        raise AssertionError("the other sampler was asked")

    sample_relative = sample_independent = infer_relative_search_space


class Bench:
    """A study of Optuna that is sampled along lines."""

    def __init__(
        self,
        world,
        fallback=None,
        lines="all",
        space=SPACE,
        epochs=EPOCHS,
        alpha=(-1.0, 2.0),
        seed=0,
        items=None,
        ranges=None,
    ):
        self.world, self.said, self.scored = world, [], {}
        self.lines = world.lines if lines == "all" else lines
        self.known = LineStudy(
            epochs,
            alpha,
            world.curves(),
            world.report().arrays(),
            lambda: (CORNER, CEILING),
            items or self.scored.get,
            lambda: self.lines,
            ranges or {},
        )
        self.sampler = LineSampler(self.known, space, fallback or Never(), seed, self.said.append)
        self.space = space
        self.study = optuna.create_study(directions=["maximize"] * 2, sampler=self.sampler)

    def ask(self, **given):
        if given:
            self.study.enqueue_trial(given)
        return self.study.ask(self.space)

    def place(self, trial):
        epoch = -(-trial.params["epoch"] * self.known.epochs[trial.params["base"]] // 3)
        base = trial.params["base"]
        alpha = own_alpha(trial.params["alpha"], self.known.alpha, self.known.ends[base])
        return self.world.lines.vectors[(base, epoch)], 1.0 + alpha

    def score(self, trial):
        self.scored[trial.number] = self.world.report(*self.place(trial)).arrays()
        self.study.tell(trial, self.world.objectives(*self.place(trial)))

    def begin(self):
        for base, count in self.known.epochs.items():
            for epoch in range(1, count + 1):
                self.score(self.ask(base=base, epoch=epoch * 3 // count, alpha=0.0))
        return self


def test_a_study_is_sampled_within_its_space_and_the_same_again(world):
    benches = [Bench(world).begin(), Bench(world).begin()]
    for _ in range(6):
        asked = [bench.ask() for bench in benches]
        assert asked[0].params == asked[1].params
        assert all(SPACE[name]._contains(SPACE[name].to_internal_repr(value)) for name, value in asked[0].params.items())
        assert asked[0].params["alpha"] == round(asked[0].params["alpha"], 4)
        for bench, trial in zip(benches, asked, strict=True):
            bench.score(trial)
    assert benches[0].said == []
    assert len(benches[0].study.best_trials) > 1


def test_eight_workers_get_eight_different_points(world):
    bench = Bench(world).begin()
    trials = [bench.ask() for _ in range(8)]
    places = [bench.place(trial) for trial in trials]
    for number, (vector, scale) in enumerate(places):
        assert all(other != vector or abs(scale - there) > 0.003 for other, there in places[:number])
    for trial in trials:
        bench.score(trial)
    assert bench.place(bench.ask()) not in places


def test_a_given_base_run_is_kept_and_all_given_is_all_kept(world):
    bench = Bench(world).begin()
    for base in ("b", "a", "b"):
        trial = bench.ask(base=base)
        assert trial.params["base"] == base
        assert (base, -(-trial.params["epoch"] * EPOCHS[base] // 3)) in world.lines.vectors
        bench.score(trial)
    assert bench.ask(base="b", epoch=3, alpha=0.25).params == {"base": "b", "epoch": 3, "alpha": 0.25}


def test_a_base_run_is_proposed_within_its_own_range(world):
    own = (-0.9, -0.3)
    bench = Bench(world, ranges={"b": own})
    alphas = {"a": [], "b": []}
    for turn in range(12):
        trial = bench.ask(base="ab"[turn % 2])
        assert -1.0 <= trial.params["alpha"] <= 2.0  # as the flat space has it
        alphas[trial.params["base"]].append(bench.place(trial)[1] - 1.0)
        bench.score(trial)
    assert all(own[0] <= alpha <= own[1] for alpha in alphas["b"])
    assert len({bench.place(trial) for trial in bench.study.trials}) == 12
    assert max(alphas["a"]) > own[1] or min(alphas["a"]) < own[0]


def test_theta_init_and_what_was_scored_are_not_proposed(world):
    bench = Bench(world, alpha=(-1.0, -0.99), space={**SPACE, "alpha": FloatDistribution(-1.0, -0.99)})
    for _ in range(6):
        trial = bench.ask()
        assert -1.0 < trial.params["alpha"] <= -0.99
        bench.score(trial)
    points = [bench.place(trial) for trial in bench.study.trials]
    assert len(set(points)) == 6


def test_a_point_that_failed_is_left_alone(world):
    bench = Bench(world).begin()
    trial = bench.ask()
    failed = bench.place(trial)
    bench.study.tell(trial, state=TrialState.FAIL)
    for _ in range(3):
        trial = bench.ask()
        vector, scale = bench.place(trial)
        assert vector != failed[0] or abs(scale - failed[1]) > 0.02
        bench.score(trial)


def test_another_sampler_proposes_until_there_are_lines_and_for_base_runs_without(world):
    bench = Bench(world, fallback=SAMPLERS["random"].make(3), lines=None).begin()
    before = bench.ask()
    assert set(before.params) == set(SPACE)
    bench.score(before)
    half = {place: number for place, number in world.lines.vectors.items() if place[0] == "a"}
    bench.lines = UpdateVectors(half, world.lines.gram[:3, :3])
    for _ in range(3):
        trial = bench.ask()
        assert trial.params["base"] == "a"
        bench.score(trial)
    assert bench.ask(base="b").params["base"] == "b"
    bench.lines = world.lines
    trial = bench.ask(base="b")
    assert trial.params["alpha"] == round(trial.params["alpha"], 4)
    assert bench.said == []


def test_broken_item_scores_are_told_of_once_and_done_without(world):
    def items(number):
        if number == 1:
            raise UserError("items/trials/00001.npz: the item scores of trial 1 are damaged; delete the file")
        if number == 2:
            return {"forget/answer_loss": np.zeros(4)}
        if number == 3:
            return {name: np.concatenate([each, each]) for name, each in bench.scored[3].items()}
        if number == 4:
            return {name: each * np.nan if "loss" in name else each for name, each in bench.scored[4].items()}
        return None if number == 5 else bench.scored[number]

    bench = Bench(world, items=items)
    bench.begin()
    for _ in range(4):
        bench.score(bench.ask())
    assert len(bench.said) == 4
    for number in (1, 2, 3, 4):
        assert sum(f"trial {number} " in sentence for sentence in bench.said) == 1
    assert "damaged" in bench.said[0]


def test_a_third_objective_is_searched_too(world):
    curves = world.curves((FORGET_QUALITY, MODEL_UTILITY, RELATED_FORGET_QUALITY))
    search = LineSearch(Geometry(world.lines.gram), curves, [*CORNER, CORNER[0]], [*CEILING, CEILING[0]])
    search.tell(0, 0.0, *told(curves, world.report()))
    for vector in range(5):
        search.tell(vector, 1.0, *told(curves, world.report(vector, 1.0)))
    candidates = grid()
    chosen = search.propose(candidates, None, np.random.default_rng(0))
    assert search.expect(candidates).shape == (len(candidates), 3)
    values = curves.objectives(
        curves.of(world.report(int(candidates.vector[chosen]), float(candidates.scale[chosen])).arrays())
    )
    assert values[2] > CORNER[0]
