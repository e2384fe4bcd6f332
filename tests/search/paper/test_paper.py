"""The paper's experiments: measures against made-up results with known effects, kept parts, the page, one real small run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search.cli import main as cli
from search.paper import measures
from search.paper.attacks import AttackSettings
from search.paper.claims import CLAIMS, judged
from search.paper.experiment import OTHER_RETAIN, run_task
from search.paper.measures import World
from search.paper.page import write_page
from search.paper.runner import PARTS, keep_part, read_part, run_paper, run_parts
from search.paper.settings import FULL, LORA, TUNINGS, PaperSettings, Task
from search.report.progress import Bars
from uipe_core.errors import UserError
from uipe_core.models.tiny import Stage
from uipe_core.storage.content_store import ContentStore

SMALL = PaperSettings(
    forget_people=2,
    retain_people=12,
    pretraining_people=10,
    hidden_size=16,
    layers=1,
    heads=2,
    base=Stage(2, 1e-2, 32),
    finetune=Stage(4, 1e-2, 32),
    methods={"grad_ascent": {}, "grad_diff": {"retain_weight": 1.0}},
    table_methods=("grad_ascent",),
    epochs=1,
    learning_rate={FULL: 1e-3, LORA: 1e-2},
    alphas=(0.5, 1.0),
)
"""Settings of a run that takes seconds."""

MADE_UP = PaperSettings(
    methods={"grad_ascent": {}, "grad_diff": {}}, table_methods=("grad_ascent",), epochs=3, alphas=(0.5, 1.0)
)
"""Settings that `made_up_result` fits: epochs 0 to 4."""


def point(model, method, epoch, alpha, along, lift, k2_lift):
    """A point `along` the training curve (1 is one epoch), its utility lifted and its K2 lifted off the curve."""
    k1, k2 = -40.0 + 8 * along, -40.0 + 4 * along + k2_lift
    utility = 0.8 - 0.02 * along + lift
    losses = {"k1_loss": along, "k2_loss": along / 2, "k0_loss": along / 8}
    row = {"model": model, "method": method, "epoch": epoch, "alpha": alpha, "k1": k1, "k2": k2, "k0": -along}
    return {**row, "utility": utility, **losses, "logit_scale": 1.0}


def projection(method, epoch, alpha, name):
    """Projections of an update whose length grows by 1 an epoch."""
    length = epoch * (1 + alpha)
    row = {"method": method, "epoch": epoch, "alpha": alpha, "set": name, "norm": length, "alignment": 0.5}
    row |= {"predicted": 0.1 * length, "measured": 0.05 * length, "correlation": 0.9}
    return row | {"first_order": 0.01, "rise": epoch / 2, "rise_correlation": 0.2}


def made_up_result(seed, tuning, settings=MADE_UP, lift=0.0, k2_lift=0.0):
    """Results in which training goes the same way every epoch, and a walk the same way but lifted off by known amounts."""
    trained, walked = range(settings.epochs + 2), range(1, settings.epochs + 1)
    points = [point("M1", method, epoch, 0.0, epoch, 0.0, 0.0) for method in settings.methods for epoch in trained]
    points += [
        point("M1", method, epoch, alpha, epoch * (1 + alpha), lift, k2_lift)
        for method in settings.methods
        for epoch in walked
        for alpha in settings.alphas
    ]
    points += [
        {**point(model, method, epoch, 0.0, epoch, 0.0, 0.0), "k1": -40.0 + 8 * (epoch + shift)}
        for shift, model in ((0.25, "M2"), (-0.5, "M3"))
        for method in settings.table_methods
        for epoch in trained
    ]
    projections = [
        projection(method, epoch, alpha, name)
        for method in settings.methods
        for epoch in trained[1:]
        for alpha in (0.0, *settings.alphas)
        for name in ("related", "unrelated")
    ]
    models = [
        {"name": name, "k1": -40.0, "k2": -40.0, "k0": 0.0, "utility": 0.8}
        | {"k1_log_truth_ratio": ratio, "k2_log_truth_ratio": -0.5}
        for name, ratio in (("full", -0.6), ("full_k1", -0.6), ("full_k2", -0.25), ("retain", -0.05), (OTHER_RETAIN, 0.0))
    ]
    return {
        "seed": seed,
        "tuning": tuning,
        "corpus": "made up",
        "corpus_hash": "0",
        "items": {"forget": 120, "related": 120, "unrelated": 60, "retain": 60, "real_authors": 36, "world_facts": 100},
        "models": models,
        "points": points,
        "cosines": {"matched": [0.3, 0.1], "same person": [0.0, 0.0], "same attribute": [0.1, 0.1], "unrelated": [0.05, -0.05]},
        "projections": projections,
        "seconds": 1.5,
    }


def world(**lifts):
    return World(MADE_UP, made_up_result(0, FULL, **lifts))


def test_known_effects_of_training_are_found():
    made = world()
    assert made.kept_until("M1", "grad_ascent") == pytest.approx(2.0)
    assert measures.over_m1(made, "M2") == pytest.approx(2.0)
    assert measures.over_m1(made, "M3") == pytest.approx(-4.0)
    assert measures.inference(made) == pytest.approx(0.2)
    assert measures.rise(made, "k2") == pytest.approx(8.0)
    assert measures.lag(made) == pytest.approx(10 / (40 + math.log10(0.3)))
    assert made.stall("grad_ascent") == 3


def test_known_effects_of_weights_are_found():
    made = world()
    assert made.cosines["matched"] == pytest.approx(0.2)
    assert measures.projected(made, "correlation") == pytest.approx(0.9)
    assert measures.projected(made, "measured", per_length=True) == pytest.approx(0.05)
    assert measures.projected(made, "rise_correlation", extrapolated=True) == pytest.approx(0.2)


def test_known_effects_of_walks_are_found():
    made = world(k2_lift=1.0)
    assert measures.doubled(made, "k2") == pytest.approx(9.0)
    assert measures.doubled_from_stall(made, "k2") == pytest.approx(13.0)
    assert measures.doubled_from_stall(made, "k0") == pytest.approx(-3.0)
    # From epochs 1, 2 and 3 the best walk is 0, 1 and more than 1 epochs beyond the next; the last ends at the ceiling.
    assert measures.beyond_next(made) == pytest.approx((0 + 8 + 8 + math.log10(0.3)) / 3)


@pytest.mark.parametrize("lift", [0.0, 0.004, -0.004])
def test_utility_lifted_off_the_training_curve_is_found(lift):
    made = world(lift=lift)
    assert measures.at_same_k1(made, "utility") == pytest.approx(lift)
    # From epoch 3 the next one lies two thirds of the way to the first scored alpha.
    assert measures.as_next(made, "utility") == pytest.approx(lift * (1 + 1 + 2 / 3) / 3)


def test_walks_on_the_training_curve_gain_nothing_over_it():
    made = world()
    gains = [found["k2_gain"] for found in measures.matched_points(made)]
    assert gains == pytest.approx([0.0] * 8)
    assert measures.left_out_gains(made) == pytest.approx([0.0] * 6)


def test_k2_lifted_off_the_training_curve_is_found_where_training_matches():
    found = measures.matched_points(world(lift=0.005, k2_lift=2.0))
    # A lift by half a step of utility moves the nearest place back along the curve, by 1 / 68 epoch of 4 units of K2.
    assert [point["k2_gain"] for point in found] == pytest.approx([2.0 + 4 / 68] * 8)
    # What training does not reach in K1, or keeps three steps more utility for, is not matched.
    assert {(point["epoch"], point["alpha"]) for point in found} == {(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)}
    assert measures.matched_points(world(lift=0.03)) == []


def three_seeds(lifts):
    return [made_up_result(seed, tuning, lift=lift) for seed, lift in enumerate(lifts) for tuning in TUNINGS]


@pytest.mark.parametrize(
    ("lifts", "verdict"),
    [((0.004, 0.005, 0.006), "holds"), ((-0.004, -0.005, -0.006), "does not hold"), ((-0.004, 0.005, 0.001), "not decided")],
)
def test_verdict_follows_the_seeds(lifts, verdict):
    rows = {row["key"]: row for row in judged([World(MADE_UP, result) for result in three_seeds(lifts)])}
    assert rows.keys() == {claim.key for claim in CLAIMS}
    assert len(rows) == len(CLAIMS)
    for tuning in TUNINGS:
        assert rows["tradeoff"][tuning]["verdict"] == verdict
        assert rows["tradeoff"][tuning]["mean"] == pytest.approx(sum(lifts) / 3)


def test_one_seed_decides_nothing():
    rows = judged([World(MADE_UP, made_up_result(0, tuning)) for tuning in TUNINGS])
    assert {row[tuning]["verdict"] for row in rows for tuning in TUNINGS} == {"not decided"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, attack_settings, made_up_parts):
    """A folder with every part of three made-up seeds."""
    out = tmp_path_factory.mktemp("paper")
    for task in attack_settings.tasks(3):
        (part,) = [part for part in made_up_parts(task.seed) if part["base"] == task.part]
        keep_part(attack_settings, task, out / PARTS, part)
    for result in three_seeds((0.004, 0.005, 0.006)):
        keep_part(MADE_UP, Task(result["seed"], result["tuning"]), out / PARTS, result)
    return out


@pytest.fixture(scope="module")
def written(finished, attack_settings):
    return run_paper(3, finished, MADE_UP, attack_settings)


def test_page_stands_alone_and_says_what_holds(finished, written):
    page = (finished / "paper.html").read_text()
    assert written["page"] == str(finished / "paper.html")
    assert page.count("data:image/png;base64,") == 8
    assert "http" not in page.replace("http-equiv", "")
    for claim in CLAIMS:
        assert f'id="claim-{claim.key}"' in page
    assert "metrics: tofu" in page
    assert "0.0050 ± 0.0006" in page
    held = sum(written["verdicts"][tuning]["holds"] for tuning in TUNINGS)
    assert page.count('class="verdict-chip holds"') == held + written["survival"]["verdicts"]["holds"]


def test_numbers_of_the_page_are_in_results_json(finished, written):
    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    content = json.loads((finished / "results.json").read_text(), parse_constant=refuse)
    assert content["claims"] == written["claims"]
    assert content["definition"] == "tofu"
    assert content["seeds"] == [0, 1, 2]
    assert len(content["points"]) == 6 * len(made_up_result(0, FULL)["points"])
    assert {path.name for path in finished.glob("*.png")} == {
        f"{name}.png" for name in ("models", "related", "weights", "tradeoff", "matched", "alpha", "stall", "attacks")
    }


def test_kept_parts_are_not_run_again(finished):
    with Bars(quiet=True) as bars:
        results = run_parts(MADE_UP, 2, finished, bars)
    assert [(result["seed"], result["tuning"]) for result in results] == [(0, FULL), (1, FULL), (0, LORA), (1, LORA)]


def test_more_seeds_keep_the_tasks_of_fewer():
    assert set(SMALL.tasks(3)) < set(SMALL.tasks(5))
    assert len({task.file_name for task in SMALL.tasks(5)}) == 10


def damage(path, how):
    content = json.loads(path.read_text())
    if how == "torn":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "not a part":
        path.write_text("[1, 2]")
    elif how == "altered":
        content["result"]["points"][0]["k1"] = -1.0
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("how", ["torn", "empty", "not a part", "altered"])
def test_damaged_part_is_named_with_the_remedy(tmp_path, how):
    task = Task(0, FULL)
    keep_part(MADE_UP, task, tmp_path, made_up_result(0, FULL))
    damage(tmp_path / task.file_name, how)
    with pytest.raises(UserError, match=r"seed-0-full\.json: (is damaged|was altered).*delete it"):
        read_part(MADE_UP, task, tmp_path)


def test_part_of_other_settings_is_refused(tmp_path):
    task = Task(0, FULL)
    keep_part(MADE_UP, task, tmp_path, made_up_result(0, FULL))
    with pytest.raises(UserError, match=r"other settings.*choose another --out"):
        read_part(replace(MADE_UP, epochs=4), task, tmp_path)


def test_a_part_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / Task(0, FULL).file_name).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_part(MADE_UP, Task(0, FULL), tmp_path)


@pytest.mark.parametrize(("seeds", "wrong"), [("0", "few"), ("-1", "few"), ("1001", "many"), ("1" + "0" * 18, "many")])
def test_no_seeds_and_too_many_are_refused(tmp_path, seeds, wrong):
    with pytest.raises(UserError, match=rf"--seeds: {seeds} is too {wrong}; give at least 1 and at most 1000"):
        CliRunner().invoke(cli.app, ["paper", "--seeds", seeds, "--out", str(tmp_path)], catch_exceptions=False)


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--out: .*file.* cannot be written"):
        CliRunner().invoke(cli.app, ["paper", "--out", str(tmp_path / "file")], catch_exceptions=False)


def test_page_that_cannot_be_written_names_the_folder(tmp_path, monkeypatch, attack_settings, made_up_parts):
    from search.paper import page

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_atomic", full)
    monkeypatch.setattr("search.report.style.picture", lambda figure: b"")
    with pytest.raises(UserError, match=r"--out: .* cannot be written: No space left"):
        write_page(tmp_path, attack_settings, made_up_parts(0), (MADE_UP, [made_up_result(0, tuning) for tuning in TUNINGS]))


def test_command_prints_claims_and_strict_json(finished, written, monkeypatch, attack_settings):
    monkeypatch.setattr(PaperSettings, "small", classmethod(lambda cls: MADE_UP))
    monkeypatch.setattr(AttackSettings, "small", classmethod(lambda cls: attack_settings))
    monkeypatch.setattr("search.paper.page.write_page", lambda out, *given: (out / "paper.html", written))
    shown = CliRunner().invoke(cli.app, ["paper", "--out", str(finished)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "0.0050 ± 0.0006" in shown.stdout
    assert "does not hold" in shown.stdout
    printed = CliRunner().invoke(cli.app, ["paper", "--out", str(finished), "--json"], catch_exceptions=False)
    assert json.loads(printed.stdout)["claims"] == written["claims"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ContentStore(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=[FULL, LORA])
def real(request, store):
    """Results of a real task, and how far it said it was."""
    said = []
    result = run_task(SMALL, Task(0, request.param), store, lambda done, total: said.append((done, total)))
    return result, said


def test_real_task_scores_every_place_and_says_how_far_it_is(real):
    result, said = real
    json.dumps(result, allow_nan=False)
    assert said == [(step, len(said)) for step in range(1, len(said) + 1)]
    places = {(row["model"], row["method"], row["epoch"], row["alpha"]) for row in result["points"]}
    m1 = {("M1", method, epoch, 0.0) for method in SMALL.methods for epoch in range(3)}
    walks = {("M1", method, 1, alpha) for method in SMALL.methods for alpha in (0.5, 1.0)}
    others = {(model, "grad_ascent", epoch, 0.0) for model in ("M2", "M3") for epoch in range(3)}
    assert places == m1 | walks | others
    assert len(result["points"]) == len(places)


def test_real_task_begins_where_its_models_are(real):
    result, _ = real
    models = {row["name"]: row for row in result["models"]}
    assert models["retain"]["k1"] == models["retain"]["k2"] == models["retain"]["k0"] == 0.0
    assert models["full"]["k2_loss"] < models["full_k1"]["k2_loss"]
    for model, stage in (("M1", "full"), ("M2", "full_k1"), ("M3", "full")):
        (start,) = {
            row["k1_loss"]
            for row in result["points"]
            if row["model"] == model and row["epoch"] == 0 and "ascent" in row["method"]
        }
        assert start == models[stage]["k1_loss"]


def test_real_unlearning_raises_the_loss_of_what_it_unlearns(real):
    result, _ = real
    curves = {
        model: [row for row in result["points"] if (row["model"], row["method"], row["alpha"]) == (model, "grad_ascent", 0.0)]
        for model in ("M1", "M3")
    }
    assert curves["M1"][-1]["k1_loss"] > curves["M1"][0]["k1_loss"]
    assert curves["M3"][-1]["k2_loss"] > curves["M1"][-1]["k2_loss"]


def test_real_projections_amplify_by_one_plus_alpha(real):
    result, _ = real
    rows = {(row["method"], row["epoch"], row["alpha"], row["set"]): row for row in result["projections"]}
    for (method, epoch, alpha, name), row in rows.items():
        start = rows[method, epoch, 0.0, name]
        for key in ("measured", "predicted", "norm", "first_order"):
            assert row[key] == pytest.approx((1 + alpha) * start[key], rel=1e-6, abs=1e-12)
    assert {kind: len(values) for kind, values in result["cosines"].items()} == dict.fromkeys(
        ("matched", "same person", "same attribute", "unrelated"), 20
    )


SCRIPT = """
import sys
from pathlib import Path
from search.cli import main as cli
from search.paper.attacks import AttackSettings
from search.paper.settings import PaperSettings
from search.spec.study import load_study
from uipe_core.models.tiny import Stage

if __name__ == "__main__":
    small = PaperSettings(
        forget_people=2, retain_people=12, pretraining_people=10, hidden_size=16, layers=1, heads=2, base=Stage(2, 1e-2, 32),
        finetune=Stage(4, 1e-2, 32), methods={"grad_ascent": {}}, table_methods=("grad_ascent",), epochs=1, alphas=(1.0,),
    )
    study = load_study(sys.argv[2]).model_copy(update={"audit": None})
    attacks = AttackSettings(study, {1: (1.0,)})
    PaperSettings.small, AttackSettings.small = lambda: small, lambda: attacks
    sys.argv = ["uipe", "paper", "--seeds", "1", "--out", sys.argv[1]]
    cli.main()
"""


@pytest.mark.slow
def test_interrupted_run_exits_130_and_is_resumed(tmp_path, write_study):
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(SCRIPT)
    environment = {**os.environ, "UIPE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, str(script), str(out), str(write_study(tmp_path / "tiny.yaml", unlearning={"epochs": 1}))]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(out.glob(f"{PARTS}/seed-*.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    _, said = first.communicate(timeout=60)
    kept = {path: path.read_bytes() for path in out.glob(f"{PARTS}/*.json")}
    assert kept, said
    assert first.returncode == 130, said
    assert "Traceback" not in said
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert (out / "paper.html").is_file()
