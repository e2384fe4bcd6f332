"""Recorded tables: what is written is read again, what is broken is told, and a really scored study fits into one."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.recorded.record import collect_table, gram_of_study, record_table
from benchmarks.recorded.replay import report_of
from benchmarks.recorded.table import ScoreTable, read_table, write_table
from uipe_core.errors import UserError
from uipe_core.metrics.tofu import evaluate

ROOT = Path(__file__).parents[3]


def made_up(points=4, seed=0):
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(3, 9))
    return ScoreTable(
        meta={
            "study": "made-up",
            "seed": seed,
            "definition": "tofu",
            "objectives": ["log10_forget_quality", "model_utility"],
            "bases": [{"label": "npo", "method": "npo", "epochs": 2}, {"label": "rmu", "method": "rmu", "epochs": 1}],
            "alpha": {"low": -1.0, "high": 2.0},
            "items": {"forget": 5},
            "corner": [-2.4, 0.0],
            "ceilings": [-0.5, None],
            "constant": ["forget/answer_tokens"],
        },
        base=generator.integers(0, 2, points),
        epoch=np.ones(points, dtype=np.int64),
        alpha=generator.uniform(-1, 2, points),
        objectives=generator.normal(size=(points, 2)),
        arrays={
            "forget/answer_loss": generator.normal(size=(points, 5)).astype(np.float32),
            "forget/perturbed_loss": generator.normal(size=(points, 5, 3)).astype(np.float32),
            "forget/answer_tokens": np.arange(5),
        },
        initial={
            "forget/answer_loss": np.zeros(5, dtype=np.float32),
            "forget/perturbed_loss": np.zeros((5, 3), dtype=np.float32),
            "forget/answer_tokens": np.arange(5),
        },
        retain={"forget/answer_loss": np.ones(5, dtype=np.float32)},
        gram=vectors @ vectors.T,
    )


@pytest.fixture
def file(tmp_path):
    write_table(made_up(), tmp_path / "table.npz")
    return tmp_path / "table.npz"


def changed(file, **arrays):
    """The file with some of its arrays replaced, or left out where None."""
    with np.load(file) as archive:
        content = {**archive, **{name.replace("__", "/"): values for name, values in arrays.items()}}
    np.savez(file, **{name: values for name, values in content.items() if values is not None})


def meta_of(file):
    with np.load(file) as archive:
        return json.loads(str(archive["meta"]))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 6), st.integers(0, 2**31))
def test_what_is_written_is_read_again(tmp_path, points, seed):
    table = made_up(points, seed)
    write_table(table, tmp_path / "t.npz")
    again = read_table(tmp_path / "t.npz")
    assert {key: again.meta[key] for key in table.meta} == table.meta
    for name in ("base", "epoch", "alpha", "objectives", "gram"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    for part in ("arrays", "initial", "retain"):
        assert getattr(again, part).keys() == getattr(table, part).keys()
        for name, values in getattr(table, part).items():
            np.testing.assert_array_equal(getattr(again, part)[name], values)
            assert getattr(again, part)[name].dtype == values.dtype
    assert again.epochs == {"npo": 2, "rmu": 1}


def test_the_items_of_a_point_have_no_axis_of_points(file):
    table = read_table(file)
    items = table.items(2)
    np.testing.assert_array_equal(items["forget/perturbed_loss"], table.arrays["forget/perturbed_loss"][2])
    np.testing.assert_array_equal(items["forget/answer_tokens"], np.arange(5))


def refusal(file):
    with pytest.raises(UserError) as caught:
        read_table(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_a_table_that_is_missing_cut_off_or_altered_is_told(file, tmp_path):
    assert "no such file; `python -m benchmarks.recorded.record STUDY --out" in refusal(tmp_path / "other.npz")
    content = file.read_bytes()
    for part in (0, 1, 30, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:part])
        assert "cut off, damaged or no table" in refusal(file)
    middle = len(content) // 3
    file.write_bytes(content[:middle] + bytes(value ^ 255 for value in content[middle : middle + 40]) + content[middle + 40 :])
    assert "cut off, damaged or no table" in refusal(file)


def test_what_is_no_table_is_told(file):
    file.write_text("study: quickstart")
    assert "cut off, damaged or no table" in refusal(file)
    np.savez(file, answers=np.ones(3))
    assert "no table of scores; give a file that benchmarks/recorded wrote" in refusal(file)
    np.savez(file, meta=np.array("not JSON"))
    assert "no table of scores" in refusal(file)
    np.savez(file, meta=np.array(json.dumps(["uipe-score-table", 1])))
    assert "no table of scores" in refusal(file)
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    file.write_bytes(buffer.getvalue())
    assert "cut off, damaged or no table" in refusal(file)


def test_pickles_are_not_opened(file):
    changed(file, forget__answer_loss=np.array([{"run": "me"}], dtype=object))
    assert "cut off, damaged or no table (ValueError)" in refusal(file)


def test_a_newer_version_is_told(file):
    changed(file, meta=np.array(json.dumps({**meta_of(file), "version": 2})))
    assert "format 2, this program reads up to 1; upgrade uipe-search" in refusal(file)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"gram": None}, "lacks gram"),
        ({"forget__answer_tokens": None}, "lacks forget/answer_tokens"),
        ({"gram": np.ones((2, 2))}, r"gram has shape (2, 2), (3, 3) expected"),
        ({"alpha": np.ones(3)}, "base has shape (4,), (3,) expected"),
        ({"forget__answer_loss": np.ones((4, 6))}, "forget/answer_loss has shape (4, 6), (4, 5) expected"),
        ({"forget__answer_loss": np.full((4, 5), np.nan)}, "forget/answer_loss holds something else than numbers"),
        ({"objectives": np.full((4, 2), "a")}, "objectives holds something else than numbers"),
        ({"retain/other": np.ones(3)}, "retain/other is not there of the initial model"),
        ({"base": np.array([0, 0, 2, 0])}, "point 2 is of base run 2, epoch 1"),
        ({"base": np.array([0, 1, 0, 0]), "epoch": np.array([2, 2, 1, 1])}, "point 1 is of base run 1, epoch 2"),
    ],
)
def test_parts_that_do_not_fit_are_told(file, broken, told):
    changed(file, **broken)
    assert told in refusal(file)


def test_a_description_that_lacks_something_is_told(file):
    meta = meta_of(file)
    del meta["corner"]
    changed(file, meta=np.array(json.dumps(meta)))
    assert "its description lacks corner" in refusal(file)


@pytest.fixture(scope="module")
def collected(result, preparation):
    """The table of the tiny study: a coarse grid, but really scored."""
    return collect_table(result, gram_of_study(preparation, result.out))


@pytest.mark.slow
def test_objectives_follow_from_the_recorded_items(collected, tmp_path):
    write_table(collected, tmp_path / "tiny.npz")
    table = read_table(tmp_path / "tiny.npz")
    assert len(table) > 4
    for row in range(len(table)):
        metrics = evaluate(report_of(table.items(row)), report_of(table.retain), table.meta["definition"])
        assert metrics.forget_quality.log10_p == pytest.approx(table.objectives[row, 0], abs=1e-6)
        assert metrics.model_utility == pytest.approx(table.objectives[row, 1], abs=1e-6)


@pytest.mark.slow
def test_the_table_of_a_study_has_its_points_and_its_reference_point(collected, result):
    labels = [each["label"] for each in collected.meta["bases"]]
    points = {
        (labels[base], epoch, alpha)
        for base, epoch, alpha in zip(collected.base, collected.epoch, collected.alpha, strict=True)
    }
    trials = result.trials[result.trials["alpha"] != -1]
    assert points == set(trials[["base", "epoch", "alpha"]].itertuples(index=False, name=None))
    assert collected.meta["ceilings"] == [pytest.approx(np.log10(result.forget_quality_cap)), None]
    assert collected.meta["corner"] == [result.reference_point()[name] for name in collected.meta["objectives"]]
    assert "forget/answer_tokens" in collected.meta["constant"]
    assert not any("rouge_1" in name or name.startswith("unrelated") for name in collected.arrays)


@pytest.mark.slow
def test_the_gram_matrix_of_a_study_has_the_norms_of_its_record(collected, result):
    runs, epochs = result.store.record.base_runs, result.spec.base_epochs()
    norms = [runs[label].epochs[epoch]["norm"] for label, count in epochs.items() for epoch in range(count)]
    np.testing.assert_allclose(np.sqrt(np.diag(collected.gram)), norms, rtol=1e-6)


def test_a_base_run_that_is_gone_is_told(preparation, tmp_path, monkeypatch):
    monkeypatch.setenv("UIPE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="base run grad_diff is no longer in the delta store"):
        gram_of_study(preparation, tmp_path)


@pytest.mark.slow
def test_lost_item_scores_are_told(result, copied, collected):
    from search.results.study_result import StudyResult

    (copied / "items" / "trials" / "00001.npz").unlink()
    with pytest.raises(UserError, match="item scores of trial 1 are missing"):
        collect_table(StudyResult.open(copied), collected.gram)


def test_impossible_wishes_are_told_before_anything_is_spent(result, tmp_path, call, finished):
    with pytest.raises(UserError, match=r"--alphas: 1 is too few"):
        record_table(result.spec, tmp_path / "t.npz", 1)
    with pytest.raises(UserError, match=r"give one that ends in \.npz"):
        record_table(result.spec, tmp_path / "table.csv", 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_record_scores_a_grid_and_goes_on_where_it_was(tmp_path, finished, environment):
    out = tmp_path / "tiny.npz"

    def record():
        command = [sys.executable, "-m", "benchmarks.recorded.record", finished.file, "--out", out, "--alphas", "4"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    first = record()
    assert first.returncode == 0, first.stderr
    table = read_table(out)
    # Four base epochs at -1 (not in the table), 0, 1 and 2.
    assert len(table) == 12 and "12 points of 4 base epochs" in first.stdout and "note" not in first.stdout
    assert sorted(set(table.alpha)) == [0, 1, 2]
    content = out.read_bytes()
    out.unlink()
    again = record()
    assert again.returncode == 0, again.stderr
    assert "searching" not in again.stderr and "12 points of 4 base epochs" in again.stdout
    np.testing.assert_array_equal(read_table(out).objectives, table.objectives)
    assert len(out.read_bytes()) == len(content)
