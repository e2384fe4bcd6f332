"""How much a cluster holds: of the nodes it has, and of those its autoscaler may bring."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from search.spec.runtime import BaseRunResources, Resources, TrialResources
from uipe_core.errors import UserError, first_line


@dataclass(frozen=True)
class ClusterCapacity:
    """Capacity of a cluster in slots: one slot is the resources of one trial.

    Attributes:
        slots: Trials the cluster holds, at least 1.
        per_run: Slots one base run takes, at least 1.
        most: Trials at once at most, at least 1.
    """

    slots: int
    per_run: int = 1
    most: int = 1

    def base_runs(self, with_trials: bool) -> int:
        """Return how many base runs train at once, at least 1: all that fit, or with trials running one slot less."""
        return max((self.slots - with_trials) // self.per_run, 1)

    def trials(self, missing: int) -> int:
        """How many trials run at once while so many base runs are missing.

        At least one, so that trials start with the first base run; none where a base run would not fit next to it: an idle
        worker keeps its resources, and the base run would wait for them for ever.
        """
        if not missing:
            return self.most
        spare = (self.slots - 1) // self.per_run
        return min(self.most, self.slots - self.per_run * min(missing, spare)) if spare else 0


CLUSTER_DESCRIPTION = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` puts the cluster's description on its head node."""

Need = Mapping[str, float]
"""Amounts of Ray's resources by name: ``CPU``, ``GPU`` and custom ones. Only what is above 0."""


def need_of(resources: TrialResources | BaseRunResources) -> Need:
    """Return what a trial, or a process of a base run, asks of Ray."""
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
    """Return what the autoscaler of a cluster that `ray up` started may add; nothing without such a description.

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
        first = first_line(error)
        raise UserError(
            f"{file}: should describe this cluster, but {first}; correct it, or set resources.max_concurrent"
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


def capacity_of(resources: Resources, nodes: Sequence[Need], fleet: Fleet | None) -> ClusterCapacity:
    """Return what a cluster holds of a study's trials and base runs, now or once its autoscaler has brought what it may.

    Args:
        resources: What the study asks for.
        nodes: Resources of the nodes that are there.
        fleet: Nodes that may come. None: the cluster was started for this run and stays as it is. On another an autoscaler
            that leaves no description (KubeRay's) may bring nodes that are not there yet: then it is enough that the study
            says how many trials to run.

    Raises:
        UserError: No node could ever hold a trial, or all nodes together the processes of a base run.
    """
    asked = resources.max_concurrent
    parts = {"trial": need_of(resources.trial), "base_run": need_of(resources.base_run)}
    held = {part: trials_held(need, nodes, fleet or Fleet()) for part, need in parts.items()}
    if fleet is None or asked is None:
        for part, count in held.items():
            if count < 1:
                raise UserError(_too_much(part, parts[part], nodes, fleet is None))
        if held["base_run"] < resources.base_run.processes:
            raise UserError(
                f"resources.base_run.processes: {resources.base_run.processes} processes train together, but this cluster has "
                f"room for {held['base_run']} of them; lower it, or what each of them asks for"
            )
    slots = held["trial"] or asked or 1
    return ClusterCapacity(slots, per_base_run(resources.base_run, resources.trial), asked or slots)


def _too_much(part: str, need: Need, nodes: Sequence[Need], own: bool) -> str:
    most: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for node in nodes:
        # Memory, and the names that Ray gives its nodes, are nothing a study asks for.
        most |= {name: max(most.get(name, 0.0), has) for name, has in node.items() if ":" not in name and "memory" not in name}
    asked, had = (", ".join(f"{amount:g} {name}" for name, amount in sorted(found.items())) for found in (need, most))
    remedy = "lower it" if own else "lower it, or set resources.max_concurrent if an autoscaler will bring such nodes"
    return f"resources.{part}: it asks for {asked}, but the most that a node of this cluster has is {had}; {remedy}"
