"""Everything that docs/extending.md says can be added is added from outside, in a package of its own, and runs in a study."""

import json
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def install(folder, module=HERE / "house_extension.py"):
    """Put a package with an entry point onto a path, as pip would."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(module, folder / module.name)
    info = folder / "house_extension-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house-extension\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[uipe_search]\nhouse = {module.stem}\n")
    return folder


@pytest.fixture(scope="module")
def call_extended(driver_class, environment, tmp_path_factory):
    """Run `uipe` where the package is installed."""
    site = install(tmp_path_factory.mktemp("site"))

    def run(*arguments, code=0):
        path = ":".join(filter(None, [str(site), environment.get("PYTHONPATH", "")]))
        driver = driver_class(arguments, tmp_path_factory.mktemp("io"), {**environment, "PYTHONPATH": path})
        try:
            assert driver.wait(300) == code, driver.stderr
        finally:
            driver.clean_up()
        return driver.stdout if code == 0 else driver.stderr

    return run


@pytest.fixture(scope="module")
def extended(call_extended, write_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended")
    file = write_study(
        folder / "study.yaml",
        corpus={"kind": "village", "people": 14},
        model={"base": {"epochs": 2}, "finetune": {"epochs": 3}, "other_retain_seeds": []},
        unlearning={"methods": {"bounded_ascent": {"depth": 4.0}}, "epochs": 1},
        scoring={"definition": "short"},
        search={"sampler": "quasi_random", "trials": 3, "third_objective": "forgotten_share", "prune": True},
    )
    summary = json.loads(call_extended("run", file, "--out", folder / "out", "--json"))
    return folder / "out", summary


def trial_rows(call_extended, out):
    return json.loads(call_extended("pareto", out, "--json"))["front"]


@pytest.mark.slow
def test_method_definition_sampler_and_corpus(extended):
    out, summary = extended
    record = json.loads((out / "study.json").read_text())
    assert summary["trials"] == {"complete": 4, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert summary["definition"] == "short"
    assert {row["method"] for row in summary["front"]} == {"bounded_ascent"}
    assert record["spec"]["corpus"] == {"kind": "village", "people": 14}
    assert record["spec"]["search"]["sampler"] == "quasi_random"
    assert record["spec"]["unlearning"]["methods"] == {"bounded_ascent": {"depth": [4.0]}}


@pytest.mark.slow
def test_metric_and_objective(extended, call_extended):
    out, summary = extended
    assert all(0.0 <= row["forgotten_share"] <= 1.0 for row in summary["front"])
    assert set(summary["reference_point"]) == {"log10_forget_quality", "model_utility", "forgotten_share"}
    assert trial_rows(call_extended, out) == summary["front"]


@pytest.mark.slow
def test_control(extended):
    out, _ = extended
    page = (out / "report" / "report.html").read_text()
    assert "Twice as far" in page and "walked twice as far" in page


@pytest.mark.slow
def test_export(extended, call_extended, tmp_path):
    out, summary = extended
    call_extended("export", out, "--trial", summary["front"][0]["trial"], "--to", tmp_path / "norm", "--as", "norm")
    assert (tmp_path / "norm" / "norm.txt").read_text().startswith("alpha ")


def test_a_broken_package_is_named(driver_class, environment, tmp_path, tmp_path_factory, write_study):
    (tmp_path / "house_extension.py").write_text("import nothing_of_that_name\n")
    site = install(tmp_path / "site", tmp_path / "house_extension.py")
    driver = driver_class(
        ["validate", write_study(tmp_path / "study.yaml")],
        tmp_path_factory.mktemp("io"),
        {**environment, "PYTHONPATH": str(site)},
    )
    assert driver.wait(60) == 2
    driver.clean_up()
    for words in ("house_extension", "house-extension", "nothing_of_that_name", "uninstall"):
        assert words in driver.stderr
