"""A study that prunes, really killed: it ends with the front of the study that was left in peace and scored everything."""

import signal
import time

import pytest
import yaml

from search.results.study_result import StudyResult

pytestmark = pytest.mark.faults


def test_driver_of_a_study_that_prunes(watched, hold, end, repeat):
    file = watched.command[1]
    study = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**study, "search": {**study["search"], "prune": True}}, sort_keys=False))
    for _ in range(2):
        driver = watched.start()
        ends = time.monotonic() + watched.random.uniform(0.3, 0.95) * watched.seconds
        while time.monotonic() < ends and driver.process.poll() is None:
            time.sleep(0.02)
        if driver.process.poll() is None:
            end(driver.process.pid, signal.SIGKILL)
        driver.wait(120)
        watched.look()
    watched.finish(watched.start())
    hold("driver of a study that prunes: kill -9", watched)
    result = StudyResult.open(watched.out)
    points = [tuple(row) for row in result.pruned[["base", "epoch", "alpha"]].to_numpy().tolist()]
    assert points
    assert len(points) == len(set(points))
    scored = result.trials[result.trials["kind"] == "search"]
    assert not set(points) & set(map(tuple, scored[["base", "epoch", "alpha"]].to_numpy().tolist()))
    # As many as an undisturbed grid has: 2 epochs of 4 methods at alpha = -1, 1 and 2; 0 is given.
    assert len(points) + len(scored) == 2 * 4 * 3
