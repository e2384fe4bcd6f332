"""How much a cluster holds: of the nodes it has, and of those its autoscaler may bring."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from search.running_sections import BaseRunResources, TrialResources
from uipe_core.errors import UserError

CLUSTER_DESCRIPTION = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` puts the cluster's description on its head node."""

Need = Mapping[str, float]
"""Amounts of Ray's resources by name: ``CPU``, ``GPU`` and custom ones. Only what is above 0."""


def need_of(resources: TrialResources | BaseRunResources) -> Need:
    """What a trial, or a process of a base run, asks of Ray."""
    needs = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    return {name: amount for name, amount in needs.items() if amount > 0}


def fits(need: Need, node: Need) -> int:
    """How many times a node with these resources holds a need."""
    # Ray counts in parts of 1/10000; a tenth ten times must fit into 1.
    return min(math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())


def per_base_run(run: BaseRunResources, trial: TrialResources) -> int:
    """How many trials there would be room for in place of one base run, at least 1."""
    base, single = need_of(run), need_of(trial)
    return run.processes * max(math.ceil(base.get(name, 0.0) / amount - 1e-6) for name, amount in single.items())


@dataclass(frozen=True)
class Fleet:
    """The nodes an autoscaler may add.

    Attributes:
        types: Resources of a node and the largest number of such nodes, by type.
        most: Largest number of nodes of all types together.
    """

    types: tuple[tuple[Need, int], ...] = ()
    most: int = 0


def autoscaler_fleet(path: Path = CLUSTER_DESCRIPTION) -> Fleet:
    """What the autoscaler of a cluster that `ray up` started may add; nothing where no such description lies.

    Raises:
        UserError: The description cannot be read.
    """
    file = path.expanduser()
    try:
        described = yaml.safe_load(file.read_text())
        most = int(described.get("max_workers", 0))
        head = described.get("head_node_type")
        kinds = [kind for name, kind in described.get("available_node_types", {}).items() if name != head]
        types = [(kind.get("resources") or {}, int(kind.get("max_workers", most))) for kind in kinds]
        return Fleet(tuple(({str(key): float(value) for key, value in has.items()}, count) for has, count in types), most)
    except FileNotFoundError:
        return Fleet()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{file}: should describe this cluster, but {first}; mend it, or set resources.max_concurrent"
        ) from error


def trials_held(need: Need, nodes: Iterable[Need], fleet: Fleet) -> int:
    """How many trials a cluster holds: now, or once its autoscaler has brought what it may, whichever is more.

    Args:
        need: Of one trial.
        nodes: Resources of the nodes that are there.
        fleet: Nodes that may come.
    """
    left, brought = fleet.most, 0
    for held, count in sorted(((fits(need, has), count) for has, count in fleet.types), reverse=True):
        added = min(count, left)
        left, brought = left - added, brought + held * added
    return max(sum(fits(need, node) for node in nodes), brought)
