"""Regret of selection rules: known by hand on a small made-up table, and as published on the real one."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = (
    Path(os.environ.get("UIPE_SHARED_DATA", ROOT.parent / "shared" / "data")) / "published" / "unlearned_models_150.json"
)
OPEN_UNLEARNING = "OpenUnlearning: harmonic mean (memorisation, utility)"


@pytest.fixture(scope="module")
def script():
    """The script as a module; its neighbours have names that others may use."""
    names = ("machine", "selection_regret")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("selection_regret")
        for name in names:
            sys.modules.pop(name, None)


def row(method, overall, forgetting, truth, utility, privacy=0.5):
    """One model; memorisation and all its parts but the truth ratio are the same number."""
    names = ("mem", "one_minus_es", "one_minus_em", "one_minus_paraprob")
    private = ("privacy", "privacy_mia", "s_loss", "s_zlib", "s_mink", "s_minkpp", "uds")
    return {
        "method": method,
        "is_reference": method in ("full", "retain"),
        "overall": overall,
        "one_minus_truth": truth,
        "utility": utility,
        "model_utility": utility,
        "fluency": 0.9,
        **dict.fromkeys(names, forgetting),
        **dict.fromkeys(private, privacy),
    }


@pytest.fixture
def found(script, tmp_path):
    """The figures of a table of two methods: in each the best is short of the strongest, which breaks the model."""
    models = [
        row("full", 0.0, 0.1, 0.3, 0.8),
        row("retain", 0.8, 0.6, 0.45, 0.8),
        row("a", 0.1, 0.2, 0.32, 0.79),
        row("a", 0.7, 0.5, 0.45, 0.73, privacy=0.9),
        row("a", 0.2, 0.9, 0.90, 0.64),
        row("b", 0.6, 0.6, 0.50, 0.78, privacy=0.9),
        row("b", 0.4, 0.95, 0.95, 0.70),
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"models": models}))
    return script.summary(*script.read_models(path))


@pytest.mark.parametrize(
    ("name", "mean", "worst", "picked"),
    [
        ("random", (0.7 - 1.0 / 3 + 0.1) / 2, 0.7 - 1.0 / 3, 0.4),
        ("first", 0.3, 0.6, 0.1),
        ("last", 0.35, 0.5, 0.4),
        ("highest (utility)", 0.3, 0.6, 0.1),
        ("strongest (memorisation)", 0.35, 0.5, 0.4),
        (OPEN_UNLEARNING, 0.35, 0.5, 0.4),
        ("utility-floor 0.95 (memorisation, utility)", 0.3, 0.6, 0.6),
        ("utility-floor 0.9 (memorisation, utility)", 0.0, 0.0, 0.6),
        # No model keeps so much, which leaves the initial one.
        ("utility-floor 0.99 (memorisation, utility)", 0.65, 0.7, 0.0),
        ("chance (1-truth, utility)", 0.0, 0.0, 0.6),
        ("harmonic mean, membership and utility", 0.0, 0.0, 0.6),
    ],
)
def test_regrets_are_those_by_hand(found, name, mean, worst, picked):
    rule = found["rules"][name]
    assert rule["mean_regret"] == pytest.approx(mean, abs=1e-4)
    assert rule["max_regret"] == pytest.approx(worst, abs=1e-4)
    assert rule["global_pick"] == pytest.approx(picked, abs=1e-4)


def test_constants_come_from_the_other_methods_alone(script):
    """What suits one method is what the other gets, so each is judged with the wrong constant."""
    columns = {"overall": script.np.array([0.7, 0.1])}
    methods = {name: script.Models(columns, {"overall": 0.0}, {}) for name in "ab"}
    methods["b"] = script.Models({"overall": columns["overall"][::-1]}, {"overall": 0.0}, {})
    fitted = script.Fitted({0.0: script.Rule(lambda models: [0]), 1.0: script.Rule(lambda models: [1])})
    regrets, constants = script.held_out_regrets(fitted, methods)
    assert regrets == pytest.approx({"a": 0.6, "b": 0.6})
    assert constants == [0.0, 1.0]


def test_what_needs_a_retain_model_or_holdout_items_is_said(found):
    needs = {name: (rule["needs_retain"], rule["needs_holdout"]) for name, rule in found["rules"].items()}
    assert needs["harmonic mean, with membership"] == (True, True)
    assert needs["harmonic mean, with depth"] == (True, False)
    assert needs["nearest to the retain model in four forget numbers"] == (True, False)
    assert needs["chance (1-truth, utility)"] == needs[OPEN_UNLEARNING] == needs["random"] == (False, False)
    assert not any(found["rules"][name]["needs_retain"] for name in found["held_out"]["chosen"].values())


def test_without_the_table_it_says_where_to_get_it(script, tmp_path):
    with pytest.raises(SystemExit, match="gnueaj/unlearning-depth-score"):
        script.read_models(tmp_path / "none.json")


def test_published_models(script):
    if not PUBLISHED.is_file():
        pytest.skip("no published models (unlearned_models_150.json) next to the checkout or in UIPE_SHARED_DATA")
    methods, every = script.read_models(PUBLISHED)
    found = script.summary(methods, every)
    assert (len(methods), len(every)) == (8, 150)
    theirs, ours = found["rules"][OPEN_UNLEARNING], found["rules"]["chance (1-truth, utility)"]
    assert (theirs["mean_regret_of_usable"], theirs["max_regret"]) == pytest.approx((0.114, 0.484), abs=5e-4)
    assert theirs["global_pick"] == pytest.approx(0.153, abs=1e-3)
    assert ours["mean_regret"] < 0.03 and ours["global_pick"] > 0.75 and not ours["needs_retain"]
    assert found["held_out"]["mean_regret"] < 0.05
