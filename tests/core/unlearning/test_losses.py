"""Unlearning objectives against loops over hand-made logits, against their limits and against open-unlearning's own values."""

import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from uipe_core.models.likelihood import answer_kl, answer_logits, answer_logp, item_kl, mean_answer_nll
from uipe_core.models.prompts import IGNORED, Example, pad_batch
from uipe_core.unlearning.methods import BOUNDS, METHODS, LossInputs, dual_step

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


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def item_kl_by_hand(initial, current):
    """TOFU's equation: items in turn, each the mean over all its tokens but the first."""
    items = []
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        terms = []
        for position in range(1, length):
            p = log_probabilities(initial[row, position - 1].tolist())
            q = log_probabilities(current[row, position - 1].tolist())
            terms.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        items.append(sum(terms) / len(terms))
    return sum(items) / len(items)


def inputs_of(scores, initial=None, retain=None):
    logp, tokens = answer_logp(scores, LABELS)
    return LossInputs(
        logp,
        tokens,
        initial_forget_logp=None if initial is None else answer_logp(initial, LABELS)[0],
        retain_nll=None if retain is None else mean_answer_nll(retain, LABELS),
        retain_kl=None if retain is None or initial is None else answer_kl(initial, retain, LABELS),
        retain_item_kl=None if retain is None or initial is None else item_kl(initial, retain, MASK),
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
    inputs = inputs_of(logits(0), initial=logits(2), retain=logits(1))
    for over, kl in (("item", item_kl_by_hand), ("answer", kl_by_hand)):
        loss = METHODS["kl_min"].loss(inputs, {"retain_weight": 2.5, "over": over})
        assert float(loss) == pytest.approx(sum(sums) / sum(counts) + 2.5 * kl(logits(2), logits(1)), rel=1e-5)


def test_item_kl_has_no_gradient_at_padding_and_counts_prompts():
    current = logits(0).requires_grad_()
    item_kl(logits(1), current, MASK).backward()
    carries = torch.zeros_like(MASK, dtype=torch.bool)
    carries[:, :-1] = MASK[:, 1:].bool()
    assert (current.grad.abs().sum(-1) > 0).tolist() == carries.tolist()


def test_a_batch_of_items_of_one_token_has_no_kl():
    assert float(item_kl(logits(0)[:, :1], logits(1)[:, :1], MASK[:, :1])) == 0.0


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


@pytest.mark.parametrize("beta", [0.1, 4.5])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_simnpo_is_its_formula_on_log_probabilities_per_token(beta, gamma, weight):
    sums, counts = by_hand(logits(0))
    retain_sums, _ = by_hand(logits(1))
    terms = [math.log(1 / (1 + math.exp(beta * s / c + gamma))) for s, c in zip(sums, counts, strict=True)]
    expected = -2 / beta * sum(terms) / len(terms) - weight * sum(retain_sums) / sum(counts)
    hyper = {"beta": beta, "gamma": gamma, "retain_weight": weight}
    loss = METHODS["simnpo"].loss(inputs_of(logits(0), retain=logits(1)), hyper)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_simnpo_without_margin_is_npo_against_a_certain_reference_with_beta_per_token(tokens):
    # With answers of one length, a reference that gives them probability 1 and beta / tokens, both are the same formula but
    # for the factor 2 / beta.
    logp = torch.tensor([-0.3, -2.0, -7.0], dtype=torch.float64)
    inputs = LossInputs(logp, torch.full((3,), tokens), initial_forget_logp=torch.zeros(3, dtype=torch.float64))
    simnpo = METHODS["simnpo"].loss(inputs, {"beta": 2.0, "gamma": 0.0, "retain_weight": 0.0})
    npo = METHODS["npo"].loss(inputs, {"beta": 2.0 / tokens, "retain_weight": 0.0})
    assert float(simnpo) == pytest.approx(float(npo) / tokens, rel=1e-12)


def test_simnpo_gradient_tends_to_gradient_ascent_per_answer_as_beta_vanishes():
    scores = logits(0).requires_grad_()
    logp, tokens = answer_logp(scores, LABELS)
    (logp / tokens).mean().backward()
    hyper = {"gamma": 0.0, "retain_weight": 0.0}
    errors = [
        float((gradient("simnpo", {"beta": beta, **hyper}, scores.detach()) - scores.grad).abs().max())
        for beta in (1.0, 0.1, 0.001)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * float(scores.grad.abs().max())


def test_a_margin_keeps_simnpo_pushing_on_answers_that_are_unlikely_already():
    # The weight of an answer is sigmoid((beta / tokens) log pi + gamma), twice.
    logp = torch.tensor([-6.0], dtype=torch.float64, requires_grad=True)
    for gamma in (0.0, 3.0):
        loss = METHODS["simnpo"].loss(LossInputs(logp, torch.tensor([2])), {"beta": 1.0, "gamma": gamma, "retain_weight": 0.0})
        (slope,) = torch.autograd.grad(loss, logp)
        assert float(slope) == pytest.approx(2 / (1 + math.exp(3.0 - gamma)) / 2, rel=1e-12)


def log_ratios(seed, **known):
    """LossInputs of three answers with log-probabilities drawn at random, in double precision."""
    drawn = -5 * torch.rand(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names = ("forget_logp", "initial_forget_logp", "refusal_logp", "initial_refusal_logp")
    return LossInputs(forget_tokens=torch.tensor([3, 1, 2]), **{**dict(zip(names, drawn, strict=True)), **known})


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_idk_dpo_is_its_formula(beta, weight):
    inputs = log_ratios(0, retain_nll=torch.tensor(0.7, dtype=torch.float64))
    rows = zip(
        *(
            getattr(inputs, name).tolist()
            for name in ("refusal_logp", "initial_refusal_logp", "forget_logp", "initial_forget_logp")
        ),
        strict=True,
    )
    terms = [math.log(1 / (1 + math.exp(-beta * ((r - r0) - (f - f0))))) for r, r0, f, f0 in rows]
    loss = METHODS["idk_dpo"].loss(inputs, {"beta": beta, "retain_weight": weight})
    assert float(loss) == pytest.approx(-2 / beta * sum(terms) / 3 + weight * 0.7, rel=1e-12)


def test_idk_dpo_is_npo_while_the_refusal_is_where_the_initial_model_has_it():
    hyper = {"beta": 0.5, "retain_weight": 0.0}
    inputs = log_ratios(0)
    inputs = replace(inputs, refusal_logp=inputs.initial_refusal_logp)
    assert float(METHODS["idk_dpo"].loss(inputs, hyper)) == pytest.approx(float(METHODS["npo"].loss(inputs, hyper)), rel=1e-12)


def test_idk_dpo_starts_at_indifference():
    inputs = log_ratios(0)
    inputs = replace(inputs, refusal_logp=inputs.initial_refusal_logp, forget_logp=inputs.initial_forget_logp)
    loss = METHODS["idk_dpo"].loss(inputs, {"beta": 0.5, "retain_weight": 0.0})
    assert float(loss) == pytest.approx(2 / 0.5 * math.log(2), rel=1e-12)


def test_idk_dpo_tends_to_ascent_on_the_answer_and_descent_on_the_refusal_as_beta_vanishes():
    inputs = log_ratios(0)
    forget, refusal = inputs.forget_logp.requires_grad_(), inputs.refusal_logp.requires_grad_()
    loss = METHODS["idk_dpo"].loss(inputs, {"beta": 1e-6, "retain_weight": 0.0})
    up, down = torch.autograd.grad(loss, (forget, refusal))
    assert up.tolist() == pytest.approx([1 / 3] * 3, rel=1e-4)
    assert down.tolist() == pytest.approx([-1 / 3] * 3, rel=1e-4)


FORGET = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
RETAIN = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
UP = torch.tensor([0.6, 0.8], dtype=torch.float64)


def steered(forget=FORGET, retain=RETAIN, initial=RETAIN - 1):
    none = torch.zeros(1)
    return LossInputs(
        none, none, forget_activations=forget, direction=UP, retain_activations=retain, initial_retain_activations=initial
    )


def test_rmu_is_its_formula():
    # The target is (3, 4): squares 4+4, 0+25, 9+16 over 3 * 2 entries; every retain entry is 1 away from where it was.
    loss = METHODS["rmu"].loss(steered(), {"layer": 0, "coefficient": 5.0, "retain_weight": 100.0})
    assert float(loss) == pytest.approx(58 / 6 + 100.0, rel=1e-12)


def test_rmu_is_zero_where_forget_is_on_target_and_retain_where_it_was():
    inputs = steered(forget=(5 * UP).expand(4, 2), initial=RETAIN)
    assert float(METHODS["rmu"].loss(inputs, {"layer": 0, "coefficient": 5.0, "retain_weight": 1.0})) == 0.0


def test_rmu_gradient_points_from_the_target_to_the_activations_and_leaves_the_frozen_ones_alone():
    forget, retain = FORGET.clone().requires_grad_(), RETAIN.clone().requires_grad_()
    loss = METHODS["rmu"].loss(steered(forget, retain), {"layer": 0, "coefficient": 5.0, "retain_weight": 3.0})
    away, drift = torch.autograd.grad(loss, (forget, retain))
    assert torch.allclose(away, 2 * (FORGET - 5 * UP) / 6)
    assert torch.allclose(drift, 3 * 2 * torch.ones(2, 2, dtype=torch.float64) / 4)


def test_rmu_without_retain_term_needs_no_retain_activations():
    inputs = steered(retain=None, initial=None)
    loss = METHODS["rmu"].loss(inputs, {"layer": 0, "coefficient": 5.0, "retain_weight": 0.0})
    assert float(loss) == pytest.approx(58 / 6, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("npo", {"beta": 0.5, "retain_weight": 2.0}),
        ("simnpo", {"beta": 2.0, "gamma": 0.5, "retain_weight": 2.0}),
        ("idk_dpo", {"beta": 0.5, "retain_weight": 2.0}),
        ("rmu", {"layer": 0, "coefficient": 5.0, "retain_weight": 2.0}),
    ],
)
def test_gradients_are_those_of_finite_differences(method, hyper):
    inputs = log_ratios(1, retain_nll=torch.tensor(0.7, dtype=torch.float64))
    inputs = replace(
        inputs, forget_activations=FORGET, direction=UP, retain_activations=RETAIN, initial_retain_activations=RETAIN - 1
    )
    moving = ("forget_logp", "refusal_logp", "retain_nll", "forget_activations", "retain_activations")
    values = tuple(getattr(inputs, name).clone().requires_grad_() for name in moving)

    def loss(*values):
        return METHODS[method].loss(replace(inputs, **dict(zip(moving, values, strict=True))), hyper)

    assert torch.autograd.gradcheck(loss, values)


def rows_of(scores, initial=None):
    """LossInputs of the answers' tokens, and what a retain batch would add."""
    chosen = LABELS[:, 1:] != IGNORED
    logp, tokens = answer_logp(scores, LABELS)
    return LossInputs(
        logp,
        tokens,
        forget_rows=scores[:, :-1][chosen],
        forget_targets=LABELS[:, 1:][chosen],
        initial_forget_rows=None if initial is None else initial[:, :-1][chosen],
        retain_nll=torch.tensor(0.7, dtype=torch.float64),
    )


def token_probabilities(inputs):
    rows = zip(inputs.forget_rows.tolist(), inputs.forget_targets.tolist(), strict=True)
    return [math.exp(log_probabilities(row)[target]) for row, target in rows]


@pytest.mark.parametrize(("beta1", "beta2"), [(1.0, 0.0), (0.5, 0.0), (5.0, 1.0)])
def test_weighted_ascent_is_its_formula(beta1, beta2):
    inputs = rows_of(logits(3))
    found = token_probabilities(inputs)
    expected = sum(p**beta1 * (1 - p) ** beta2 * math.log(p) for p in found) / len(found) + 2 * 0.7
    hyper = {"beta": beta1, "beta1": beta1, "beta2": beta2, "retain_weight": 2.0}
    for method in ("sat_imp", "wga") if beta2 == 0 else ("sat_imp",):
        assert float(METHODS[method].loss(inputs, hyper)) == pytest.approx(expected, rel=1e-12)


def test_weighted_ascent_lets_go_of_what_is_forgotten():
    scores = logits(3).requires_grad_()
    inputs = rows_of(scores)
    METHODS["wga"].loss(inputs, {"beta": 3.0, "retain_weight": 0.0}).backward()
    sizes = scores.grad[:, :-1][LABELS[:, 1:] != IGNORED].abs().sum(dim=1).tolist()
    found = token_probabilities(inputs)
    # The weight is a constant of the step: the gradient by the token's logit is p^beta (1 - p) / tokens.
    assert sizes == pytest.approx([2 * p**3 * (1 - p) / len(found) for p in found], rel=1e-9)


def test_ce_u_aims_at_the_rest_of_the_models_own_distribution():
    inputs = rows_of(logits(4))
    terms = []
    for row, target in zip(inputs.forget_rows.tolist(), inputs.forget_targets.tolist(), strict=True):
        p = [math.exp(value) for value in log_probabilities(row)]
        others = [token for token in range(VOCABULARY) if token != target]
        terms.append(-sum(p[token] / (1 - p[target]) * math.log(p[token]) for token in others))
    loss = METHODS["ce_u"].loss(inputs, {"retain_weight": 1.0})
    assert float(loss) == pytest.approx(sum(terms) / len(terms) + 0.7, rel=1e-12)


def test_undial_distils_the_initial_model_with_the_answer_lowered():
    initial = logits(6)
    inputs = rows_of(logits(5), initial)
    terms = []
    rows = zip(inputs.forget_rows.tolist(), inputs.initial_forget_rows.tolist(), inputs.forget_targets.tolist(), strict=True)
    for row, before, target in rows:
        before[target] -= 3.0
        aimed, own = log_probabilities(before), log_probabilities(row)
        terms.append(-sum(math.exp(a) * b for a, b in zip(aimed, own, strict=True)))
    loss = METHODS["undial"].loss(inputs, {"beta": 3.0, "retain_weight": 0.0})
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
PARITY = SHARED / "parity"
needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"no values of open-unlearning next to the checkout ({PARITY.name}) or in UIPE_SHARED_DATA"
)
COMPARED = {
    "wga_forget_beta1.0": ("wga", {"beta": 1.0}),
    "wga_forget_beta0.5": ("wga", {"beta": 0.5}),
    "satimp_forget": ("sat_imp", {"beta1": 5.0, "beta2": 1.0}),
    "ceu_ignore0": ("ce_u", {}),
    "npo_forget": ("npo", {"beta": 0.1}),
    "simnpo_forget": ("simnpo", {"beta": 4.5, "gamma": 0.0}),
    "dpo_refusal_over_forget": ("idk_dpo", {"beta": 0.1}),
    "idk_nll": ("idk_nll", {}),
    "grad_diff": ("grad_diff", {"retain_weight": 1.0}),
}
"""Losses whose definition is the same there and here: their name there; ours, and its hyperparameters."""


def given_batch(name, which="current"):
    """Logits, as leaves, and labels of a set there, in double precision."""
    with np.load(PARITY / "inputs.npz") as arrays:
        return torch.tensor(arrays[f"{name}_{which}"]).requires_grad_(which == "current"), torch.tensor(
            arrays[f"{name}_labels"]
        )


def doubled(logits, labels):
    """`answer_logp` in double precision, where the models' own numbers are rounded to fp32."""
    chosen = labels[:, 1:] != IGNORED
    logs = logits[:, :-1].log_softmax(dim=-1).gather(2, labels[:, 1:].clamp(min=0)[:, :, None])[:, :, 0]
    return torch.where(chosen, logs, 0.0).sum(dim=1), chosen.sum(dim=1)


def parity_inputs():
    """Leaves by set, and the inputs of a loss made of them."""
    (forget, labels), (initial, _) = given_batch("forget"), given_batch("forget", "initial")
    (retain, kept), (refusal, refused), (before, _) = (
        given_batch("retain"),
        given_batch("refusal"),
        given_batch("refusal", "initial"),
    )
    logp, tokens = doubled(forget, labels)
    chosen = labels[:, 1:] != IGNORED
    of_retain, of_refusal = doubled(retain, kept), doubled(refusal, refused)
    inputs = LossInputs(
        logp,
        tokens,
        forget_rows=forget[:, :-1][chosen],
        forget_targets=labels[:, 1:][chosen],
        initial_forget_rows=initial[:, :-1][chosen],
        initial_forget_logp=doubled(initial, labels)[0],
        retain_nll=-of_retain[0].sum() / of_retain[1].sum(),
        refusal_logp=of_refusal[0],
        refusal_tokens=of_refusal[1],
        initial_refusal_logp=doubled(before, refused)[0],
    )
    return {"forget": forget, "retain": retain, "refusal": refusal}, inputs


@needs_parity
@pytest.mark.parametrize("name", COMPARED)
def test_values_and_gradients_are_open_unlearnings(name):
    method, given = COMPARED[name]
    leaves, inputs = parity_inputs()
    loss = METHODS[method].loss(inputs, {"retain_weight": 0.0, **given})
    loss.backward()
    expected = json.loads((PARITY / "expected.json").read_text())[name]["loss"]
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-9)
    with np.load(PARITY / "gradients.npz") as arrays:
        known = {key.rsplit("__", 1)[1]: arrays[key] for key in arrays if key.rsplit("__", 1)[0] == name}
    assert known
    for leaf, gradient in known.items():
        assert np.abs(leaves[leaf].grad.numpy() - gradient).max() < 1e-9


@needs_parity
def test_alt_po_is_dpo_with_another_answer():
    inputs = parity_inputs()[1]
    loss = METHODS["alt_po"].loss(inputs, {"beta": 0.1, "retain_weight": 0.0})
    expected = json.loads((PARITY / "expected.json").read_text())["dpo_refusal_over_forget"]["loss"]
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-9)
    assert METHODS["alt_po"].substitutes and not METHODS["alt_po"].refuses


def test_pdu_flattens_logits_of_answers():
    inputs = rows_of(logits(7))
    terms = [(max(row) - sum(row) / len(row)) ** 2 for row in inputs.forget_rows.tolist()]
    loss = METHODS["pdu"].loss(inputs, {"retain_weight": 2.0})
    assert float(loss) == pytest.approx(sum(terms) / len(terms) + 2 * 0.7, rel=1e-12)


@needs_parity
def test_pdu_is_open_unlearnings_term_at_other_positions():
    # There the logits are those at the answer tokens themselves, here those from which they are predicted.
    forget, labels = given_batch("forget")
    expected = json.loads((PARITY / "expected.json").read_text())["pdu_forget"]["loss"]
    moved = replace(parity_inputs()[1], forget_rows=forget[labels != IGNORED])
    loss = METHODS["pdu"].loss(moved, {"retain_weight": 0.0})
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-9)
    loss.backward()
    with np.load(PARITY / "gradients.npz") as arrays:
        assert np.abs(forget.grad.numpy() - arrays["pdu_forget__forget"]).max() < 1e-9


def test_the_dual_variable_follows_the_retain_loss_and_stays_above_0():
    hyper = {"retain_weight": 1.0, "retain_limit": 0.5, "dual_rate": 2.0}
    assert dual_step(hyper, 0.9)["retain_weight"] == pytest.approx(1.8)
    assert dual_step(hyper, 0.2)["retain_weight"] == pytest.approx(0.4)
    assert dual_step(hyper, 0.0) == {**hyper, "retain_weight": 0.0}
    assert METHODS["pdu"].needs_retain({**hyper, "retain_weight": 0.0})


def test_methods_that_walk_back_learn_the_forget_set():
    sums, counts = by_hand(logits(0))
    inputs = inputs_of(logits(0), initial=logits(2), retain=logits(1))
    assert float(METHODS["task_vector"].loss(inputs, {})) == pytest.approx(-sum(sums) / sum(counts), rel=1e-5)
    loss = METHODS["memorize"].loss(inputs, {"retain_weight": 2.5})
    assert float(loss) == pytest.approx(-sum(sums) / sum(counts) + 2.5 * item_kl_by_hand(logits(2), logits(1)), rel=1e-5)


@needs_parity
def test_simnpo_is_eight_times_open_unlearnings_loss():
    # Forget term 0.125 and retain term 1 there, 1 and 8 here: AdamW sees no factor, clipping does.
    expected = json.loads((PARITY / "expected.json").read_text())
    retain = float(parity_inputs()[1].retain_nll.detach())
    theirs = 0.125 * expected["simnpo_forget"]["loss"] + retain
    ours = METHODS["simnpo"].loss(parity_inputs()[1], METHODS["simnpo"].hyperparameters)
    assert float(ours.detach()) == pytest.approx(8 * theirs, rel=1e-9)


@needs_parity
def test_kl_over_items_differs_by_the_padding():
    # "batchmean" there divides the sum over all positions of the padded batch by all of them.
    (current, _), (initial, _) = given_batch("retain"), given_batch("retain", "initial")
    with np.load(PARITY / "inputs.npz") as arrays:
        mask = torch.tensor(arrays["retain_mask"])
    p, q = (each.detach().log_softmax(dim=-1) for each in (initial, current))
    kl = (p.exp() * (p - q)).sum(dim=-1)
    expected = json.loads((PARITY / "expected.json").read_text())["kl_retain"]["loss"]
    assert float(kl.mean()) == pytest.approx(expected, abs=1e-9)
    items = [kl[row, : length - 1].mean() for row, length in enumerate(mask.sum(dim=1).tolist())]
    assert float(item_kl(initial, current, mask).detach()) == pytest.approx(float(sum(items) / len(items)), rel=1e-6)


def test_rmu_is_a_mean_over_tokens_where_open_unlearnings_is_one_over_items():
    lengths, goal = (2, 7, 3), torch.zeros(4, dtype=torch.float64)
    goal[0] = 1.0
    items = [torch.randn(count, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64) for count in lengths]
    means = [float((item - 5 * goal).square().mean()) for item in items]
    hyper = {"layer": 0, "coefficient": 5.0, "retain_weight": 0.0}

    def loss(some):
        inputs = replace(inputs_of(logits(0)), forget_activations=torch.cat(some), direction=goal)
        return float(METHODS["rmu"].loss(inputs, hyper))

    tokens = sum(count * mean for count, mean in zip(lengths, means, strict=True)) / sum(lengths)
    assert loss(items) == pytest.approx(tokens, rel=1e-9)
    assert loss(items) != pytest.approx(sum(means) / 3, rel=1e-2)
    same = [item[:2] for item in items]
    per_item = sum(float((item - 5 * goal).square().mean()) for item in same) / 3
    assert loss(same) == pytest.approx(per_item, rel=1e-9)  # items of one length


@needs_parity
def test_undial_differs_by_the_positions_that_are_no_answer():
    # There the mean is over all positions of the padded batch, and a label of -100 lowers the entry v - 100.
    (forget, labels), (initial, _) = given_batch("forget"), given_batch("forget", "initial")
    lowered = initial[:, :-1].clone()
    lowered.scatter_add_(
        2, (labels[:, 1:] % lowered.shape[2])[:, :, None], torch.full((*labels[:, 1:].shape, 1), -10.0).double()
    )
    theirs = -(lowered.softmax(dim=-1) * forget[:, :-1].log_softmax(dim=-1)).sum(dim=-1)
    expected = json.loads((PARITY / "expected.json").read_text())["undial_forget"]["loss"]
    assert float(theirs.mean().detach()) == pytest.approx(expected, abs=1e-9)
    ours = METHODS["undial"].loss(parity_inputs()[1], {"beta": 10.0, "retain_weight": 0.0})
    assert float(ours.detach()) == pytest.approx(float(theirs[labels[:, 1:] != IGNORED].mean().detach()), abs=1e-9)


@pytest.mark.parametrize("method", ["npo", "simnpo", "idk_dpo"])
def test_the_retain_term_adds_its_weight_times_the_retain_nll(method):
    inputs = log_ratios(2, retain_nll=torch.tensor(0.7, dtype=torch.float64))
    hyper = {**METHODS[method].hyperparameters, "beta": 1.0}
    without, with_term = ({**hyper, "retain_weight": weight} for weight in (0.0, 2.5))
    assert not METHODS[method].needs_retain(without)
    assert METHODS[method].needs_retain(with_term)
    difference = METHODS[method].loss(inputs, with_term) - METHODS[method].loss(inputs, without)
    assert float(difference) == pytest.approx(2.5 * 0.7, rel=1e-9)
    assert torch.equal(METHODS[method].loss(replace(inputs, retain_nll=None), without), METHODS[method].loss(inputs, without))


@pytest.mark.parametrize("method", ["grad_diff", "kl_min"])
def test_without_retain_weight_a_method_needs_no_retain_items(method):
    loss = METHODS[method].loss(inputs_of(logits(0)), {"retain_weight": 0.0, "over": "item"})
    assert torch.equal(loss, METHODS["grad_ascent"].loss(inputs_of(logits(0)), {}))
    assert not METHODS[method].needs_retain({"retain_weight": 0.0})


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("grad_diff", "retain_nll"),
        ("kl_min", "retain_item_kl"),
        ("npo", "initial_forget_logp"),
        ("simnpo", "retain_nll"),
        ("idk_dpo", "refusal_logp"),
        ("idk_nll", "refusal_tokens"),
        ("alt_po", "refusal_logp"),
        ("wga", "forget_rows"),
        ("sat_imp", "forget_rows"),
        ("ce_u", "forget_rows"),
        ("undial", "forget_rows"),
        ("pdu", "forget_rows"),
        ("memorize", "retain_item_kl"),
        ("rmu", "forget_activations"),
    ],
)
def test_a_missing_input_is_named(method, named):
    with pytest.raises(ValueError, match=named):
        METHODS[method].loss(inputs_of(logits(0)), METHODS[method].hyperparameters)


def test_methods_need_what_a_step_can_give():
    optional = {field.name for field in fields(LossInputs)} - {"forget_logp", "forget_tokens", "shares"}
    assert set().union(*(method.needs for method in METHODS.values())) == optional


def test_every_hyperparameter_has_a_bound_that_its_default_keeps():
    for method in METHODS.values():
        assert all(BOUNDS[name].holds(default) for name, default in method.hyperparameters.items())


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [
        ("beta", 0.0, False),
        ("beta", 1e-9, True),
        ("gamma", 0.0, True),
        ("gamma", -1e-9, False),
        ("retain_weight", 0.0, True),
        ("retain_weight", "item", False),
        ("over", "answer", True),
        ("over", "question", False),
        ("over", 1.0, False),
        ("layer", 0.0, True),
        ("layer", 7.0, True),
        ("layer", 0.5, False),
        ("layer", -1.0, False),
        ("coefficient", 0.0, False),
    ],
)
def test_bounds(name, value, holds):
    assert BOUNDS[name].holds(value) is holds


def test_half_precision_logits_are_summed_in_single_precision():
    scores = logits(0).float()
    logp, _ = answer_logp(scores.bfloat16(), LABELS)
    expected, _ = answer_logp(scores.bfloat16().float(), LABELS)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, expected)


class WithoutLogitsToKeep(LlamaForCausalLM):
    """A model whose forward knows no `logits_to_keep`, as remote code often does."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, WithoutLogitsToKeep])
def test_logits_of_prompts_that_all_answers_share_are_left_out(kind):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(LlamaConfig(vocab_size=11, **size)).eval()
    batch = pad_batch([Example((1, 2, 3, 4, 5, 6), 4), Example((1, 2, 3, 7, 8), 3)], 0, torch.device("cpu"))
    seen = []
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    with torch.no_grad():
        found, labels = answer_logits(model, batch)
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    # The first answer begins at position 3, which position 2 predicts: four of six are kept.
    assert found.shape == (2, 4, 11)
    assert seen[0] == (4 if kind is LlamaForCausalLM else 6)
    torch.testing.assert_close(found, whole[:, 2:])
    assert torch.equal(labels, batch.labels[:, 2:])
    for mine, all_positions in zip(answer_logp(found, labels), answer_logp(whole, batch.labels), strict=True):
        torch.testing.assert_close(mine, all_positions)
