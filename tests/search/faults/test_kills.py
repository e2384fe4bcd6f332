"""Processes really killed, at random moments; the same command again; nothing lost, nothing done twice, the same front."""

import contextlib
import shutil
import signal
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState
from ray_nodes import TOKEN, Cluster

from search.store.study_store import StudyStore
from uipe_core.errors import UserError

pytestmark = pytest.mark.faults


def open_trials(out):
    store = StudyStore.open(out)
    return [trial for study in (store.study, store.controls) for trial in study.trials if trial.state == TrialState.RUNNING]


def wait_for_moment(study, driver):
    """A moment drawn evenly from the length of an undisturbed run; earlier if the run has ended by then."""
    ends = time.monotonic() + study.random.uniform(0, 0.95 * study.seconds)
    while time.monotonic() < ends and driver.process.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["kill -9", "SIGINT", "SIGTERM", "SIGHUP", "SIGHUP of all", "kill -9, its Ray too"])
def test_driver(watched, hold, end, how, repeat):
    drivers = []
    for _ in range(2):
        drivers.append(driver := watched.start())
        wait_for_moment(watched, driver)
        if driver.process.poll() is None:
            number = getattr(signal, how.split()[0], signal.SIGKILL)
            # Ctrl-C of a terminal reaches everything, as its end does; the others are for the driver alone.
            end(driver.process.pid, number, group=how in ("SIGINT", "SIGHUP of all", "kill -9, its Ray too"))
        code = driver.wait(120)
        assert code in (0, 130, -signal.SIGKILL), driver.stderr
        watched.look()
    drivers.append(watched.finish(watched.start()))
    assert [driver.left_behind() for driver in drivers] == [{}, {}, {}]
    hold(f"driver: {how}", watched)


def test_trial_actor(watched, hold, end, workers, repeat):
    driver = watched.start()
    for _ in range(3):
        wanted = watched.complete() + watched.random.randrange(1, 8)
        with contextlib.suppress(AssertionError):  # a run that ends before is disturbed less often
            driver.until(lambda wanted=wanted: watched.complete() >= wanted and workers(driver, "scoring"))
        living = workers(driver, "scoring")
        if living:
            watched.look()
            end(watched.random.choice(living))
    watched.finish(driver)
    hold("trial actor: kill -9", watched)


def test_base_run_worker(watched, hold, end, workers, repeat):
    driver = watched.start()
    for _ in range(2):
        with contextlib.suppress(AssertionError):
            driver.until(lambda: workers(driver, "base run"))
        time.sleep(watched.random.uniform(0, 1.5))
        living = workers(driver, "base run")
        if living:
            watched.look()
            end(watched.random.choice(living))
    watched.finish(driver)
    hold("base run's worker: kill -9", watched)


@pytest.mark.parametrize("moment", ["any moment", "as it starts", "while reference models are scored"])
def test_raylet_of_the_only_node(watched, hold, end, workers, moment, repeat):
    driver = watched.start()
    driver.until(lambda: workers(driver, "raylet"))
    if moment == "any moment":
        wait_for_moment(watched, driver)
    elif moment != "as it starts":
        driver.until(lambda: "scoring: initial" in driver.stderr)
    if driver.process.poll() is None:
        watched.look()
        for pid in workers(driver, "raylet"):
            end(pid)
    watched.finish(driver)
    hold(f"the only node's raylet, {moment}: kill -9", watched)


def test_gcs_of_the_only_node(watched, hold, end, workers, repeat):
    driver = watched.start()
    driver.until(lambda: workers(driver, "GCS"))
    wait_for_moment(watched, driver)
    if driver.process.poll() is None:
        watched.look()
        for pid in workers(driver, "GCS"):
            end(pid)
        if driver.wait(60):  # it may have been at its report
            assert "Ray has died" in driver.stderr and "the same command goes on" in driver.stderr
            assert open_trials(watched.out) == []
    watched.finish(driver)
    hold("the only node's GCS: kill -9", watched)


def used_memory():
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return 1 - available / total


def test_low_memory(watched, hold, repeat):
    """Ray's own monitor ends workers, for a while or until the run gives up."""
    share = used_memory()
    if share > 0.5:
        pytest.skip("more than half of the memory is in use")
    limit = share + 0.15
    watched.variables["RAY_memory_usage_threshold"] = f"{limit:.3f}"
    driver = watched.start()
    wanted = watched.random.randrange(1, 12)
    driver.until(lambda: watched.complete() >= wanted)
    watched.look()
    taken = []
    ends = time.monotonic() + 300
    while driver.process.poll() is None and time.monotonic() < ends:
        if used_memory() < limit + 0.005:
            taken.append(bytearray(b"x") * 2**25)
        else:
            time.sleep(0.05)
        if repeat % 2 == 0 and "ran out of memory" in driver.stderr:
            break  # memory comes back; else the run ends by itself
    taken.clear()
    if driver.wait(300) == 2:
        assert "the study gave up" in driver.stderr and "lower resources.max_concurrent" in driver.stderr
    assert "Traceback" not in driver.stderr and "MEM(GB)" not in driver.stderr
    assert open_trials(watched.out) == []
    watched.variables.clear()
    watched.finish(driver)
    hold("low memory", watched)


def test_second_node(watched, environment, living_processes, hold, end, repeat):
    cluster = Cluster(environment, living_processes, cpus=1)
    try:
        second = cluster.add_node(cpus=2)
        watched.command += ("--address", cluster.gcs)
        watched.variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        driver = watched.start()
        wait_for_moment(watched, driver)
        watched.look()
        end(second)
        watched.finish(driver)
    finally:
        cluster.end()
    hold("a second node: kill -9", watched)


def test_raylet_of_a_joined_node(watched, environment, living_processes, hold, end, repeat):
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    cluster = Cluster(environment, living_processes, cpus=2)
    command = watched.command
    try:
        watched.command, watched.variables = (*command, "--address", cluster.gcs), dict(variables)
        driver = watched.start()
        wanted = watched.random.randrange(1, 12)
        driver.until(lambda: watched.complete() >= wanted)
        watched.look()
        (raylet,) = cluster.raylets()
        end(raylet)
        assert driver.wait(60) == 2
        assert "Ray has died (this node's raylet)" in driver.stderr and "the same command goes on" in driver.stderr
        assert open_trials(watched.out) == []
    finally:
        cluster.end()
    watched.command, watched.variables = command, {}
    watched.finish(watched.start())
    hold("raylet of the node that a driver has joined: kill -9", watched)


@pytest.fixture(scope="session")
def seeds_study(write_study):
    """Writes a study of one method trained from two seeds; at points of a grid each seed would have the other's already."""

    def write(folder):
        return write_study(
            folder / "seeds.yaml",
            name="seeds",
            unlearning={"methods": {"npo": {"beta": 1}}, "seeds": [0, 1], "epochs": 2},
            search={"sampler": "random", "trials": 8},
            cache={"deltas": str(folder / "deltas")},
        )

    return write


def test_driver_while_points_are_walked_at_other_seeds_and_a_base_run_lost_from_the_cache(
    watch, seeds_study, hold, end, repeat
):
    watched = watch(seeds_study)
    driver = watched.start()

    def others():
        try:
            controls = StudyStore.open(watched.out).controls_frame()
        except UserError:  # the run makes its files at this moment
            return 0
        return int((controls["kind"] == "other_seed").sum()) if "kind" in controls else 0

    driver.until(others)
    watched.look()
    end(driver.process.pid)
    driver.wait(60)
    at_kill = others()
    lost = watched.random.choice(sorted(watched.deltas.glob("*/manifest.json"))).parent
    shutil.rmtree(lost)
    watched.retrained.add(lost.name)
    watched.finish(watched.start())
    assert others() >= at_kill >= 1
    watched.take_front()  # which points are drawn after a kill depends on where it came
    hold("driver at the controls of other seeds: kill -9, and a base run lost", watched)
