"""The sampler that knows the line in a study that is really run, and the inner products it rests on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import TrialState

from search.evaluator import StudyContext
from search.inner_products import FILE, kept_gram
from search.line_study import line_sampler
from search.measures import read_report
from search.preparation import prepare
from search.samplers import make_sampler
from search.space import distributions
from search.spec import load_study
from search.study_store import StudyStore
from search.workers import inner_products
from uipe_core.delta_store import DeltaStore
from uipe_core.models import ModelSource


def base_runs(result):
    """In the order of the study; the record has them as they came."""
    recorded = result.store.record["base_runs"]
    return {label: ([recorded[label]["delta"]], epochs) for label, epochs in result.spec.base_epochs().items()}


def test_the_study_kept_the_inner_products_of_its_update_vectors(finished, result, preparation):
    kept = kept_gram(finished.out / FILE, base_runs(result))
    assert kept is not None
    name, gram = kept
    assert list(json.loads(name)) == ["grad_diff", "npo"]
    deltas = DeltaStore(preparation.delta_root)
    updates = [deltas.open(keys).load(epoch) for keys, count in base_runs(result).values() for epoch in range(1, count + 1)]
    flat = np.stack([np.concatenate([tensor.double().numpy().ravel() for tensor in each.tensors.values()]) for each in updates])
    assert np.allclose(gram, flat @ flat.T, rtol=1e-6)
    assert np.allclose(gram, inner_products(preparation.delta_root, base_runs(result)))


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
    name, gram = kept_gram(finished.out / FILE, runs)
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        file.write_text("no archive")
    elif damage == "other runs":
        file.write_bytes(content)
        runs = {label: (["another"], count) for label, (_, count) in runs.items()}
    elif damage in ("other shape", "not finite"):
        np.savez(file, runs=np.array(name), gram=gram[1:] if damage == "other shape" else gram * np.nan)
    assert kept_gram(file, runs) is None


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
        methods={},
        references={name: read_report(copied / "logs" / f"{name}.json", choices=False) for name in names},
        scoring=preparation.scoring,
        definition="tofu",
        seed=0,
        threads=1,
    )
    yield store, context
    store.close()


def test_multiple_choice_has_no_losses_to_follow_and_that_is_said(resumed):
    from types import SimpleNamespace

    from search.runner import _Run

    store, context = resumed
    said = []
    run = _Run(SimpleNamespace(spec=store.spec), store, SimpleNamespace(say=said.append))
    choices = replace(context, corpus=replace(context.corpus, choices={"forget": (), "utility": ()}))
    assert run._inner_products(choices, None) is None
    assert len(said) == 1
    assert "multiple choice" in said[0]
    assert "tpe" in said[0]


def test_a_resumed_study_proposes_from_the_kept_items_what_is_new(resumed, result):
    store, context = resumed
    from search.line_sampler import Lines

    _, gram = kept_gram(store.out / FILE, base_runs(result))
    lines = Lines(
        {(base, epoch): 2 * row + epoch - 1 for row, base in enumerate(("grad_diff", "npo")) for epoch in (1, 2)}, gram
    )
    said = []
    damaged = store.out / "items" / "trials" / "00002.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    store.use_sampler(line_sampler(store, context, lambda: lines, make_sampler("tpe", 0), 0, said.append))
    known = {(trial.params["base"], trial.params["epoch"], trial.params["alpha"]) for trial in store.study.trials}
    space = distributions(store.spec)
    jobs = [store.ask_point(space)[1] for _ in range(4)]
    points = {(job.base, job.epoch, job.alpha) for job in jobs}
    assert len(points) == 4
    assert not points & known
    assert all(job.alpha == round(job.alpha, 4) and -1 < job.alpha <= 2 for job in jobs)
    assert len(said) == 1
    assert "00002.npz" in said[0]
    assert "damaged" in said[0]
    assert sum(trial.state == TrialState.RUNNING for trial in store.study.get_trials()) == 4
