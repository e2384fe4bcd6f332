"""How base runs and trials share a cluster, and how much a cluster holds."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml

from search.execution.base_runs import BaseRuns, problem_of
from search.execution.capacity import (
    ClusterCapacity,
    Fleet,
    autoscaler_fleet,
    capacity_of,
    fits,
    need_of,
    per_base_run,
    trials_held,
)
from search.spec.runtime import BaseRunResources, Resources, TrialResources
from uipe_core.errors import UserError

CLUSTER = Path(__file__).resolve().parents[3] / "ray_cluster.yaml"


@pytest.mark.parametrize(
    ("slots", "per_run", "missing", "trials", "beside"),
    [
        (8, 1, 0, 8, 7),
        (8, 1, 3, 5, 7),
        (8, 1, 20, 1, 7),
        (2, 1, 2, 1, 1),
        (1, 1, 2, 0, 1),
        (8, 4, 3, 4, 1),
        (4, 4, 3, 0, 1),
        (9, 4, 3, 1, 2),
        (3, 4, 1, 0, 1),
    ],
)
def test_trials_get_what_base_runs_leave_and_never_their_last_room(slots, per_run, missing, trials, beside):
    capacity = ClusterCapacity(slots, per_run, slots)
    assert capacity.trials(missing) == trials
    assert capacity.base_runs(with_trials=True) == beside
    assert capacity.base_runs(with_trials=False) == max(slots // per_run, 1)
    # What is held at once fits, or is a single base run.
    held = trials + per_run * min(missing, beside)
    assert held <= max(slots, per_run)


def test_no_more_trials_than_the_study_asks_for():
    assert [ClusterCapacity(8, 1, 2).trials(missing) for missing in (0, 3, 20)] == [2, 2, 1]


def test_base_runs_start_one_fewer_beside_trials():
    runs = BaseRuns(ClusterCapacity(3, 1, 3), waiting=["a", "b", "c", "d", "e"])
    assert runs.startable(with_trials=False) == ["a", "b", "c"]
    for name in "abc":
        runs.start(name)
    runs.publish("a", SimpleNamespace(keys=("k",)))
    assert (runs.missing, runs.trials_at_once()) == (4, 1)
    assert runs.startable(with_trials=True) == []
    runs.fail("b", "no memory")
    assert runs.startable(with_trials=True) == ["d"]
    assert (runs.published, runs.failed) == ({"a": ("k",)}, {"b": "base run b failed: no memory"})


def test_what_a_node_holds():
    tenth = need_of(TrialResources(cpus=1, gpus=0.1))
    assert fits(tenth, {"CPU": 64, "GPU": 1}) == 10
    assert fits(need_of(TrialResources(cpus=4, gpus=2)), {"CPU": 64, "GPU": 7}) == 3
    special = need_of(TrialResources(cpus=1, custom={"a100": 0.5}))
    assert special == {"CPU": 1, "a100": 0.5}
    assert (fits(special, {"CPU": 8}), fits(special, {"CPU": 8, "a100": 1})) == (0, 2)


def test_nodes_are_counted_one_by_one():
    # Six GPUs in all, but none of the pairs that a trial needs spans two nodes.
    assert trials_held({"GPU": 2}, [{"GPU": 3}, {"GPU": 3}], Fleet()) == 2


def test_a_base_run_takes_the_room_of_several_trials():
    assert per_base_run(BaseRunResources(gpus=1), TrialResources(gpus=0.25)) == 4
    assert per_base_run(BaseRunResources(cpus=8, gpus=1), TrialResources(cpus=4, gpus=1)) == 2
    assert per_base_run(BaseRunResources(gpus=1, processes=4), TrialResources(gpus=2)) == 4
    assert per_base_run(BaseRunResources(), TrialResources(cpus=4)) == 1


def described(tmp_path, **changes):
    types = {
        "head": {"resources": {"CPU": 8}},
        "small": {"resources": {"CPU": 16, "GPU": 1}, "max_workers": 8},
        "large": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 2},
    }
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 6, "head_node_type": "head", "available_node_types": types, **changes}))
    return file


def test_a_cluster_without_gpus_counts_those_its_autoscaler_may_bring(tmp_path):
    fleet = autoscaler_fleet(described(tmp_path))
    head = {"CPU": 8.0, "node:10.0.0.1": 1.0}
    # Six nodes in all: both of the large ones, four small ones.
    assert trials_held({"CPU": 4, "GPU": 1}, [head], fleet) == 2 * 8 + 4
    assert trials_held({"CPU": 4, "GPU": 4}, [head], fleet) == 2 * 2
    assert trials_held({"CPU": 4, "GPU": 16}, [head], fleet) == 0
    # What is there counts, where it is more.
    assert trials_held({"CPU": 1}, [{"CPU": 1000.0}], fleet) == 1000


def test_a_study_gets_what_it_asks_for_or_all_there_is():
    nodes = [{"CPU": 8.0, "GPU": 2.0}] * 3
    trial, base_run = TrialResources(cpus=2, gpus=1), BaseRunResources(cpus=2, gpus=2)
    assert capacity_of(Resources(trial=trial, base_run=base_run), nodes, None) == ClusterCapacity(6, 2, 6)
    assert capacity_of(Resources(max_concurrent=2, trial=trial, base_run=base_run), nodes, None) == ClusterCapacity(6, 2, 2)


@pytest.mark.parametrize(
    ("part", "needs", "said"),
    [
        ("trial", TrialResources(gpus=1), ["resources.trial", "1 CPU, 1 GPU", "8 CPU, 0 GPU, 1 fast"]),
        ("trial", TrialResources(cpus=9), ["9 CPU"]),
        ("base_run", BaseRunResources(custom={"a100": 0.5}), ["resources.base_run", "0.5 a100"]),
    ],
)
def test_what_no_node_could_ever_hold_is_refused(part, needs, said):
    nodes = [{"CPU": 8.0, "fast": 1.0, "memory": 1e9, "object_store_memory": 1e8, "node:10.0.0.1": 1.0}]
    for fleet in (None, Fleet()):
        with pytest.raises(UserError) as caught:
            capacity_of(Resources(**{part: needs}), nodes, fleet)
        for words in (*said, "lower it"):
            assert words in str(caught.value)
        assert "memory" not in str(caught.value) and "10.0.0.1" not in str(caught.value)
    # Somebody else's cluster may grow by means not known here; one's own does not.
    patient = Resources(max_concurrent=5, **{part: needs})
    assert capacity_of(patient, nodes, Fleet()).most == 5
    with pytest.raises(UserError):
        capacity_of(patient, nodes, None)


def test_a_cluster_that_has_no_gpu_yet_is_no_error(tmp_path):
    resources = Resources(trial=TrialResources(cpus=4, gpus=1), base_run=BaseRunResources(cpus=4, gpus=1))
    assert capacity_of(resources, [{"CPU": 8.0}], autoscaler_fleet(described(tmp_path))) == ClusterCapacity(20, 1, 20)


def test_no_description_is_no_autoscaler(tmp_path):
    assert autoscaler_fleet(tmp_path / "none.yaml") == Fleet()


def test_the_shipped_cluster_file_can_be_read():
    assert autoscaler_fleet(CLUSTER).most == 8


@pytest.mark.parametrize(
    "content",
    ["max_workers: many", "available_node_types: [1]", "- a list", "a: [", "max_workers: 2\navailable_node_types: {a: 1}"],
)
def test_a_broken_description_is_refused_by_name(tmp_path, content):
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"ray_bootstrap_config\.yaml.*max_concurrent"):
        autoscaler_fleet(file)


@pytest.mark.parametrize("error", [ray.exceptions.LocalRayletDiedError(), ray.exceptions.WorkerCrashedError()])
def test_where_ray_died_the_user_hears_that_the_same_command_goes_on(error):
    problem = problem_of("score initial", error)
    assert isinstance(problem, UserError)
    assert str(problem).startswith(f"score initial: what it ran on died ({type(error).__name__}: ")
    assert str(problem).endswith("; the same command goes on from what was done")


def test_what_a_task_raised_keeps_its_own_words_or_its_type():
    told = ray.exceptions.RayTaskError("f", "", UserError("model.initial: no such folder"))
    assert str(problem_of("score initial", told)) == "score initial: model.initial: no such folder"
    broken = problem_of("score initial", ray.exceptions.RayTaskError("f", "", ValueError("broken\nmore")))
    assert type(broken) is RuntimeError
    assert str(broken) == "score initial: ValueError: broken"
