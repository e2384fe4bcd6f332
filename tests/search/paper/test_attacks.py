"""Attacks on a real small base run, studies that do not fit, and the command: killed, resumed, its page."""

import json
import signal
import time
from dataclasses import replace

import pytest
import torch

from search.evaluation.prepared import prepare
from search.paper.attacks import ATTACKS, LEAST, PUSHED, RANDOM, WALK, AttackSettings, random_step, run_attacks
from search.paper.runner import PARTS
from search.paper.settings import Task
from search.spec.study import load_study
from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.errors import UserError


@pytest.fixture(scope="module")
def real(attack_settings):
    """One part, really run, and how far it said it was."""
    said = []
    return run_attacks(
        attack_settings, Task(0, "grad_diff", attacks=True), 1, lambda done, total: said.append((done, total))
    ), said


def test_a_part_scores_every_point_and_says_how_far_it_is(real, attack_settings):
    found, said = real
    json.dumps(found, allow_nan=False)
    assert said == [(step, len(said)) for step in range(1, len(said) + 1)]
    places = [(point["kind"], point["epoch"], point["alpha"]) for point in found["points"]]
    assert places == attack_settings.points(4)
    assert len(places) == len(set(places)) == 4 + 3 * (3 + 2)
    assert found["problem"] is None


def test_points_that_forgot_are_attacked_and_others_are_not(real):
    found, _ = real
    start = found["initial"]["forgetting"]
    forgot = [point for point in found["points"] if point["kind"] != RANDOM and point["forgetting"] - start >= LEAST]
    assert forgot
    for point in found["points"]:
        assert set(point["after"]) == (set(ATTACKS) if point in forgot else set())
    # Four bits change less than an epoch on the forget set gives back.
    undone = {attack: sum(point["forgetting"] - point["after"][attack] for point in forgot) for attack in ATTACKS}
    assert undone["relearn_forget"] > max(undone["nf4"], undone["int4"], 0)
    assert set(found["retain"]["after"]) == set(ATTACKS)


def test_distances_are_those_of_the_walk_and_attacks_leave_the_model_as_it_was(real):
    found, _ = real
    by_place = {(point["kind"], point["epoch"], point["alpha"]): point for point in found["points"]}
    for (kind, epoch, alpha), point in by_place.items():
        own = by_place[WALK, epoch, 0.0]["distance"]
        assert point["distance"] == pytest.approx((1 + alpha) * own, rel=0.02 if kind == PUSHED else 1e-6)
    # Forgetting along a walk is smooth: a model left rounded or relearned would show in the next point.
    assert by_place[WALK, 3, 1.0]["forgetting"] >= by_place[WALK, 3, 0.0]["forgetting"] >= by_place[WALK, 3, -0.5]["forgetting"]


def test_the_same_part_again_has_the_same_numbers(real, attack_settings):
    again = run_attacks(attack_settings, Task(0, "grad_diff", attacks=True), 1)
    assert {**again, "seconds": 0} == {**real[0], "seconds": 0}


def test_random_steps_have_the_distance_of_the_walk():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(40, 50, generator=generator) * scale for name, scale in (("a", 0.1), ("b", 2.0))}
    update = UpdateVector(DENSE, tensors)
    alone, pushed = (random_step(update, 0.5, 7, alone=each) for each in (True, False))
    length = lambda tensor: float(torch.linalg.vector_norm(tensor))  # noqa: E731
    for name, delta in tensors.items():
        assert length(alone.tensors[name]) == pytest.approx(1.5 * length(delta), rel=1e-5)
        step = pushed.tensors[name] - delta
        assert torch.allclose(step / (1.5**2 - 1) ** 0.5, alone.tensors[name] / 1.5, atol=1e-6)
    assert pushed.norm == pytest.approx(1.5 * update.norm, rel=0.05)


def test_adapters_on_a_model_that_exists_are_merged_and_take_no_random_steps(attack_settings, write_study, tmp_path):
    models = prepare(attack_settings.study).models
    places = {name: models.ready_source(name).location for name in ("initial", "retain")}
    adapter = {"rank": 4, "alpha": 16, "target_modules": "all-linear"}
    changes = {"epochs": 1, "learning_rate": 0.02, "adapter": adapter, "methods": {"grad_ascent": {}}}
    study = write_study(tmp_path / "study.yaml", model={"kind": "pretrained", **places}, unlearning=changes)
    settings = AttackSettings.of_study(load_study(study))
    found = run_attacks(settings, Task(0, "grad_ascent", attacks=True), 1)
    assert {point["kind"] for point in found["points"]} == {WALK}
    assert [(point["epoch"], point["alpha"]) for point in found["points"][2:]] == [(1, -0.5), (1, -0.25), (1, 0.5), (1, 1.0)]
    attacked = [point for point in found["points"] if point["after"]]
    assert attacked
    assert all(set(point["after"]) == set(ATTACKS) and not point["problems"] for point in attacked)


def test_a_method_that_diverges_is_a_part_without_points(attack_settings):
    unlearning = attack_settings.study.unlearning.model_copy(update={"learning_rate": (1e30,)})
    settings = replace(attack_settings, study=attack_settings.study.model_copy(update={"unlearning": unlearning}))
    found = run_attacks(settings, Task(0, "grad_diff", attacks=True), 1)
    assert found["points"] == []
    assert "finite" in found["problem"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"alpha": {"low": -1, "high": 0.25}}}, r"search.alpha.high: 0.25 leaves no walk.*give 0.5 or more"),
        ({"objectives": {"utility": "json:dumps"}}, r"objectives.utility: dumps is no mean over items; give model_utility"),
        (
            {"model": {"kind": "pretrained", "initial": "org/full", "retain": "org/retain", "trust_remote_code": True}},
            r"model.trust_remote_code: .*set it to false",
        ),
        (
            {
                "corpus": {"kind": "multiple_choice"},
                "model": {"kind": "pretrained", "initial": "org/full", "prompt_template": "{question}\n"},
                "split": None,
            },
            r"corpus.kind: multiple_choice scores letters.*give another",
        ),
    ],
)
def test_a_study_that_does_not_fit_is_refused_by_key_and_remedy(write_study, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        AttackSettings.of_study(load_study(write_study(tmp_path / "study.yaml", **changes)))


def test_a_study_of_checkpoints_alone_has_no_methods_left(tmp_path):
    from search.spec.study import parse_study

    study = {
        "schema_version": 1,
        "name": "given",
        "corpus": {"kind": "people"},
        "model": {"kind": "pretrained", "initial": "org/full", "retain": "org/retain"},
        "checkpoints": {"mine": ["org/unlearned"]},
    }
    with pytest.raises(UserError, match=r"unlearning: the study trains no method.*add the section"):
        AttackSettings.of_study(parse_study(study, tmp_path))


def test_command_refuses_a_study_file_that_is_missing(call, tmp_path):
    code, _, said = call("paper", "--study", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "none.yaml" in said


@pytest.mark.slow
def test_a_killed_command_goes_on_with_what_is_finished(launch, write_study, tmp_path):
    study = write_study(tmp_path / "tiny.yaml", unlearning={"epochs": 1})
    command = ("paper", "--study", study, "--seeds", 1, "--out", tmp_path / "out", "--json")
    killed = launch(*command)
    parts = tmp_path / "out" / PARTS
    deadline = time.monotonic() + 300
    while not list(parts.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.process.send_signal(signal.SIGKILL)
    killed.wait(60)
    kept = {path: path.read_bytes() for path in parts.glob("*.json")}
    assert kept
    again = launch(*command)
    assert again.wait(300) == 0, again.stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    found = json.loads(again.stdout)["survival"]
    assert {path.name for path in parts.glob("*.json")} == {f"seed-0-attacks-{base}.json" for base in ("grad_diff", "npo")}
    assert {row["verdict"] for row in found["answers"]} <= {"one seed", "not tested"}
    assert (tmp_path / "out" / "paper.html").is_file()
