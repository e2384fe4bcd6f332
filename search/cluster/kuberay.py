"""What a KubeRay manifest must be to run a study: KubeRay ships no schema, so its fields (v1 of RayJob) are listed here."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.spec.errors import Problem, explain, key_text, show

GPU = "nvidia.com/gpu"
FIRST_WITH_TOKENS = (2, 52)
"""First version of Ray that authenticates by token."""


class _Known(BaseModel):
    """A part whose fields are all listed here."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Open(BaseModel):
    """A part of Kubernetes' own, of which only some fields matter here."""

    model_config = ConfigDict(extra="allow", frozen=True)


Text = Annotated[str, Field(min_length=1)]
Many = Annotated[int, Field(ge=0, strict=True)]


class _Env(_Open):
    name: Text
    value: str | None = None
    valueFrom: dict[str, Any] | None = None


class _Amounts(_Open):
    limits: dict[str, str | int | float] = Field(default_factory=dict)
    requests: dict[str, str | int | float] = Field(default_factory=dict)


class _Container(_Open):
    name: Text
    image: Text
    env: list[_Env] = Field(default_factory=list)
    resources: _Amounts = Field(default_factory=_Amounts)


class _PodSpec(_Open):
    containers: Annotated[list[_Container], Field(min_length=1)]


class _Pod(_Known):
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: _PodSpec


class _Head(_Known):
    template: _Pod
    rayStartParams: dict[str, str] = Field(default_factory=dict)
    serviceType: Literal["ClusterIP"] = "ClusterIP"
    enableIngress: Literal[False] = False
    headService: dict[str, Any] = Field(default_factory=dict)
    resources: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


class _Workers(_Known):
    groupName: Text
    template: _Pod
    replicas: Many = 0
    minReplicas: Many = 0
    maxReplicas: Many = 2**31 - 1
    numOfHosts: Annotated[int, Field(ge=1, strict=True)] = 1
    idleTimeoutSeconds: Many | None = None
    suspend: bool = False
    scaleStrategy: dict[str, Any] = Field(default_factory=dict)
    rayStartParams: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


class _Authentication(_Known):
    mode: Literal["token"]


class _Cluster(_Known):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    headGroupSpec: _Head
    workerGroupSpecs: Annotated[list[_Workers], Field(min_length=1)]
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: dict[str, Any] = Field(default_factory=dict)
    authOptions: _Authentication | None = None
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    headServiceAnnotations: dict[str, str] = Field(default_factory=dict)
    upgradeStrategy: dict[str, Any] | None = None
    suspend: bool = False
    managedBy: str | None = None


class _Job(_Known):
    entrypoint: Text
    rayClusterSpec: _Cluster
    runtimeEnvYAML: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Many = 0
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    preRunningDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    backoffLimit: Many = 0
    jobId: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    submitterPodTemplate: _Pod | None = None
    submitterConfig: dict[str, Any] | None = None
    deletionStrategy: dict[str, Any] | None = None
    suspend: bool = False
    managedBy: str | None = None


class RayJob(_Known):
    """A RayJob of ray.io/v1."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: _Job
    status: dict[str, Any] | None = None


def rayjob_problems(content: dict[str, Any], ray_version: str) -> tuple[list[Problem], str]:
    """What is wrong with a RayJob, and, where nothing is, what it asks for.

    Args:
        content: The manifest, as read.
        ray_version: Version of Ray that this project is pinned to.
    """
    try:
        job = RayJob.model_validate(content)
    except ValidationError as error:
        found = (explain(detail, RayJob, content) for detail in error.errors(include_url=False))
        return [Problem(key_text(parts), text) for parts, text in found], ""
    problems = [Problem(key, text) for key, text in _problems(job, ray_version)]
    groups = (
        f"{group.groupName} {group.minReplicas} to {group.maxReplicas} x {_gpus(group.template):g} GPUs"
        for group in job.spec.rayClusterSpec.workerGroupSpecs
    )
    return problems, f"RayJob, Ray {job.spec.rayClusterSpec.rayVersion}, workers: {', '.join(groups)}"


def _problems(job: RayJob, ray_version: str) -> Iterator[tuple[str, str]]:
    cluster, at = job.spec.rayClusterSpec, "spec.rayClusterSpec"
    if not job.metadata.get("name"):
        yield "metadata.name", "this key is missing and has no default. Add it."
    words = job.spec.entrypoint.split()
    if ("search" in words or "uipe" in words) and "run" in words:
        if "--address" not in words:
            found = show(job.spec.entrypoint)
            yield "spec.entrypoint", f"found {found}; the study would start a Ray of its own. Add --address auto."
        if "--out" not in words:
            yield "spec.entrypoint", "without --out the results go with the pod. Add --out and a folder on a volume."
    if cluster.rayVersion != ray_version:
        found = show(cluster.rayVersion)
        yield f"{at}.rayVersion", f"found {found}; this project is pinned to Ray {ray_version}. Write {ray_version}."
    if tuple(int(part) for part in cluster.rayVersion.split(".")[:2]) < FIRST_WITH_TOKENS:
        yield f"{at}.rayVersion", f"found {show(cluster.rayVersion)}; Ray before 2.52 has no tokens. Take a later one."
    names = [group.groupName for group in cluster.workerGroupSpecs]
    pods = [(f"{at}.headGroupSpec", cluster.headGroupSpec.template)]
    for place, group in enumerate(cluster.workerGroupSpecs):
        key = f"{at}.workerGroupSpecs[{place}]"
        pods.append((key, group.template))
        if not group.minReplicas <= group.replicas <= group.maxReplicas:
            found = f"minReplicas {group.minReplicas}, replicas {group.replicas}, maxReplicas {group.maxReplicas}"
            yield f"{key}.replicas", f"found {found}; must grow in this order. Correct one of them."
        if names.count(group.groupName) > 1:
            yield f"{key}.groupName", f"found {show(group.groupName)}; another group has this name. Choose another."
        if group.minReplicas < group.maxReplicas and not cluster.enableInTreeAutoscaling:
            yield (
                f"{at}.enableInTreeAutoscaling",
                f"found false, but {group.groupName} may have {group.minReplicas} to {group.maxReplicas} replicas; nothing "
                "would ever add or remove one. Write true, or one number for all three.",
            )
    for key, pod in pods:
        yield from _pod_problems(f"{key}.template.spec.containers", pod, cluster.authOptions is not None)


def _pod_problems(key: str, pod: _Pod, tokens_by_operator: bool) -> Iterator[tuple[str, str]]:
    for place, container in enumerate(pod.spec.containers):
        amounts = container.resources
        asked, most = amounts.requests.get(GPU), amounts.limits.get(GPU)
        if asked is not None and str(asked) != str(most):
            found = f"requests {show(asked)}, limits {show(most)}"
            yield f"{key}[{place}].resources", f"found {found} of {GPU}; Kubernetes wants them equal. Set limits to {asked}."
        for kind, value in (("limits", most), ("requests", asked)):
            if value is not None and not re.fullmatch(r"\d+", str(value)):
                yield f"{key}[{place}].resources.{kind}.{GPU}", f"found {show(value)}; must be whole GPUs. Write 1 or more."
        for variable in container.env:
            if variable.name in ("RAY_AUTH_TOKEN", "UIPE_STORAGE") and variable.value:
                yield (
                    f"{key}[{place}].env",
                    f"{variable.name} stands in the file for everybody to read. Keep it in a Secret (valueFrom.secretKeyRef).",
                )
    # Ray runs in the first container; with authOptions the operator makes a token and hands it to every pod.
    given = {variable.name: variable.value or "from elsewhere" for variable in pod.spec.containers[0].env}
    mode = given.get("RAY_AUTH_MODE", "token" if tokens_by_operator else None)
    if mode != "token":
        yield (
            f"{key}[0].env",
            f"found RAY_AUTH_MODE {show(mode)}; whoever reaches the pod could run code. Add authOptions: {{mode: token}} to "
            "rayClusterSpec, or RAY_AUTH_MODE: token and RAY_AUTH_TOKEN from a Secret here.",
        )
    elif not tokens_by_operator and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(given):
        yield (
            f"{key}[0].env",
            "RAY_AUTH_MODE is token, but there is none. Add RAY_AUTH_TOKEN from a Secret (valueFrom.secretKeyRef).",
        )


def _gpus(pod: _Pod) -> float:
    return float(pod.spec.containers[0].resources.limits.get(GPU, 0))
