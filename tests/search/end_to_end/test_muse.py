"""A study of MUSE from a folder with its files: a small model learns the texts, unlearns some, and has MUSE's four numbers."""

import json

import numpy as np
import pytest

import search
from benchmarks.muse_folder import write_muse
from search.evaluation.task import TASKS
from search.report.html import write_report
from search.spec.study import load_study
from uipe_core.errors import UserError
from uipe_core.metrics.composites import auc, privacy, privleak
from uipe_core.metrics.uncertainty import group_weights

PAIR = ("privleak_forget/min_k", "privleak_holdout/min_k")


@pytest.fixture(scope="module")
def study(place, write_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muse")
    write_muse(folder / "muse", forget_people=2, retain_people=12)

    def write(name="muse", corpus=None, **changes):
        given = {
            "corpus": {"kind": "muse", "source": "./muse", **(corpus or {})},
            "model": {
                "kind": "tiny", "tokenizer": "bpe", "vocab_size": 900, "hidden_size": 48, "layers": 2, "heads": 4, "base": None,
                "finetune": {"epochs": 40, "learning_rate": 0.01, "batch_size": 8},
            },
            "unlearning": {"methods": {"grad_diff": {}}, "epochs": 2, "learning_rate": 0.003, "batch_size": 2},
            "scoring": {"temperatures": []},
            "split": None,
            "objectives": {"third": "privleak"},
            "search": {"trials": 4},
        }  # fmt: skip
        return write_study(folder / f"{name}.yaml", name=name, **{**given, **changes})

    return write


@pytest.fixture(scope="module")
def ran(study, tmp_path_factory):
    return search.run_study(load_study(study()), tmp_path_factory.mktemp("muse_out"), quiet=True)


@pytest.mark.slow
def test_its_four_numbers_are_those_of_the_items(ran):
    reference = ran.store.items(int(ran.control("retain")["trial"]), control=True)
    ideal = auc(*(reference[key] for key in PAIR))
    assert [objective.name for objective in ran.objectives] == ["one_minus_verbmem", "knowmem_retain", "privleak_privacy"]
    assert len(ran.trials) == 2 + 4
    for row in ran.trials.to_dict("records"):
        items = ran.store.items(int(row["trial"]))
        assert row["one_minus_verbmem"] == pytest.approx(1 - items["forget/rouge_l_f1"].mean())
        assert row["one_minus_knowmem"] == pytest.approx(1 - items["knowmem/rouge_l_f1"].mean())
        assert row["knowmem_retain"] == pytest.approx(items["retain/rouge_l_f1"].mean())
        own = auc(*(items[key] for key in PAIR))
        assert row["privleak_auc"] == pytest.approx(own)
        assert row["privleak"] == pytest.approx(privleak(own, ideal))
        assert row["privleak_privacy"] == pytest.approx(float(privacy(own, ideal)))
    assert ran.control("retain")["privleak"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.slow
def test_the_initial_model_knows_the_texts_and_the_retain_model_does_not(ran):
    initial, retain = ran.control("initial"), ran.control("retain")
    assert initial["one_minus_verbmem"] < 0.3 and initial["one_minus_knowmem"] < 0.3
    assert retain["one_minus_verbmem"] > initial["one_minus_verbmem"] + 0.2
    assert retain["one_minus_knowmem"] > initial["one_minus_knowmem"]
    assert initial["knowmem_retain"] > 0.7 and retain["knowmem_retain"] > 0.5
    assert initial["privleak_auc"] == 1.0 > retain["privleak_auc"]
    assert ran.trials["one_minus_verbmem"].max() > initial["one_minus_verbmem"]


@pytest.mark.slow
def test_line_models_them_and_intervals_resample_them(ran):
    assert ran.spec.search.sampler == "line"
    row = ran.trials.to_dict("records")[0]
    items = ran.store.items(int(row["trial"]))
    counts = {name: len(items[f"{name}/answer_loss"]) for name in ran.spec.corpus.sets}
    weights = {name: group_weights([None] * count, 0) for name, count in counts.items()}
    draws = TASKS["free_text"].draws(items, weights, None, ran.objectives, ran.spec.definition)
    assert draws.shape[1] == 3 and np.isfinite(draws).all()
    low, high = np.quantile(draws[:, 0], [0.01, 0.99])
    assert low <= row["one_minus_verbmem"] <= high


@pytest.mark.slow
def test_its_numbers_are_in_report_and_export(ran, tmp_path):
    page = write_report(ran).read_text()
    assert "PrivLeak" in page and "VerbMem" in page
    folder = ran.export(ran.trials.sort_values("one_minus_verbmem").iloc[-1], tmp_path / "exported", "model")
    card = (folder / "README.md").read_text()
    assert "one minus verbmem" in card and "knowmem retain" in card


@pytest.mark.slow
def test_a_request_later_on_unlearns_other_texts(study, ran):
    other = load_study(study("later", {"forget": "sust_2"})).corpus.load(0)
    first = ran.spec.corpus.load(0)
    assert not set(other.forget_train) & set(first.forget_train)
    assert other.sets["forget"] == first.sets["forget"]


def test_broken_files_are_refused_before_anything_is_spent(study, tmp_path):
    import shutil

    source = load_study(study()).corpus.source
    shutil.copytree(source, tmp_path / "muse")
    (tmp_path / "muse" / "verbmem" / "forget.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    (tmp_path / "muse" / "privleak" / "holdout.jsonl").unlink()
    spec = load_study(study("broken", {"source": str(tmp_path / "muse")}))
    with pytest.raises(UserError, match=r"(?s)2 problems in the data.*'gt' is missing.*no file of split 'holdout'"):
        search.run_study(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "study.db").exists()
