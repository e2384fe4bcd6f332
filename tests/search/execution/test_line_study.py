"""The sampler that knows the line in a study that is really run, and the inner products it rests on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.trial import TrialState

from benchmarks.recorded.record import gram_of_study
from search.evaluation.evaluator import StudyContext
from search.evaluation.prepared import prepare
from search.execution.base_runs import BaseRuns
from search.execution.capacity import ClusterCapacity
from search.execution.line_inputs import InnerProducts, line_sampler
from search.execution.ray_cluster import connected
from search.report.progress import Bars
from search.samplers.gram import FILE, NOTHING, StudyGram, extend_gram, keep_gram, kept_gram
from search.samplers.registry import SAMPLERS
from search.spec.study import load_study
from search.store.study_store import StudyStore
from uipe_core.deltas.gram import gram_matrix
from uipe_core.deltas.store import DeltaStore
from uipe_core.logs.tofu import read_log
from uipe_core.models.loading import ModelSource


def base_runs(result):
    """In the order of the study; the record has them as they came."""
    recorded = result.store.record.base_runs
    return {label: ([recorded[label].delta], epochs) for label, epochs in result.spec.base_epochs().items()}


def ordered(gram, labels):
    """Inner products in the order of these base runs and their epochs."""
    rows = [gram.places[label, epoch] for label in labels for epoch in range(1, gram.runs[label][1] + 1)]
    return gram.gram[np.ix_(rows, rows)]


def test_the_study_kept_the_inner_products_of_its_update_vectors(finished, result, preparation):
    kept = kept_gram(finished.out / FILE)
    assert set(kept.runs) == {"grad_diff", "npo"}
    deltas = DeltaStore(preparation.delta_root)
    updates = [deltas.open(keys).load(epoch) for keys, count in base_runs(result).values() for epoch in range(1, count + 1)]
    flat = np.stack([np.concatenate([tensor.double().numpy().ravel() for tensor in each.tensors.values()]) for each in updates])
    assert np.allclose(ordered(kept, ["grad_diff", "npo"]), flat @ flat.T, rtol=1e-6)
    assert np.allclose(ordered(kept, ["npo", "grad_diff"]), flat[[2, 3, 0, 1]] @ flat[[2, 3, 0, 1]].T, rtol=1e-6)


def counted(monkeypatch):
    """How many inner products were known, and how many update vectors there were, each time some were computed."""
    calls = []

    def count(updates, known):
        calls.append((len(known), len(updates)))
        return gram_matrix(updates, known)

    monkeypatch.setattr("search.samplers.gram.gram_matrix", count)
    return calls


def test_each_pair_is_computed_once_as_base_runs_come(result, preparation, monkeypatch):
    calls, deltas, runs = counted(monkeypatch), DeltaStore(preparation.delta_root), base_runs(result)
    first = extend_gram(NOTHING, {"npo": runs["npo"]}, deltas)
    # The study names grad_diff first, but npo's rows stay where they are.
    both = extend_gram(first, runs, deltas)
    assert calls == [(0, 2), (2, 4)]
    assert both.places == {("npo", 1): 0, ("npo", 2): 1, ("grad_diff", 1): 2, ("grad_diff", 2): 3}
    whole = extend_gram(NOTHING, runs, deltas)
    assert list(whole.runs) == ["grad_diff", "npo"]
    np.testing.assert_allclose(ordered(both, ["grad_diff", "npo"]), whole.gram, rtol=1e-12)
    assert extend_gram(both, runs, deltas).gram.tobytes() == both.gram.tobytes()
    assert len(calls) == 3


def test_products_of_a_base_run_that_is_another_now_are_computed_anew(result, preparation, monkeypatch):
    calls, deltas, runs = counted(monkeypatch), DeltaStore(preparation.delta_root), base_runs(result)
    known = StudyGram({"npo": (["another"], 2), "grad_diff": runs["grad_diff"]}, 7e9 * np.ones((4, 4)))
    gram = extend_gram(known, runs, deltas)
    assert calls == [(2, 4)]
    assert list(gram.runs) == ["grad_diff", "npo"]
    assert (gram.gram == 7e9).sum() == 4


def test_a_recorded_table_takes_the_kept_ones(copied, result, preparation, monkeypatch):
    calls = counted(monkeypatch)
    np.testing.assert_array_equal(gram_of_study(preparation, copied), ordered(kept_gram(copied / FILE), ["grad_diff", "npo"]))
    assert calls == []
    (copied / FILE).unlink()
    gram_of_study(preparation, copied)
    assert calls == [(0, 4)]
    assert kept_gram(copied / FILE).among(base_runs(result)).gram.shape == (4, 4)


def test_while_a_study_runs_workers_are_asked_for_what_has_come_only(result, preparation, tmp_path):
    runs, said, published = BaseRuns(ClusterCapacity(1)), [], base_runs(result)

    def begun(root):
        return InnerProducts(runs, result.spec.base_epochs(), root, tmp_path, said.append)

    with connected(result.spec, tmp_path, Bars(quiet=True)):
        products = begun(preparation.delta_root)
        runs.publish("npo", SimpleNamespace(keys=tuple(published["npo"][0])))
        first = products.lines()
        assert first.vectors == {("npo", 1): 0, ("npo", 2): 1}
        # What is known is not read again: it comes back as it went, whatever it was.
        keep_gram(tmp_path / FILE, StudyGram({"npo": published["npo"]}, 7 * np.eye(2)))
        products = begun(preparation.delta_root)
        runs.publish("grad_diff", SimpleNamespace(keys=tuple(published["grad_diff"][0])))
        assert products.lines().gram.shape == (2, 2)
        for _ in range(600):
            products.poll(0.1)
            if len(products.lines().vectors) == 4:
                break
        kept = kept_gram(tmp_path / FILE)
        assert kept.gram.tobytes() == products.lines().gram.tobytes()
        np.testing.assert_array_equal(kept.gram[:2, :2], 7 * np.eye(2))
        alone = extend_gram(NOTHING, {"grad_diff": published["grad_diff"]}, DeltaStore(preparation.delta_root))
        np.testing.assert_allclose(kept.gram[2:, 2:], alone.gram)
        assert said == []
        (tmp_path / FILE).unlink()
        products = begun(tmp_path / "emptied")
        assert products.lines() is None
        assert len(said) == 1
        assert "inner products of the update vectors" in said[0]
        assert said[0].endswith("the sampler goes on without them")


def test_no_other_sampler_had_to_propose(finished, result):
    assert result.spec.search.sampler == "line"
    assert "sampler line" not in finished.stderr
    alphas = [trial.params["alpha"] for trial in result.store.study.trials if trial.params["alpha"] != 0]
    # Others draw alphas of any number of digits.
    assert len(alphas) == 5 == sum(alpha == round(alpha, 4) for alpha in alphas)


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "other runs", "other shape", "not finite"])
def test_kept_inner_products_that_do_not_fit_are_computed_anew(finished, result, tmp_path, damage):
    file, runs = tmp_path / FILE, base_runs(result)
    content = (finished.out / FILE).read_bytes()
    kept = kept_gram(finished.out / FILE)
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        file.write_text("no archive")
    elif damage == "other runs":
        file.write_bytes(content)
        runs = {label: (["another"], count) for label, (_, count) in runs.items()}
    elif damage in ("other shape", "not finite"):
        gram = kept.gram[1:] if damage == "other shape" else kept.gram * np.nan
        np.savez(file, runs=np.array(json.dumps(kept.runs)), gram=gram)
    assert kept_gram(file).among(runs).gram.shape == (0, 0)


@pytest.fixture
def resumed(copied, finished):
    """The finished study open for another run, and what its sampler gets."""
    preparation = prepare(load_study(finished.file))
    store = StudyStore.create(copied, preparation.spec, preparation.fingerprint, preparation.facts())
    names = ("initial", "retain")
    context = StudyContext(
        corpus=preparation.corpus,
        split=preparation.split,
        source=ModelSource("nowhere", "nothing"),
        deltas=preparation.delta_root,
        references={name: read_log(copied / "logs" / f"{name}.json") for name in names},
        scoring=preparation.scoring,
        definition="tofu",
        objectives=preparation.spec.maximised,
        seed=0,
        threads=1,
    )
    yield store, context
    store.close()


def test_multiple_choice_has_no_losses_to_follow_and_that_is_said(resumed):
    from types import SimpleNamespace

    from search.execution.study_run import StudyRun

    store, context = resumed
    said = []
    run = StudyRun(SimpleNamespace(spec=store.spec), store, SimpleNamespace(say=said.append))
    choices = replace(context, corpus=replace(context.corpus, choices={"forget": (), "utility": ()}))
    assert run._inner_products(choices, None) is None
    assert len(said) == 1
    assert "multiple choice" in said[0]
    assert "tpe" in said[0]


def test_a_resumed_study_proposes_from_the_kept_items_what_is_new(resumed, result):
    store, context = resumed
    from search.samplers.line import UpdateVectors

    kept = kept_gram(store.out / FILE)
    lines = UpdateVectors(kept.places, kept.gram)
    said = []
    damaged = store.out / "items" / "trials" / "00002.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    store.use_sampler(line_sampler(store, context, lambda: lines, SAMPLERS["tpe"].make(0), 0, said.append))
    known = {(trial.params["base"], trial.params["epoch"], trial.params["alpha"]) for trial in store.study.trials}
    space = store.spec.search_space()
    jobs = [store.ask_point(space)[1] for _ in range(4)]
    points = {(job.base, job.epoch, job.alpha) for job in jobs}
    assert len(points) == 4
    assert not points & known
    assert all(job.alpha == round(job.alpha, 4) and -1 < job.alpha <= 2 for job in jobs)
    assert len(said) == 1
    assert "00002.npz" in said[0]
    assert "damaged" in said[0]
    assert sum(trial.state == TrialState.RUNNING for trial in store.study.get_trials()) == 4
