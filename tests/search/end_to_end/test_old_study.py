"""A study that the code before the packages wrote: it is read, resumed and exported as if nothing had happened.

The archive holds its output folder, its update vectors and its initial model, and what `uipe run --json` printed then.
"""

import json
import tarfile
from pathlib import Path

import pytest

ARCHIVE = Path(__file__).parent / "data" / "study_before_packages.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        # Python 3.11.2, which Debian 12 has, knows no filter; the archive is this repository's own.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    study = (folder / "study.yaml").read_text().replace("  other_retain_seeds: [5]\n", "")  # a control, not its identity
    (folder / "study.yaml").write_text(f"{study}cache: {{models: cache/models, deltas: cache/deltas}}\n")
    return folder


@pytest.fixture(scope="module")
def expected(old):
    return json.loads((old / "expected.json").read_text())


def base_runs(old):
    return {path: path.read_bytes() for path in sorted((old / "cache" / "deltas").rglob("manifest.json"))}


def test_it_is_read_as_it_was_written(old, expected):
    from search.results.study_result import StudyResult

    summary = StudyResult.open(old / "out").summary()
    assert summary["trials"] == {**expected["trials"], "interrupted": 0}  # counted apart since
    assert summary["hypervolume"] == pytest.approx(expected["hypervolume"], rel=1e-12)
    assert [{key: row.get(key) for key in point} for row, point in zip(summary["front"], expected["front"], strict=True)] == (
        expected["front"]
    )


@pytest.mark.slow
def test_it_resumes_without_training_again_and_is_exported(old, expected, run_command):
    trained = base_runs(old)
    trials = 2 + 5
    resumed = json.loads(run_command("run", old / "study.yaml", "--out", old / "out", "--trials", str(trials), "--json"))
    assert resumed["trials"]["complete"] == expected["trials"]["complete"] + 2
    assert resumed["hypervolume"]["front"] >= expected["hypervolume"]["front"]
    assert len(trained) == 2
    assert base_runs(old) == trained
    run_command("export", old / "out", "--rule", "knee", "--to", old / "exported", "--as", "model")
    assert (old / "exported" / "model.safetensors").is_file()
    assert json.loads(run_command("pareto", old / "out", "--json"))["front"] == resumed["front"]
