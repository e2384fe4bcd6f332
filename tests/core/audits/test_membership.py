"""Membership: parity with open-unlearning, AUC against its definition, and what is read from a model."""

import json
import math
import os
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.audits.membership import (
    TokenScores,
    loss,
    membership_scores,
    min_k_plus_plus,
    zlib_ratio,
)
from uipe_core.audits.token_scores import read_token_scores
from uipe_core.corpora.types import Item
from uipe_core.errors import UserError
from uipe_core.metrics.answers import min_k
from uipe_core.metrics.composites import auc, privacy, privleak
from uipe_core.scoring.batch_sizes import BatchSize

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
PARITY = SHARED / "parity"
needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"no values of open-unlearning next to the checkout ({PARITY.name}) or in UIPE_SHARED_DATA"
)


def published():
    return json.loads((PARITY / "expected.json").read_text())["membership"]


def from_logits(name):
    """Token scores of the answers of a set there, computed here in double precision."""
    with np.load(PARITY / "inputs.npz") as arrays:
        logits, labels = arrays[f"{name}_current"], arrays[f"{name}_labels"]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = []
    for row, own in zip(logs[:, :-1], labels[:, 1:], strict=True):
        chosen, targets = row[own != -100], own[own != -100]
        weights = np.exp(chosen)
        means = (weights * chosen).sum(axis=-1)
        deviations = np.sqrt((weights * (chosen - means[:, None]) ** 2).sum(axis=-1))
        found.append(TokenScores(chosen[np.arange(len(targets)), targets], means, deviations))
    return found


@needs_parity
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_scores_are_those_of_open_unlearning(name):
    found = membership_scores(from_logits(name), [""] * 3)
    expected = published()["scores"][name]
    for theirs, ours in (("loss", "loss"), ("min_k_0.4", "min_k"), ("min_k_plus_plus_0.4", "min_k_plus_plus")):
        np.testing.assert_allclose(found[ours], expected[theirs], rtol=0, atol=1e-6)


@needs_parity
def test_aucs_are_those_of_open_unlearning():
    members, others = (membership_scores(from_logits(name), [""] * 3) for name in ("forget", "retain"))
    expected = published()["auc_forget_member"]
    for theirs, ours in (("loss", "loss"), ("min_k_0.4", "min_k"), ("min_k_plus_plus_0.4", "min_k_plus_plus")):
        assert auc(members[ours], others[ours]) == pytest.approx(expected[theirs], abs=1e-12)


@needs_parity
def test_privleak_is_that_of_open_unlearning():
    for name, value in published()["privleak"].items():
        found, reference = (float(part.lstrip("aucref")) for part in name.split("_"))
        assert privleak(found, reference) == pytest.approx(value, rel=1e-12)


@needs_parity
def test_compressed_sizes_are_those_of_open_unlearning():
    for text, size in published()["zlib_bytes"].items():
        assert zlib_ratio(np.array([-2.0, -4.0]), text) == pytest.approx(3.0 / size)


def test_privleak_against_chance_is_the_distance_from_it():
    assert privleak(0.5) == 0.0
    assert privleak(1.0) == pytest.approx(-100)
    assert privleak(0.0) == pytest.approx(100)


@given(st.floats(0, 1), st.none() | st.floats(0.01, 0.99))
def test_privacy_is_best_at_the_reference_and_0_at_the_worst_auc(found, reference):
    ideal = 0.5 if reference is None else reference
    worst = 0.0 if ideal > 0.5 else 1.0
    assert privacy(ideal, reference) == 1.0 and privacy(worst, reference) == pytest.approx(0.0)
    assert privacy(found, reference) == pytest.approx(1 - abs(found - ideal) / abs(worst - ideal))


numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12).map(np.array)


@settings(deadline=None)
@given(members=numbers, others=numbers)
def test_auc_counts_pairs_and_half_of_ties(members, others):
    pairs = [(other > member) + (other == member) / 2 for member, other in product(members, others)]
    assert auc(members, others) == pytest.approx(np.mean(pairs), abs=1e-12)


@settings(deadline=None)
@given(members=numbers, others=numbers)
def test_auc_is_one_minus_itself_with_the_two_exchanged_and_blind_to_scale(members, others):
    assert auc(members, others) + auc(others, members) == pytest.approx(1.0)
    assert auc(np.exp(members), np.exp(others)) == pytest.approx(auc(members, others))


def test_auc_of_scores_that_are_no_numbers():
    assert math.isnan(auc(np.array([1.0, np.nan]), np.array([1.0])))
    assert auc(np.array([1.0]), np.array([np.inf])) == 1.0


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], [])])
def test_auc_needs_both_sets(members, others):
    with pytest.raises(UserError, match="at least one forget and one holdout item"):
        auc(np.array(members), np.array(others))


tokens = st.lists(st.floats(-20, 0), min_size=1, max_size=30).map(np.array)


@settings(deadline=None)
@given(values=tokens, share=st.floats(0.01, 1))
def test_the_least_likely_tokens_lose_at_least_the_mean(values, share):
    assert min_k(values, share) >= loss(values) - 1e-9
    assert min_k(values, 1.0) == pytest.approx(loss(values))
    assert min_k(values, share) == pytest.approx(-np.mean(sorted(values)[: max(1, math.floor(len(values) * share))]))


@settings(deadline=None)
@given(values=tokens, share=st.floats(0.01, 1), shift=st.floats(-3, 3))
def test_min_k_plus_plus_is_min_k_of_standardised_values(values, share, shift):
    found = min_k_plus_plus(values, np.full(len(values), shift), np.full(len(values), 2.0), share)
    assert found == pytest.approx((min_k(values, share) + shift) / 2, abs=1e-9)


def test_a_certain_model_divides_by_no_zero():
    assert min_k_plus_plus(np.array([0.0]), np.array([0.0]), np.array([0.0])) == 0.0
    assert min_k_plus_plus(np.array([-1.0]), np.array([0.0]), np.array([0.0])) == pytest.approx(1000)


def test_an_answer_of_one_token_keeps_it():
    one = TokenScores(np.array([-2.0]), np.array([-1.0]), np.array([1.0]))
    found = membership_scores([one], ["a"])
    assert found["min_k"] == [2.0]
    assert found["min_k_plus_plus"] == [1.0]
    assert found["zlib"] == [2.0 / len(zlib.compress(b"a"))]


def by_hand(loaded, item):
    """Token scores of an item from a pass of its own."""
    example = loaded.prompts.encode_item(item)
    with torch.no_grad():
        logs = loaded.model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(dim=-1)
    found = []
    for place in range(example.prompt_length, len(example.input_ids)):
        row = logs[place - 1]
        mean = float(sum(value.exp() * value for value in row))
        found.append((float(row[example.input_ids[place]]), mean, float(sum(v.exp() * (v - mean) ** 2 for v in row)) ** 0.5))
    return np.array(found).T


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_tokens_are_read_as_one_by_one(load_tiny, world, rows):
    loaded = load_tiny()
    items = world.sets["forget"][:4]
    found = read_token_scores(loaded, items, BatchSize(rows))
    for item, own in zip(items, found, strict=True):
        expected = by_hand(loaded, item)
        np.testing.assert_allclose([own.log_probabilities, own.means, own.deviations], expected, atol=2e-5)


def test_losses_are_those_of_the_scorer(load_tiny, world):
    from uipe_core.corpora.types import Corpus
    from uipe_core.scoring.scorer import Scorer, ScoringConfig

    loaded = load_tiny()
    known = world.sets["forget"]
    plain = Item("A plain text", " of its own.", perturbed_answers=known[0].perturbed_answers, plain=True)
    items = (*known, plain)
    corpus = Corpus("one", {"forget": items}, items, items)
    expected = Scorer(corpus, loaded.prompts, ScoringConfig(generation_length=1)).score(loaded).sets["forget"].answer_loss
    found = membership_scores(read_token_scores(loaded, items), [item.answer for item in items])
    np.testing.assert_allclose(found["loss"], expected, atol=1e-5)


def test_a_model_trained_on_the_items_knows_its_members(load_tiny, world):
    """Items with the answers exchanged are of the same kind, and the model has never seen them."""
    from dataclasses import replace

    loaded = load_tiny()
    items = world.sets["forget"]
    others = [replace(item, answer=item.perturbed_answers[0]) for item in items]
    scores = [membership_scores(read_token_scores(loaded, each), [item.answer for item in each]) for each in (items, others)]
    assert all(auc(scores[0][name], scores[1][name]) > 0.8 for name in scores[0])
