"""Which base runs of a study are there and which are to come, and how base runs and trials share the cluster meanwhile."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Room:
    """What a cluster holds, in slots: one slot is the room of one trial.

    Attributes:
        slots: Trials the cluster holds, at least 1.
        per_run: Slots one base run takes, at least 1.
        most: Trials at once at most, at least 1.
    """

    slots: int
    per_run: int = 1
    most: int = 1

    def base_runs(self, beside_trials: bool) -> int:
        """How many base runs train at once: all that fit; beside trials, so many that a slot is left. At least 1."""
        return max((self.slots - beside_trials) // self.per_run, 1)

    def trials(self, missing: int) -> int:
        """How many trials run at once while so many base runs are missing.

        At least one, so that trials start with the first base run; none where a base run would not fit beside it: an idle
        worker keeps its resources, and the base run would wait for them for ever.
        """
        if not missing:
            return self.most
        beside = (self.slots - 1) // self.per_run
        return min(self.most, self.slots - self.per_run * min(missing, beside)) if beside else 0


@dataclass
class BaseRuns:
    """The base runs of a study as they come.

    Attributes:
        room: The cluster.
        published: Entries of the delta store by base run (`Job.run`).
        failed: Why there is none, by base run; nothing is tried again in this run of the study.
        waiting: Base runs no task has been started for yet, in order.
        training: Base runs at work.
    """

    room: Room
    published: dict[str, tuple[str, ...]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    training: set[str] = field(default_factory=set)

    @property
    def missing(self) -> int:
        """How many are still to come."""
        return len(self.waiting) + len(self.training)

    def trials_at_once(self) -> int:
        """How many trials may run now."""
        return self.room.trials(self.missing)

    def startable(self, beside_trials: bool) -> list[str]:
        """The base runs there is room to start now."""
        return self.waiting[: max(self.room.base_runs(beside_trials) - len(self.training), 0)]

    def start(self, name: str) -> None:
        """Notes that a base run is at work."""
        self.waiting.remove(name)
        self.training.add(name)

    def publish(self, name: str, keys: tuple[str, ...]) -> None:
        """Notes that a base run is there."""
        self.training.discard(name)
        self.published[name] = keys

    def fail(self, name: str, reason: str) -> None:
        """Notes that there will be none."""
        self.training.discard(name)
        self.failed[name] = f"base run {name} failed: {reason}"
