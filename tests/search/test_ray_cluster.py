"""The shipped cluster file against Ray's own schema."""

from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "ray_cluster.yaml"


def validated(content):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(content))


def test_shipped_cluster_file_is_valid():
    validated(yaml.safe_load(CLUSTER.read_text()))


def test_a_broken_cluster_file_is_refused():
    content = yaml.safe_load(CLUSTER.read_text())
    worker = content["available_node_types"]["gpu_worker"]
    worker["node_confg"] = worker.pop("node_config")
    with pytest.raises(Exception, match="node_conf"):
        validated(content)
