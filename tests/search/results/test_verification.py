"""Exports of low-rank trials in every dtype: what was scored is what is written, and a merged model shows its own numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from search.evaluation.evaluator import Evaluator, StudyContext
from search.evaluation.prepared import prepare
from search.problem.trial import TrialSpec
from search.results import export as exporting
from search.results import verification
from search.results.export import export
from search.results.recipe import Recipe
from search.results.verification import VERIFICATIONS
from search.spec.study import load_study
from uipe_core.deltas.store import DeltaStore
from uipe_core.errors import ExportMismatchError, UserError
from uipe_core.logs.tofu import read_log
from uipe_core.models.loading import DTYPES, load_model
from uipe_core.models.tiny import tiny_model
from uipe_core.unlearning.training import train_base_run

ALPHA = 0.75


class Trial:
    """A trial of a low-rank update on a small Llama that is stored and scored in a dtype."""

    def __init__(self, dtype, finished, preparation, write_study, folder):
        initial = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
        loaded = load_model(str(initial), dtype=dtype)
        loaded.model.save_pretrained(folder / "initial")
        loaded.tokenizer.save_pretrained(folder / "initial")
        log = finished.out / "logs" / "retain.json"
        file = write_study(
            folder / "study.yaml",
            model={
                "kind": "pretrained",
                "initial": str(folder / "initial"),
                "retain": str(log),
                "dtype": dtype,
                "device": "cpu",
            },
            unlearning={
                "adapter": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
                "methods": {"npo": {"beta": 1}},
                "epochs": 1,
                "learning_rate": 0.02,
            },
            scoring={"temperatures": []},
        )
        self.preparation = prepare(load_study(file))
        run, source = self.preparation.spec.variants()[0], self.preparation.models.ready_source("initial")
        config = self.preparation.unlearning(run)
        training = train_base_run(source.load(), self.preparation.corpus, config)
        entry = DeltaStore(self.preparation.delta_root).get_or_train(self.preparation.base_run_inputs(config), training)
        self.reference = read_log(log)
        context = StudyContext(
            corpus=self.preparation.corpus,
            split=self.preparation.split,
            source=source,
            deltas=self.preparation.delta_root,
            references={"retain": self.reference, "initial": read_log(finished.out / "logs" / "initial.json")},
            scoring=self.preparation.scoring,
            definition="tofu",
            objectives=self.preparation.spec.maximised,
            seed=0,
            threads=1,
        )
        job = TrialSpec("search", base=run.label, epoch=1, alpha=ALPHA, delta=entry.keys)
        metrics, self.report = Evaluator(context).evaluate(job)
        self.items = self.report.arrays()
        provenance = {"corpus": "people", "models": dict(self.preparation.models.identities), "versions": {}}
        expected = {"definition": "tofu", **{name: metrics.numbers[name] for name in NUMBERS}}
        self.recipe = Recipe(self.preparation.spec, self.preparation.fingerprint, 7, run.label, 1, ALPHA, expected, provenance)

    def export(self, to, form, **options):
        return export(self.recipe, to, form, self.reference, items=self.items, **options)

    def score(self, folder):
        """Scores of a folder on the trial's items, in its batches."""
        loaded = replace(self.preparation.models.ready_source("initial"), location=str(folder)).load()
        verifier = verification.Verifier(self.recipe, self.preparation, "full", self.reference)
        return verifier._score(loaded, self.preparation.split.select, "", "full").arrays()


NUMBERS = ("model_utility", "forget_quality", "log10_forget_quality", "ks_statistic")


@pytest.fixture(scope="module", params=list(DTYPES))
def trial(request, finished, preparation, write_study, tmp_path_factory):
    return Trial(request.param, finished, preparation, write_study, tmp_path_factory.mktemp(request.param))


class Heard:
    def __init__(self):
        self.bars, self.lines = {}, []

    def show(self, name, done, total):
        self.bars[name] = (done, total)

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("verify", ["loss", "full"])
def test_an_adapter_has_the_scores_of_its_trial_to_the_bit(trial, tmp_path, verify):
    heard = Heard()
    folder = trial.export(tmp_path / "adapter", "adapter", verify=verify, watch=heard)
    again = trial.score(folder)
    assert again.keys() == trial.items.keys()
    assert all(np.array_equal(again[key], trial.items[key]) for key in again)
    assert [line.partition(" apart by ")[2].partition(" ")[0] for line in heard.lines] == ["0"] * len(heard.lines)
    assert len(heard.lines) == {"loss": 2, "full": 3}[verify]
    card = (folder / "README.md").read_text()
    assert f"| model utility | {trial.recipe.expected['model_utility']:.4f} | " in card
    assert ("not read" in card) == (verify == "loss")
    assert f"dtype: {trial.preparation.spec.model.dtype}" in card
    assert all(done == total for done, total in heard.bars.values()) and list(heard.bars) == [
        "scoring the export",
        "scoring the held-out items",
    ]


@pytest.mark.parametrize("verify", ["loss", "full"])
def test_a_merged_model_passes_and_its_own_numbers_are_on_the_card_next_to_the_trials(trial, tmp_path, verify):
    heard = Heard()
    folder = trial.export(tmp_path / "model", "model", verify=verify, watch=heard)
    card = (folder / "README.md").read_text()
    head = next(line for line in card.splitlines() if line.startswith("| metric"))
    assert head == "| metric | trial | this export | this export, held-out items |"
    ks = trial.recipe.expected["ks_statistic"]
    assert f"| KS statistic | {ks:.4f} | " in card and f"| ks_statistic | {ks:.6g} | " in card
    assert "numbers of its own" in card
    assert ("utility of the merged model was not read" in card) == (verify == "loss")
    assert ("the utility of the merged model was not read; --verify full reads it" in heard.lines) == (verify == "loss")
    assert list(heard.bars)[:3] == ["scoring the adapter", "measuring the rounding", "scoring the export"]
    apart = trial.score(folder)["retain/answer_loss"] - trial.items["retain/answer_loss"]
    assert np.abs(apart).max() < {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}[trial.preparation.spec.model.dtype]


def test_a_merged_model_that_is_off_by_more_than_rounding_is_withdrawn(trial, tmp_path, monkeypatch):
    def forgetting_the_update(recipe, preparation, folder):
        exporting.EXPORTERS["adapter"].write(replace(recipe, alpha=-1.0), preparation, folder)

    monkeypatch.setitem(exporting.EXPORTERS, "model", replace(exporting.EXPORTERS["model"], write=forgetting_the_update))
    with pytest.raises(ExportMismatchError, match=r"withdrawn.*item losses.*apart by"):
        trial.export(tmp_path / "out", "model")
    assert list(tmp_path.iterdir()) == []


def test_items_of_another_trial_withdraw_the_export(trial, tmp_path):
    other = {key: value + 0.01 if key.endswith("_loss") else value for key, value in trial.items.items()}
    for form in ("adapter", "model"):
        with pytest.raises(ExportMismatchError, match="item losses"):
            export(trial.recipe, tmp_path / form, form, trial.reference, items=other)


def test_an_export_that_is_not_checked_says_so(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(verification.Verifier, "_score", None)
    heard = Heard()
    card = (trial.export(tmp_path / "adapter", "adapter", verify="none", watch=heard) / "README.md").read_text()
    assert "was not checked" in card and f"| model_utility | {trial.recipe.expected['model_utility']:.6g} |" in card
    assert heard.bars == {}


def test_an_export_takes_the_threads_of_a_trial(trial, tmp_path):
    before, threads = torch.get_num_threads(), []
    resources = trial.recipe.spec.resources
    chosen = resources.model_copy(update={"trial": resources.trial.model_copy(update={"threads": 3})})
    recipe = replace(trial.recipe, spec=trial.recipe.spec.model_copy(update={"resources": chosen}))
    try:
        export(recipe, tmp_path / "out", "adapter", trial.reference, verify="none")
        threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert threads == [3]


def test_an_unknown_check_is_refused(trial, tmp_path):
    with pytest.raises(UserError, match=f"--verify: 'twice' is unknown; choose one of {', '.join(VERIFICATIONS)}"):
        trial.export(tmp_path / "out", "adapter", verify="twice")


def test_the_batches_are_those_of_the_trial(trial, monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(
        verification.Verifier,
        "check",
        lambda self, folder: sizes.append(self._recipe.expected.get("batch_size")) or verification.Verified("loss"),
    )
    export(replace(trial.recipe, expected={**trial.recipe.expected, "batch_size": 5}), tmp_path / "out", "adapter")
    assert sizes == [5]
