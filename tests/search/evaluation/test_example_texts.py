"""A few answers of every trial are kept as text, next to its scores and never among them."""

import numpy as np

from search.evaluation.metrics import EXAMPLES, LONGEST_TEXT, example_texts
from search.report.data import answers
from search.store.item_scores import ItemFiles
from uipe_core.metrics.scores import ScoreReport, SetScores


def scores(count, generated=True, text="yes"):
    ones, tokens = np.ones(count), np.ones(count, dtype=np.int64)
    texts = tuple(f"{text} {number}" for number in range(count))
    return SetScores(
        ones, tokens, ones, tokens, np.ones((count, 2)), np.ones((count, 2), dtype=np.int64), ones, ones,
        generated=texts if generated else None, questions=texts, answers=texts,
    )  # fmt: skip


def test_items_are_spread_over_their_set_and_long_texts_are_cut():
    found = example_texts(ScoreReport({"forget": scores(9), "related": scores(9, generated=False), "retain": scores(1)}))
    assert sorted(found) == ["texts/forget", "texts/retain"]
    assert found["texts/forget"][:, 0].tolist() == ["yes 0", "yes 4", "yes 8"]
    assert found["texts/forget"].shape == (EXAMPLES, 3) and found["texts/retain"].shape == (1, 3)
    long = example_texts(ScoreReport({"forget": scores(1, text="x" * 999)}))["texts/forget"][0, 2]
    assert len(long) == LONGEST_TEXT and long.endswith(" ...")


def test_texts_are_read_only_when_asked_for(tmp_path):
    from base64 import b64decode

    from search.execution.workers import pack_arrays

    (tmp_path / "items" / "trials").mkdir(parents=True)
    report = ScoreReport({"forget": scores(4)})
    files = ItemFiles(tmp_path)
    files.write(0, b64decode(pack_arrays({**report.arrays(), **example_texts(report)})))
    assert not any(name.startswith("texts/") for name in files.read(0))
    assert list(files.read(0, item_set="texts")) == ["texts/forget"]
    files.close()


def test_a_study_keeps_what_its_models_answer(result):
    kept = answers(result)
    assert {name for name, *_ in kept.items} == {"forget", "retain", "real_authors", "world_facts"}
    assert set(kept.of_trials) == set(result.trials["trial"])
    assert all(len(texts) == len(kept.items) for texts in kept.of_trials.values())
    # The initial model was taught its answers; trials that forgot say something else to some of them.
    assert any(
        before != after for texts in kept.of_trials.values() for (*_, before), after in zip(kept.items, texts, strict=True)
    )
