"""Batches that fit the memory there is: found, halved, and never a crash; the numbers stay the same."""

import numpy as np
import pytest
import torch

from uipe_core.corpora.types import ChoiceItem, Corpus
from uipe_core.scoring import batch_sizes
from uipe_core.scoring.batch_sizes import BatchSize, available_memory, find_batch_size, row_bytes, slices
from uipe_core.scoring.multiple_choice import ChoiceScorer
from uipe_core.scoring.scorer import Scorer, ScoringConfig

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(world):
    return Corpus("few", {name: items[::5] for name, items in world.sets.items()}, (), ())


@pytest.fixture
def narrow(load_tiny):
    """A small model for which more than so many rows at once are too much memory; what it has read lies in `seen`."""

    def make(rows):
        loaded = load_tiny()
        loaded.seen = []

        def hold(module, args, kwargs):
            count = len(kwargs["input_ids"])
            loaded.seen.append(count)
            if count > rows:
                raise torch.OutOfMemoryError(FULL)

        loaded.model.register_forward_pre_hook(hold, with_kwargs=True)
        return loaded

    return make


@pytest.mark.parametrize(("fits", "rows"), [(100, 32), (32, 32), (31, 16), (5, 4), (1, 1)])
def test_a_batch_that_is_too_large_comes_again_in_halves(fits, rows):
    size, done = BatchSize(32), []

    def work(batch):
        if len(batch) > fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        done.extend(batch)

    size.run(range(100), work, split=slices)
    assert done == list(range(100))
    assert size.rows == rows


def test_a_single_row_that_is_too_much_and_other_errors_are_told():
    size, tries = BatchSize(8), []

    def hungry(batch):
        tries.append(len(batch))
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        size.run(range(8), hungry, split=slices)
    assert tries == [8, 4, 2, 1]

    def broken(batch):
        tries.append(len(batch))
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        BatchSize(8).run(range(8), broken, split=slices)
    assert tries[4:] == [8]


def test_what_has_no_room_for_one_row_leaves_the_number_as_it_was():
    size = BatchSize(32)

    def work(batch):
        raise MemoryError

    with pytest.raises(MemoryError):
        size.run(range(50), work, split=slices)
    assert size.rows == 32


@pytest.mark.parametrize("rows", [6, 2])
def test_scores_and_texts_are_those_of_a_machine_with_more_memory(narrow, load_tiny, corpus, rows):
    config = ScoringConfig(32, 10)
    expected = Scorer(corpus, load_tiny().prompts, config).score(load_tiny())
    loaded = narrow(rows)
    scorer = Scorer(corpus, loaded.prompts, config)
    steps = []
    report = scorer.score(loaded, progress=lambda done, total: steps.append((done, total)))
    assert max(loaded.seen) > rows
    assert steps[-1][0] == steps[-1][1] == len(scorer.examples) + len(scorer._generated)
    for key, values in expected.arrays().items():
        np.testing.assert_allclose(report.arrays()[key], values, rtol=1e-4, atol=1e-5, err_msg=key)
    assert {name: scores.generated for name, scores in report.sets.items()} == {
        name: scores.generated for name, scores in expected.sets.items()
    }
    # What was found out holds for the next model, too.
    found = scorer.batch_size
    assert found < 32
    scorer.score(loaded)
    assert scorer.batch_size == found


def test_trees_that_are_too_large_come_again_in_halves(load_tiny, corpus):
    config = ScoringConfig(64, 4)
    expected = Scorer(corpus, load_tiny().prompts, config).score(load_tiny())
    loaded, seen = load_tiny(), []

    def hold(module, args, kwargs):
        if kwargs.get("position_ids") is None:
            return
        seen.append(kwargs["input_ids"].shape)
        if kwargs["input_ids"].numel() > 250:
            raise torch.OutOfMemoryError(FULL)

    loaded.model.register_forward_pre_hook(hold, with_kwargs=True)
    scorer = Scorer(corpus, loaded.prompts, config)
    report = scorer.score(loaded)
    trees = [tokens for rows, tokens in seen if rows == 1]
    assert max(trees) > 250 >= min(trees)
    assert scorer.batch_size < 64
    for key, values in expected.arrays().items():
        np.testing.assert_allclose(report.arrays()[key], values, rtol=1e-4, atol=1e-5, err_msg=key)


def test_letters_are_scored_in_halves_too(narrow, load_tiny):
    items = tuple(ChoiceItem(f"What is {n} and {n}?", ("1", "2", "3", "4"), n % 4) for n in range(20))
    corpus = Corpus("few", {}, (), (), choices={"forget": items[:6], "utility": items})
    expected = ChoiceScorer(corpus, load_tiny().prompts, None).score(load_tiny())
    loaded = narrow(3)
    scorer = ChoiceScorer(corpus, loaded.prompts, 16)
    report = scorer.score(loaded)
    assert scorer.batch_size == 2
    for name, scores in expected.sets.items():
        np.testing.assert_allclose(report.sets[name].log_likelihood, scores.log_likelihood, rtol=1e-4, atol=1e-5)


def test_on_the_cpu_the_usual_number_is_taken_or_what_memory_holds(load_tiny, corpus, monkeypatch):
    loaded = load_tiny()
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(None, 4))
    assert scorer.batch_size is None
    scorer.score(loaded)
    assert scorer.batch_size == 32
    assert available_memory() > 2**20
    one = row_bytes(loaded.model, 30, 10)
    monkeypatch.setattr(batch_sizes, "available_memory", lambda: 40 * one)
    assert find_batch_size(loaded.model, CPU, 30, 10, print) == 10
    monkeypatch.setattr(batch_sizes, "available_memory", lambda: 0)
    assert find_batch_size(loaded.model, CPU, 30, 10, print) == 1
    monkeypatch.setattr(batch_sizes, "available_memory", lambda: None)
    assert find_batch_size(loaded.model, CPU, 30, 10, print) == 32


@pytest.mark.parametrize(
    ("fits", "saturates", "rows"), [(10**6, 10**6, 1024), (10**6, 128, 128), (100, 10**6, 64), (20, 10**6, 16), (0, 1, 1)]
)
def test_on_a_gpu_the_number_is_doubled_while_that_helps(monkeypatch, fits, saturates, rows):
    def seconds(read, count, device):
        return None if count > fits else 1.0 + max(0, count - saturates) / saturates

    monkeypatch.setattr(batch_sizes, "_seconds", seconds)
    assert find_batch_size(None, CUDA, 30, 10, print) == rows


@pytest.mark.gpu
def test_a_number_is_found_on_a_gpu(load_tiny, corpus):
    loaded = load_tiny()
    loaded.model.cuda()
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(None, 4))
    scorer.score(loaded)
    assert 32 <= scorer.batch_size <= 1024
