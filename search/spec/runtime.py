"""Validate the sections on audits, resources, budget, caches and trackers, which may change from run to run."""

import math
from importlib.util import find_spec
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from search.problem.trial import AUDITS
from search.spec.bounds import Count, Epochs, LearningRate, Positive
from search.spec.errors import did_you_mean, rule, without_password
from search.spec.sections import Adapter, Name, Section, as_tuple
from uipe_core.errors import UserError
from uipe_core.storage.remote_folder import SCHEMES


def _whole_above_one(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise rule("above 1 only whole GPUs can be had", f"Write {math.ceil(value)}, or a part of one.")
    return value


def _each_once(folders: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(folders)) < len(folders):
        raise rule("a folder stands twice", "Remove the repeated one.")
    return folders


Cpus = Annotated[float, Field(gt=0, le=10_000)]
Gpus = Annotated[float, Field(ge=0, le=10_000), AfterValidator(_whole_above_one)]
Threads = Annotated[int, Field(ge=1, le=10_000)]
Custom = dict[Name, Positive]
"""Amounts of Ray's custom resources, which nodes are started with: ``{a100: 0.01}`` asks for a node that has ``a100``."""

Folders = Annotated[tuple[Name, ...], BeforeValidator(as_tuple), Field(min_length=1), AfterValidator(_each_once)]
"""Folders in order, each once."""

FoldersOrNone = Annotated[tuple[Name, ...], BeforeValidator(as_tuple), AfterValidator(_each_once)]


class Relearning(Section):
    """Key ``relearning`` of section ``audit``: how knowledge is trained back; `few` is the number of forget items of the second
    of three trainings, `adapter` trains LoRA in place of all weights."""

    epochs: Epochs = 1
    learning_rate: LearningRate = 2e-5
    batch_size: Count = 4
    few: Count = 5
    adapter: Adapter | None = None


class Audit(Section):
    """Section ``audit``: the attacks that the `top` finalists of a study are held against once its front is known."""

    top: Annotated[int, Field(ge=1, le=100)] = 3
    tests: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1), AfterValidator(_each_once)] = tuple(
        AUDITS
    )
    samples: Annotated[int, Field(ge=1, le=1000)] = 10
    relearning: Relearning = Field(default_factory=Relearning)

    @field_validator("tests")
    @classmethod
    def _tests_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in AUDITS:
                raise rule(f"{name!r} is none of {', '.join(AUDITS)}", did_you_mean(name, list(AUDITS)))
        return value


class TrialResources(Section):
    """Resources of one trial while it is scored. `threads` are torch's."""

    cpus: Cpus = 1
    gpus: Gpus = 0
    threads: Threads = 1
    custom: Custom = Field(default_factory=dict)


class BaseRunResources(Section):
    """Resources of each process of a base run; several processes share one training."""

    cpus: Cpus = 1
    gpus: Gpus = 0
    threads: Threads = 1
    processes: Annotated[int, Field(ge=1, le=10_000)] = 1
    custom: Custom = Field(default_factory=dict)

    @field_validator("processes")
    @classmethod
    def _one_gpu_each(cls, value: int, info: ValidationInfo) -> int:
        gpus = info.data.get("gpus", 0)
        if value > 1 and gpus not in (0, 1):
            raise rule(f"each of several processes trains on one GPU, not on {gpus:g}", "Write gpus: 1, or processes: 1.")
        return value


class Resources(Section):
    """Resources of a study. `max_concurrent` is None for as many trials at once as fit on the cluster.

    `ray_start_seconds` and `ray_start_tries` are for the Ray that a run starts on this machine: how long each of its processes
    may take, and how often it is started.
    """

    max_concurrent: Annotated[int, Field(ge=1, le=100_000)] | None = None
    trial: TrialResources = Field(default_factory=TrialResources)
    base_run: BaseRunResources = Field(default_factory=BaseRunResources)
    ray_start_seconds: Annotated[int, Field(ge=5, le=3600)] = 60
    ray_start_tries: Annotated[int, Field(ge=1, le=10)] = 2


class Plateau(Section):
    """A study is on a plateau when its hypervolume grew by less than the share `gain` over its last `trials` trials."""

    trials: Count
    gain: Annotated[float, Field(gt=0, lt=1)] = 0.01


class Budget(Section):
    """Limits at which a study stops before it has all its trials; None is no limit.

    Attributes:
        hours: Wall-clock time of all its runs together.
        gpu_hours: GPUs held by base runs and trials, times hours, of all its runs together.
        trial_minutes: Longest a single trial may take; then it fails.
        plateau: When more trials no longer help.
        failure_rate: Share of failed trials among the last 20 from which on the study gives up; 1 never does.
    """

    hours: Positive | None = None
    gpu_hours: Positive | None = None
    trial_minutes: Annotated[float, Field(ge=0.001, le=1e6)] | None = None
    plateau: Plateau | None = None
    failure_rate: Annotated[float, Field(gt=0, le=1)] = 0.5

    @field_validator("plateau")
    @classmethod
    def _sees_enough(cls, value: Plateau | None) -> Plateau | None:
        if value is not None and value.trials < 5:
            raise rule("fewer than 5 trials without gain are chance", "Write trials: 10 or more.")
        return value


class Cache(Section):
    """Folders shared between studies; None is the user's cache folder. Update vectors may be at a URL, from which each node
    keeps up to `node_gigabytes`."""

    models: Name | None = None
    deltas: Name | None = None
    node_gigabytes: Positive = 100

    @field_validator("models")
    @classmethod
    def _is_a_folder(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise rule("models are read from folders", "Give a folder; a pretrained model comes from the hub or a folder.")
        return value

    @field_validator("deltas")
    @classmethod
    def _can_be_opened(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            return value
        if value.partition("://")[0] not in SCHEMES:
            raise rule(f"a URL of a store starts with one of {', '.join(SCHEMES)}", "Write for example s3://bucket/deltas.")
        if without_password(value) != value:
            remedy = "Take it out; give it in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the like."
            raise rule("a URL of a store holds no keys and no passwords", remedy)
        return value


class Mlflow(Section):
    """Key ``mlflow`` of section ``tracking``: None is MLFLOW_TRACKING_URI, and an experiment named as the study."""

    uri: Name | None = None
    experiment: Name | None = None

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, value: str | None) -> str | None:
        if value is not None and without_password(value) != value:
            remedy = "Take it out; give it in the environment, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
            raise rule("the record of a study holds no keys and no passwords", remedy)
        return value


class Project(Section):
    """Key ``wandb`` or ``trackio`` of section ``tracking``: None is the tracker's own default, or the study's name."""

    project: Name | None = None


class Tracking(Section):
    """Section ``tracking``: experiment trackers that hear of the study while it runs."""

    mlflow: Mlflow | None = None
    wandb: Project | None = None
    trackio: Project | None = None

    def require_installed(self) -> None:
        """Look for the packages of the trackers.

        Raises:
            UserError: One is missing.
        """
        for name in type(self).model_fields:
            if getattr(self, name) is not None and find_spec(name) is None:
                remedy = f"pip install 'uipe-search[{name}]', or remove the key"
                raise UserError(f"tracking.{name}: the package {name} is not installed; {remedy}")
