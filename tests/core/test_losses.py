"""Unlearning objectives against loops over hand-made logits and against their limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.losses import METHODS, LossInputs, answer_kl, answer_logp, mean_answer_nll
from uipe_core.prompts import IGNORED

VOCABULARY = 5
LABELS = torch.tensor([[IGNORED, IGNORED, 3, 1, 4], [IGNORED, 2, 0, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 4, IGNORED]])


def logits(seed, scale=2.0):
    return scale * torch.randn(*LABELS.shape, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probabilities(values):
    """Log-softmax of a list by its definition."""
    total = math.log(sum(math.exp(value) for value in values))
    return [value - total for value in values]


def by_hand(scores):
    """Log-probability and token count of each answer: the token at position t is predicted from position t - 1."""
    sums, counts = [], []
    for row in range(LABELS.shape[0]):
        terms = [
            log_probabilities(scores[row, position - 1].tolist())[LABELS[row, position]]
            for position in range(1, LABELS.shape[1])
            if LABELS[row, position] != IGNORED
        ]
        sums.append(sum(terms))
        counts.append(len(terms))
    return sums, counts


def kl_by_hand(initial, current):
    terms = []
    for row in range(LABELS.shape[0]):
        for position in range(1, LABELS.shape[1]):
            if LABELS[row, position] != IGNORED:
                p = log_probabilities(initial[row, position - 1].tolist())
                q = log_probabilities(current[row, position - 1].tolist())
                terms.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return sum(terms) / len(terms)


def inputs_of(scores, initial=None, retain=None):
    logp, tokens = answer_logp(scores, LABELS)
    return LossInputs(
        logp,
        tokens,
        initial_forget_logp=None if initial is None else answer_logp(initial, LABELS)[0],
        retain_nll=None if retain is None else mean_answer_nll(retain, LABELS),
        retain_kl=None if retain is None or initial is None else answer_kl(initial, retain, LABELS),
    )


def test_answer_logp_sums_each_answer_and_counts_its_tokens():
    sums, counts = by_hand(logits(0))
    logp, tokens = answer_logp(logits(0), LABELS)
    assert logp.tolist() == pytest.approx(sums, rel=1e-5)
    assert tokens.tolist() == counts == [3, 2, 1]


def test_mean_nll_is_over_tokens_not_over_answers():
    sums, counts = by_hand(logits(0))
    assert float(mean_answer_nll(logits(0), LABELS)) == pytest.approx(-sum(sums) / sum(counts), rel=1e-5)
    assert -sum(sums) / sum(counts) != pytest.approx(-sum(s / c for s, c in zip(sums, counts, strict=True)) / 3, rel=1e-2)


def test_positions_without_label_carry_no_loss():
    scores = logits(0).requires_grad_()
    mean_answer_nll(scores, LABELS).backward()
    carries = torch.zeros_like(LABELS, dtype=torch.bool)
    carries[:, :-1] = LABELS[:, 1:] != IGNORED
    assert (scores.grad.abs().sum(-1) > 0).tolist() == carries.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_kl_is_the_mean_over_answer_tokens_from_initial_to_current(seed):
    initial, current = logits(seed), logits(seed + 10)
    assert float(answer_kl(initial, current, LABELS)) == pytest.approx(kl_by_hand(initial, current), rel=1e-5)
    assert float(answer_kl(current, initial, LABELS)) != pytest.approx(kl_by_hand(initial, current), rel=1e-2)


def test_kl_is_zero_at_equality_with_zero_gradient():
    current = logits(0).requires_grad_()
    kl = answer_kl(logits(0), current, LABELS)
    kl.backward()
    assert float(kl.detach()) == 0.0
    assert float(current.grad.abs().max()) < 1e-7


@given(st.integers(0, 1000), st.floats(0, 20))
@settings(max_examples=50, deadline=None)
def test_kl_is_never_negative(seed, scale):
    assert float(answer_kl(logits(seed, scale), logits(seed + 1, scale), LABELS)) >= -1e-6


def test_grad_ascent_is_minus_nll():
    sums, counts = by_hand(logits(0))
    loss = METHODS["grad_ascent"].loss(inputs_of(logits(0)), {})
    assert float(loss) == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_grad_diff_adds_the_weighted_retain_nll():
    sums, counts = by_hand(logits(0))
    retain_sums, _ = by_hand(logits(1))
    loss = METHODS["grad_diff"].loss(inputs_of(logits(0), retain=logits(1)), {"retain_weight": 2.5})
    assert float(loss) == pytest.approx((sum(sums) - 2.5 * sum(retain_sums)) / sum(counts), rel=1e-5)


def test_kl_min_adds_the_weighted_kl_from_the_initial_model():
    sums, counts = by_hand(logits(0))
    loss = METHODS["kl_min"].loss(inputs_of(logits(0), initial=logits(2), retain=logits(1)), {"retain_weight": 2.5})
    assert float(loss) == pytest.approx(sum(sums) / sum(counts) + 2.5 * kl_by_hand(logits(2), logits(1)), rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_npo_is_its_formula_on_summed_log_probabilities(beta, weight):
    sums, counts = by_hand(logits(0))
    initial_sums, _ = by_hand(logits(2))
    retain_sums, _ = by_hand(logits(1))
    terms = [math.log(1 / (1 + math.exp(beta * (s - i)))) for s, i in zip(sums, initial_sums, strict=True)]
    expected = -2 / beta * sum(terms) / len(terms) - weight * sum(retain_sums) / sum(counts)
    inputs = inputs_of(logits(0), initial=logits(2), retain=logits(1))
    loss = METHODS["npo"].loss(inputs, {"beta": beta, "retain_weight": weight})
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def gradient(method, hyper, scores, initial=None):
    scores = scores.clone().requires_grad_()
    METHODS[method].loss(inputs_of(scores, initial=initial), hyper).backward()
    return scores.grad


def test_descending_on_grad_ascent_raises_the_nll():
    scores = logits(0)
    stepped = scores - 0.1 * gradient("grad_ascent", {}, scores)
    assert float(mean_answer_nll(stepped, LABELS)) > float(mean_answer_nll(scores, LABELS))


def test_npo_gradient_tends_to_gradient_ascent_as_beta_vanishes():
    # arXiv 2404.05868, Proposition 1; its gradient ascent is on log-probabilities summed over tokens, averaged over answers.
    scores = logits(0).requires_grad_()
    answer_logp(scores, LABELS)[0].mean().backward()
    errors = [
        float((gradient("npo", {"beta": beta, "retain_weight": 0.0}, scores.detach(), logits(2)) - scores.grad).abs().max())
        for beta in (1.0, 0.1, 0.001)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * float(scores.grad.abs().max())


def test_npo_gradient_fades_once_an_answer_is_unlikely():
    hyper = {"beta": 1.0, "retain_weight": 0.0}
    initial = torch.zeros_like(logits(0))
    chosen = torch.nn.functional.one_hot(LABELS.clamp(min=0), VOCABULARY).roll(-1, dims=1).double()
    known, forgotten = gradient("npo", hyper, initial, initial), gradient("npo", hyper, -20 * chosen, initial)
    assert float(forgotten.abs().max()) < 1e-3 * float(known.abs().max())


@pytest.mark.parametrize("method", ["grad_diff", "kl_min"])
def test_without_retain_weight_a_method_needs_no_retain_items(method):
    loss = METHODS[method].loss(inputs_of(logits(0)), {"retain_weight": 0.0})
    assert torch.equal(loss, METHODS["grad_ascent"].loss(inputs_of(logits(0)), {}))
    assert not METHODS[method].needs_retain({"retain_weight": 0.0})


@pytest.mark.parametrize(
    ("method", "named"), [("grad_diff", "retain_nll"), ("kl_min", "retain_kl"), ("npo", "initial_forget_logp")]
)
def test_a_missing_input_is_named(method, named):
    with pytest.raises(ValueError, match=named):
        METHODS[method].loss(inputs_of(logits(0)), METHODS[method].hyperparameters)


def test_half_precision_logits_are_summed_in_single_precision():
    scores = logits(0).float()
    logp, _ = answer_logp(scores.bfloat16(), LABELS)
    expected, _ = answer_logp(scores.bfloat16().float(), LABELS)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, expected)
