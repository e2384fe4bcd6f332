"""Studies over checkpoints that somebody has already: from the study file to a rebuilt export."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import optuna
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from search.evaluation.controls import given_controls
from search.evaluation.inputs import check_inputs
from search.evaluation.prepared import prepare
from search.problem.space import Point, own_epoch, sampled_epoch
from search.results.study_result import StudyResult
from search.spec.errors import StudyFileError
from search.spec.study import load_study, parse_study
from search.store.study_store import StudyStore
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.errors import UserError
from uipe_core.logs.tofu import read_log
from uipe_core.metrics.tofu import evaluate
from uipe_core.models.tiny import tiny_model
from uipe_core.scoring.scorer import Scorer
from uipe_core.unlearning.training import AdapterConfig, UnlearningConfig, train_base_run

SHIPPED = Path(__file__).parents[3] / "studies" / "my_checkpoints.yaml"


@pytest.fixture(scope="module")
def world(preparation, finished, tmp_path_factory):
    """Models on disk as a user has them: an initial model, a retain model's log, a trainer's folder, an adapter."""
    root = tmp_path_factory.mktemp("theirs")
    folder = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
    shutil.copytree(folder, root / "initial")
    shutil.copy(finished.out / "logs" / "retain.json", root / "retain.json")
    source = preparation.models.source("initial", str(folder))
    config = UnlearningConfig("grad_diff", {"retain_weight": 2.0}, epochs=2, learning_rate=2e-3, weight_decay=0.0)
    loaded = source.load()
    steps = ("checkpoint-2", "checkpoint-10")
    for step, _ in zip(steps, train_base_run(loaded, preparation.corpus, config), strict=True):
        loaded.model.save_pretrained(root / "trainer" / step, max_shard_size="30KB")
        loaded.tokenizer.save_pretrained(root / "trainer" / step)
    lora = AdapterConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))
    config = UnlearningConfig("npo", {"beta": 1.0}, epochs=1, learning_rate=2e-2, adapter=lora)
    loaded = source.load()
    for epoch in train_base_run(loaded, preparation.corpus, config):
        Extrapolator(source.load().model).apply(epoch.update, 0.0).save_pretrained(root / "adapter")
    return root


def study_of(root, **changes):
    study = {
        "schema_version": 1,
        "name": "given",
        "corpus": {"kind": "people", "forget_people": 2, "retain_people": 12, "pretraining_people": 10},
        "model": {"kind": "pretrained", "initial": "./initial", "retain": "./retain.json"},
        "checkpoints": {"mine": "trainer", "lora": ["adapter"]},
        "scoring": {"batch_size": 64, "max_new_tokens": 12, "temperatures": []},
        "search": {"trials": 4, "prune": False},
    }
    study.update(changes)
    file = root / "study.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in study.items() if value is not None}))
    return file


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    """The study over both, really run."""
    import search

    out = tmp_path_factory.mktemp("given") / "out"
    return search.run_study(load_study(study_of(world)), out, quiet=True)


def row_at(result, base, epoch, zero=True):
    rows = result.trials[(result.trials["base"] == base) & (result.trials["epoch"] == epoch)]
    return rows[(rows["alpha"] == 0) == zero].iloc[0]


@pytest.mark.slow
def test_every_checkpoint_is_a_given_point_under_its_own_number(ran):
    zero = ran.trials[ran.trials["kind"] == "alpha_zero"]
    assert {(row["base"], row["method"], row["epoch"]) for row in zero.to_dict("records")} == {
        ("lora", "lora", 1),
        ("mine", "mine", 1),
        ("mine", "mine", 2),
    }
    assert ran.store.counts() == {"complete": 7, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    counts = ran.spec.base_epochs()
    assert counts == {"lora": 1, "mine": 2}
    assert all(1 <= row["epoch"] <= counts[row["base"]] for row in ran.trials.to_dict("records"))
    # Optuna's own parameter is the one of the flat space.
    for trial in ran.study.get_trials():
        assert trial.user_attrs["epoch"] == own_epoch(trial.params["epoch"], 2, counts[trial.params["base"]])


@pytest.mark.slow
def test_there_is_no_next_epoch_of_what_was_not_trained_here(ran):
    assert "next_epoch" not in set(ran.controls["kind"])
    page = ran.report_path.read_text()
    assert "Epochs of mine are given checkpoints: 1 is checkpoint-2, 2 is checkpoint-10" in page
    assert "training a base run" not in page


@pytest.mark.slow
def test_theta_zero_scores_as_the_checkpoint_itself(ran, world, preparation):
    # The weights are the same bits (next test); how they lie in memory can move a sum in its last digits.
    reference = read_log(world / "retain.json")
    scoring = prepare(ran.spec).scoring
    source = preparation.models.source("initial", str(world / "initial"))
    for epoch, name in ((1, "checkpoint-2"), (2, "checkpoint-10")):
        loaded = preparation.models.source("initial", str(world / "trainer" / name)).load()
        metrics = evaluate(Scorer(preparation.corpus, loaded.prompts, scoring).score(loaded), reference)
        row = row_at(ran, "mine", epoch)
        assert row["model_utility"] == pytest.approx(metrics.model_utility, abs=1e-7)
        assert row["log10_forget_quality"] == pytest.approx(metrics.forget_quality.log10_p, abs=1e-7)
    loaded = source.load()
    loaded.model = PeftModel.from_pretrained(loaded.model, world / "adapter").eval()
    metrics = evaluate(Scorer(preparation.corpus, loaded.prompts, scoring).score(loaded), reference)
    row = row_at(ran, "lora", 1)
    assert row["model_utility"] == pytest.approx(metrics.model_utility, abs=1e-7)
    assert row["ks_statistic"] == pytest.approx(metrics.forget_quality.ks_statistic, abs=1e-9)
    assert row_at(ran, "mine", 1)["model_utility"] != row_at(ran, "mine", 2)["model_utility"] != row["model_utility"]


@pytest.mark.slow
def test_the_export_at_alpha_zero_is_the_checkpoint_to_the_bit(ran, world, tmp_path):
    folder = ran.export(row_at(ran, "mine", 2), tmp_path / "zero", "model")
    assert "from the given checkpoint 2 of mine (`checkpoint-10`)" in (folder / "README.md").read_text()
    shards = sorted((world / "trainer" / "checkpoint-10").glob("*.safetensors"))
    assert len(shards) > 1
    theirs = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_an_adapter_is_exported_as_one_and_a_model_is_not(ran, tmp_path):
    folder = ran.export(row_at(ran, "lora", 1), tmp_path / "adapter", "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert (ran.export(row_at(ran, "lora", 1), tmp_path / "merged", "model") / "model.safetensors").is_file()
    with pytest.raises(UserError, match="mine changed all weights, so there is no adapter"):
        ran.export(row_at(ran, "mine", 1), tmp_path / "none", "adapter")


@pytest.mark.slow
def test_a_recipe_imports_again_what_the_cache_lost_and_asks_for_what_is_gone(ran, world, call, monkeypatch, tmp_path):
    # The farthest from alpha = 0; the sampler may have proposed none of this base run.
    of_mine = ran.trials[ran.trials["base"] == "mine"]
    moved = of_mine.loc[of_mine["alpha"].abs().idxmax()]
    recipe = ran.export(moved, tmp_path / "recipe", "recipe") / "recipe.yaml"
    monkeypatch.setenv("UIPE_CACHE", str(tmp_path / "empty"))
    code, output, error = call("rebuild", recipe, "--to", tmp_path / "rebuilt")
    assert code == 0, error
    assert "rebuilt and checked" in output
    content = yaml.safe_load(recipe.read_text())
    content["study"]["checkpoints"]["mine"][0] = str(tmp_path / "gone")
    recipe.write_text(yaml.safe_dump(content))
    code, _, error = call("rebuild", recipe, "--to", tmp_path / "again")
    assert code == 2
    assert f"checkpoints.mine[0]: checkpoint {tmp_path / 'gone'}: no such folder; put it back" in error
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_the_same_command_does_nothing_again(ran, world, call):
    code, output, error = call("run", study_of(world), "--out", ran.out, "--json")
    assert code == 0, error
    assert "starting Ray" not in error
    assert json.loads(output)["trials"]["complete"] == 7


def test_moved_checkpoints_are_the_same_study_and_other_ones_another(world, tmp_path):
    here = prepare(load_study(study_of(world)))
    elsewhere = Path(shutil.copytree(world, tmp_path / "moved"))
    moved = prepare(load_study(study_of(elsewhere)))
    assert moved.fingerprint == here.fingerprint
    assert moved.checkpoints_of("mine")[0][1] == here.checkpoints_of("mine")[0][1]
    relabelled = prepare(load_study(study_of(elsewhere, checkpoints={"yours": "trainer", "lora": ["adapter"]})))
    assert relabelled.fingerprint != here.fingerprint
    assert [inputs for _, inputs in relabelled.checkpoints_of("yours")] == [inputs for _, inputs in here.checkpoints_of("mine")]
    shorter = prepare(load_study(study_of(elsewhere, checkpoints={"mine": ["trainer/checkpoint-2"], "lora": ["adapter"]})))
    turned = ["trainer/checkpoint-10", "trainer/checkpoint-2"]
    turned = prepare(load_study(study_of(elsewhere, checkpoints={"mine": turned, "lora": ["adapter"]})))
    config = elsewhere / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 9}))
    changed = prepare(load_study(study_of(elsewhere)))
    assert len({run.fingerprint for run in (here, shorter, turned, changed)}) == 4


def test_only_trained_base_runs_have_a_next_epoch(world):
    unlearning = {"methods": {"npo": {"beta": 1}}, "epochs": 3, "learning_rate": 0.002}
    preparation = prepare(load_study(study_of(world, unlearning=unlearning)))
    assert preparation.spec.base_epochs() == {"npo": 3, "lora": 1, "mine": 2}
    jobs = given_controls(preparation)
    assert [(job.base, job.epoch) for job in jobs if job.kind == "next_epoch"] == [("npo", 4)]


def test_a_failed_given_point_is_asked_for_again_with_the_flat_spaces_epoch(world, tmp_path):
    unlearning = {"methods": {"npo": {"beta": 1}}, "epochs": 5, "learning_rate": 0.002}
    preparation = prepare(load_study(study_of(world, unlearning=unlearning)))
    store = StudyStore.create(tmp_path / "out", preparation.spec, preparation.fingerprint, preparation.facts())
    try:
        space = preparation.spec.search_space()
        assert space["epoch"] == optuna.distributions.IntDistribution(1, 5)
        for point in preparation.spec.given_points():
            number, job = store.ask_point(space, point.params, "alpha_zero")
            assert Point(job.base, job.epoch, job.alpha) == point
            assert job.kind == "alpha_zero"
            store.fail(job, number, "made up")
        sampled = {(trial.params["base"], trial.params["epoch"]) for trial in store.study.get_trials()}
        assert {epoch for base, epoch in sampled if base == "mine"} == {2, 5}
        assert {epoch for base, epoch in sampled if base == "lora"} == {5}
        jobs = [store.ask_point(space)[1] for _ in range(30)]
    finally:
        store.close()
    counts = preparation.spec.base_epochs()
    assert all(job.kind == "search" and 1 <= job.epoch <= counts[job.base] for job in jobs)


@given(st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_epochs_of_a_shorter_run_are_spread_evenly_over_the_longest(longest, data):
    count = data.draw(st.integers(1, longest))
    own = [own_epoch(sampled, longest, count) for sampled in range(1, longest + 1)]
    assert own == sorted(own)
    assert set(own) == set(range(1, count + 1))
    sizes = [own.count(epoch) for epoch in set(own)]
    assert max(sizes) - min(sizes) <= 1
    assert all(own_epoch(sampled_epoch(epoch, longest, count), longest, count) == epoch for epoch in range(1, count + 1))
    assert [own_epoch(epoch, longest, longest) for epoch in range(1, longest + 1)] == list(range(1, longest + 1))


def test_paths_become_absolute_and_a_trainers_folder_its_checkpoints(world):
    spec = load_study(study_of(world))
    assert spec.checkpoints == {
        "lora": (str(world / "adapter"),),
        "mine": (str(world / "trainer" / "checkpoint-2"), str(world / "trainer" / "checkpoint-10")),
    }
    assert list(spec.checkpoints) == ["lora", "mine"]
    assert spec.variants() == []
    single = load_study(study_of(world, checkpoints={"one": "trainer/checkpoint-2"}))
    assert single.checkpoints == {"one": (str(world / "trainer" / "checkpoint-2"),)}
    assert parse_study(json.loads(spec.model_dump_json())) == spec


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpoints": None}, {"checkpoints": "a section unlearning, a section checkpoints, or both"}),
        ({"checkpoints": {}}, {"checkpoints": "Write unlearning: with methods to train"}),
        ({"checkpoints": {"mine": []}}, {"checkpoints.mine": "must not be empty"}),
        ({"checkpoints": {"mine": ""}}, {"checkpoints.mine": "must not be empty"}),
        ({"checkpoints": {"mine": 3}}, {"checkpoints.mine": "must be a text"}),
        ({"checkpoints": ["trainer"]}, {"checkpoints": "a mapping"}),
        ({"checkpoints": {"npo": "trainer"}}, {"checkpoints.npo": "npo is the name of a method"}),
        ({"checkpoints": {"a b": "trainer"}}, {"checkpoints.a b": "letters, digits, dots"}),
        ({"checkpoints": {"mine": ["adapter", "./adapter"]}}, {"checkpoints.mine": "a folder stands twice"}),
        (
            {"checkpoints": {"mine": "./nowhere", "yours": ["adapter", "none/at/all"]}, "search": {"trials": -1}},
            {
                "checkpoints.mine": "there is no folder",
                "checkpoints.yours[1]": "or give a hub name",
                "search.trials": "at least 0",
            },
        ),
    ],
)
def test_what_is_wrong_with_the_section_is_told_at_once(world, changes, expected):
    with pytest.raises(StudyFileError) as caught:
        load_study(study_of(world, **changes))
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert found.keys() == expected.keys()
    assert all(part in found[key] for key, part in expected.items())


def test_checkpoints_need_a_model_that_exists(world):
    stage = {"epochs": 1, "learning_rate": 0.01, "batch_size": 8}
    with pytest.raises(StudyFileError, match=r"Set model\.kind: pretrained"):
        load_study(study_of(world, model={"kind": "tiny", "base": stage, "finetune": stage}))


def test_a_label_that_stands_twice_is_refused(world):
    file = world / "twice.yaml"
    file.write_text(study_of(world).read_text().replace("  mine: trainer", "  mine: trainer\n  mine: adapter"))
    with pytest.raises(StudyFileError, match=r"checkpoints\.mine .*this key stands twice"):
        load_study(file)


def test_validate_tells_of_every_checkpoint_that_does_not_fit(world, call, tmp_path):
    broken = Path(shutil.copytree(world, tmp_path / "broken"))
    shard = sorted((broken / "trainer" / "checkpoint-2").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    (broken / "adapter" / "adapter_model.safetensors").rename(broken / "adapter" / "adapter_model.bin")
    code, _, error = call("validate", study_of(broken))
    assert code == 2
    assert "checkpoints.mine[0]: " in error and "damaged or cut off" in error
    assert "checkpoints.lora[0]: " in error and "are pickles (adapter_model.bin)" in error
    code, _, error = call("run", study_of(broken), "--out", tmp_path / "out")
    assert code == 2
    assert not (tmp_path / "out").exists()
    code, output, _ = call("validate", study_of(world))
    assert code == 0
    assert "valid; 2 base runs (2 given as checkpoints) of 1 to 2 epochs, 3 base points, 4 trials" in output


def test_of_an_initial_model_on_the_hub_the_check_waits(world):
    study = study_of(world, model={"kind": "pretrained", "initial": "some/model", "retain": "./retain.json"})
    notes = check_inputs(load_study(study))
    assert any(note.startswith("checkpoints: ") for note in notes)


def test_checkpoints_may_be_on_the_hub(world, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(name)
        return str(world / "trainer" / "checkpoint-10")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    spec = load_study(study_of(world, checkpoints={"theirs": "some/checkpoint", "both": ["adapter", "some/checkpoint"]}))
    assert spec.checkpoints["theirs"] == ("some/checkpoint",)
    assert any("some/checkpoint is on the hub" in note for note in check_inputs(spec))
    assert not asked
    preparation = prepare(spec)
    here = prepare(load_study(study_of(world, checkpoints={"theirs": ["trainer/checkpoint-10"]})))
    assert preparation.checkpoints["theirs"] == here.checkpoints["theirs"]
    assert preparation.checkpoints_of("both")[1][0] == world / "trainer" / "checkpoint-10"


def test_the_shipped_study_shows_each_kind_of_checkpoint(tmp_path):
    assert load_study(SHIPPED).base_epochs() == {"hub_grad_diff": 1, "hub_npo": 1, "hub_rmu": 1}
    local = re.sub(r"  hub_.*\n", "", SHIPPED.read_text())
    for line in ("my_npo: ", "grad_diff_epochs:", "  - ../", "lora: "):
        assert f"  # {line}" in local
        local = local.replace(f"  # {line}", f"  {line}")
    file = tmp_path / "studies" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(local)
    with pytest.raises(StudyFileError) as caught:
        load_study(file)
    keys = {problem.key.split("[")[0] for problem in caught.value.problems}
    assert keys == {f"checkpoints.{label}" for label in ("my_npo", "grad_diff_epochs", "lora")}
    for name in ("npo/checkpoint-20", "npo/checkpoint-100", "grad_diff/epoch1", "grad_diff/epoch2", "npo_lora"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert load_study(file).base_epochs() == {"grad_diff_epochs": 2, "lora": 1, "my_npo": 2}


@pytest.mark.slow
def test_a_result_is_read_back_from_its_folder_alone(ran):
    reopened = StudyResult.open(ran.out)
    assert reopened.summary() == ran.summary()
    assert reopened.store.record.checkpoints.keys() == {"lora", "mine"}
