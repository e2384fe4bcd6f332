"""Processes really killed, at random moments; the same command again; nothing lost, nothing done twice, the same front."""

import contextlib
import signal
import time

import pytest
from ray_nodes import TOKEN, Cluster

pytestmark = pytest.mark.faults


def wait_for_moment(study, driver):
    """A moment drawn evenly from the length of an undisturbed run; earlier if the run has ended by then."""
    ends = time.monotonic() + study.random.uniform(0, 0.95 * study.seconds)
    while time.monotonic() < ends and driver.process.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["kill -9", "SIGINT", "SIGTERM", "kill -9, its Ray too"])
def test_driver(watched, hold, end, how, repeat):
    drivers = []
    for _ in range(2):
        drivers.append(driver := watched.start())
        wait_for_moment(watched, driver)
        if driver.process.poll() is None:
            number = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}.get(how, signal.SIGKILL)
            # Ctrl-C of a terminal reaches everything; the others are for the driver alone.
            end(driver.process.pid, number, group=how in ("SIGINT", "kill -9, its Ray too"))
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
