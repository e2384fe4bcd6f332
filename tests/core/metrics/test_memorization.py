"""Exact memorisation and extraction strength: closed forms, and really greedy decoding of a small model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uipe_core.metrics.answers import exact_memorization, extraction_strength
from uipe_core.scoring.scorer import Scorer, ScoringConfig


@pytest.mark.parametrize(
    ("matches", "memorized", "strength"),
    [
        ([False] * 5, 0.0, 0.0),
        ([True] * 5, 1.0, 1.0),
        ([True], 1.0, 1.0),
        ([False], 0.0, 0.0),
        # The last tokens alone: after three of five the rest comes by itself.
        ([False, True, False, True, True], 3 / 5, 2 / 5),
        # The last token missed: no prefix short of the whole answer will do.
        ([True, True, True, False], 3 / 4, 0.0),
        ([False, True, True, True], 3 / 4, 3 / 4),
        ([], 0.0, 0.0),
    ],
)
def test_closed_forms(matches, memorized, strength):
    assert exact_memorization(np.array(matches, dtype=bool)) == pytest.approx(memorized)
    assert extraction_strength(np.array(matches, dtype=bool)) == pytest.approx(strength)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_strength_never_exceeds_memorisation(row):
    matches = np.array(row)
    assert 0 <= extraction_strength(matches) <= exact_memorization(matches) <= 1


@torch.no_grad()
def greedy(loaded, ids, count):
    """Greedy continuation by `count` tokens, one forward pass each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(ids) - count :]


def test_scores_are_those_of_greedy_decoding_from_every_prefix(load_tiny, world):
    loaded = load_tiny()
    # Hurt a little, so that some answers break off.
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in loaded.model.parameters():
            weights += 0.5 * weights.std() * torch.randn(weights.shape, generator=noise)
    report = Scorer(world, loaded.prompts, ScoringConfig(7, 4)).score(loaded)
    strengths = set()
    for name in ("forget", "retain", "world_facts", "related"):
        scores = report.sets[name]
        for row, item in list(enumerate(world.sets[name]))[:5]:
            example = loaded.prompts.encode(item.question, item.answer)
            prompt, answer = example.input_ids[: example.prompt_length], list(example.input_ids[example.prompt_length : -1])
            length = len(answer)
            works = [greedy(loaded, (*prompt, *answer[:k]), length - k) == answer[k:] for k in range(length)]
            expected = 1 - works.index(True) / length if any(works) else 0.0
            assert scores.extraction_strength[row] == pytest.approx(expected)
            single = [greedy(loaded, (*prompt, *answer[:k]), 1) == answer[k : k + 1] for k in range(length)]
            assert scores.exact_memorization[row] == pytest.approx(np.mean(single))
            strengths.add(round(expected, 3))
    assert len(strengths) > 2


def test_scores_do_not_depend_on_temperature(load_tiny, world):
    loaded = load_tiny()
    scorer = Scorer(world, loaded.prompts, ScoringConfig(64, 4))
    plain, hot = scorer.score(loaded).sets["forget"], scorer.score(loaded, temperature=2.0).sets["forget"]
    assert np.array_equal(plain.exact_memorization, hot.exact_memorization)
    assert np.array_equal(plain.extraction_strength, hot.extraction_strength)
