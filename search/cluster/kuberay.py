"""Check a KubeRay RayJob: what a study needs of it, and all its fields where KubeRay's own schema is given.

KubeRay's schema is the CustomResourceDefinition ``rayjobs.ray.io``. It is not part of this project: users give their copy, or
have kubectl read it from their cluster.
"""

import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.cluster.secrets import is_secret
from search.spec.errors import Problem, did_you_mean, explain, key_text, show
from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import parse_json, read_regular

GPU = "nvidia.com/gpu"
FIRST_WITH_TOKENS = (2, 52)
"""First version of Ray that authenticates by token."""
KUBECTL = ("kubectl", "get", "crd", "rayjobs.ray.io", "--output", "json", "--request-timeout", "10s")


class _Part(BaseModel):
    """The fields of a part that matter to a study; others are let through."""

    model_config = ConfigDict(extra="allow", frozen=True)


Text = Annotated[str, Field(min_length=1)]
Many = Annotated[int, Field(ge=0, strict=True)]


class _Env(_Part):
    name: Text
    value: str | None = None


class _Amounts(_Part):
    limits: dict[str, str | int | float] = Field(default_factory=dict)
    requests: dict[str, str | int | float] = Field(default_factory=dict)


class _Container(_Part):
    image: Text
    env: list[_Env] = Field(default_factory=list)
    resources: _Amounts = Field(default_factory=_Amounts)


class _PodSpec(_Part):
    containers: Annotated[list[_Container], Field(min_length=1)]


class _Pod(_Part):
    spec: _PodSpec


class _Head(_Part):
    template: _Pod
    serviceType: Literal["ClusterIP"] = "ClusterIP"
    enableIngress: Literal[False] = False


class _Workers(_Part):
    groupName: Text
    template: _Pod
    replicas: Many = 0
    minReplicas: Many = 0
    maxReplicas: Many = 2**31 - 1
    rayStartParams: dict[str, str] = Field(default_factory=dict)


class _Authentication(_Part):
    mode: Literal["token"]


class _Cluster(_Part):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    headGroupSpec: _Head
    workerGroupSpecs: Annotated[list[_Workers], Field(min_length=1)]
    enableInTreeAutoscaling: bool = False
    authOptions: _Authentication | None = None


class _Job(_Part):
    entrypoint: Text | None = None
    submissionMode: str = "K8sJobMode"
    rayClusterSpec: _Cluster | None = None
    clusterSelector: dict[str, str] = Field(default_factory=dict)


class RayJob(_Part):
    """A RayJob of ray.io/v1."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: _Job


def rayjob_problems(
    content: dict[str, Any], ray_version: str, schema: Mapping[str, Any] | None
) -> tuple[list[Problem], str, list[str]]:
    """Return what is wrong with a RayJob; and, where nothing is, what it asks for and what was not checked.

    Args:
        content: The manifest, as read.
        ray_version: Version of Ray that this project is pinned to.
        schema: KubeRay's schema (`read_schema`); None checks only what a study needs.
    """
    problems = [] if schema is None else list(schema_problems(content, schema))
    try:
        job = RayJob.model_validate(content)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        found = (
            (key_text(parts), text) for parts, text in (explain(e, RayJob, content) for e in error.errors(include_url=False))
        )
        return [*problems, *(Problem(key, text) for key, text in found if key not in known)], "", []
    problems += [Problem(key, text) for key, text in _needs(job, ray_version)]
    notes = [] if schema is not None else [_unchecked(job)]
    notes += _without_hub_token(job)
    cluster = job.spec.rayClusterSpec
    if cluster is None:
        chosen = ", ".join(f"{key}={value}" for key, value in job.spec.clusterSelector.items())
        return problems, f"RayJob on the cluster of {chosen}", notes
    groups = (
        f"{group.groupName} {group.minReplicas} to {group.maxReplicas} x {_gpus(group.template):g} GPUs"
        for group in cluster.workerGroupSpecs
    )
    return problems, f"RayJob, Ray {cluster.rayVersion}, workers: {', '.join(groups)}", notes


def read_schema(source: str) -> dict[str, Any]:
    """Return the schema of a RayJob from a file (the CRD or its openAPIV3Schema, YAML or JSON), or by ``kubectl``.

    Raises:
        UserError: It cannot be read, or holds no schema of a RayJob.
    """
    if source == "kubectl":
        try:
            done = subprocess.run(KUBECTL, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", None) or "").strip() or first_line(error)
            raise UserError(f"--schema kubectl: `{' '.join(KUBECTL)}` failed: {said}; give KubeRay's CRD as a file") from None
        text = done.stdout
    else:
        try:
            text = read_regular(Path(source)).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--schema: {source} cannot be read ({first_line(error)}); give KubeRay's CRD as a file") from None
    try:
        found = parse_json(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--schema: {source} is neither YAML nor JSON ({first_line(error)}); give KubeRay's CRD") from None
    schema = _schema_in(found)
    if schema is None:
        raise UserError(f"--schema: {source} holds no schema of a RayJob v1; give KubeRay's CRD or its openAPIV3Schema")
    return schema


def _schema_in(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict):
        return None
    if found.get("kind") == "CustomResourceDefinition" and isinstance(found.get("spec"), dict):
        versions = [version for version in found["spec"].get("versions") or [] if version.get("name") == "v1"]
        found = versions[0].get("schema") or {} if versions else {}
    found = found.get("openAPIV3Schema", found)
    return found if isinstance(found, dict) and isinstance(found.get("properties"), dict) else None


def schema_problems(content: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what KubeRay's schema refuses, unknown fields included: the API server drops or refuses those."""
    from jsonschema import Draft4Validator, SchemaError  # whose exclusive bounds are switches, as in OpenAPI 3.0

    strict = _strict(schema)
    try:
        Draft4Validator.check_schema(strict)
    except SchemaError as error:
        raise UserError(f"--schema: it is no valid schema: {first_line(error)}; give KubeRay's CRD unchanged") from None
    refused = Draft4Validator(strict).iter_errors(_without_null(content))
    for each in sorted(refused, key=lambda each: list(map(str, each.path))):
        if each.validator == "additionalProperties":
            known = list(each.schema["properties"])
            for name in sorted(set(each.instance) - set(known)):
                text = f"found {show(each.instance[name])}, but KubeRay has no such field. {did_you_mean(name, known)}"
                yield Problem(key_text((*each.path, name)), text)
        else:
            yield Problem(key_text(tuple(each.path)), f"KubeRay's schema refuses it: {each.message}. Correct it.")


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Forbid fields that a schema does not name, as the API server does unless the schema preserves them."""
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: _strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            result[key] = _strict(schema[key])
    return result


def _without_null(value: Any) -> Any:
    """Leave out keys without a value, which the API server ignores."""
    if isinstance(value, Mapping):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def _unchecked(job: RayJob) -> str:
    """Name the fields of KubeRay's own that no check looked at; those of pods are Kubernetes'."""
    names = []
    for key, part in _parts(job):
        for name in part.model_extra or {}:
            close = get_close_matches(name, type(part).model_fields, n=1, cutoff=0.85)
            names.append(f"{key}{name}{f' (did you mean {close[0]}?)' if close else ''}")
    listed = f": {', '.join(names)}" if names else ""
    return f"fields a study does not depend on were not checked{listed}; give KubeRay's CRD with --schema FILE|kubectl to do so"


def claim_problems(manifests: Iterable[Mapping[str, Any]], job: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the volume claims of a file that the pods of its RayJob share.

    Args:
        manifests: All documents of the file.
        job: The RayJob.
    """
    shared = set(re.findall(r"'claimName': '([^']+)'", str(job)))
    found = []
    for each in manifests:
        name = str((each.get("metadata") or {}).get("name"))
        if each.get("kind") != "PersistentVolumeClaim" or name not in shared:
            continue
        at, spec = f"PersistentVolumeClaim {name}: spec", each.get("spec") or {}
        if "ReadWriteMany" not in (spec.get("accessModes") or []):
            text = f"found {show(spec.get('accessModes'))}; head and workers write on it. Write [ReadWriteMany]."
            found.append(Problem(f"{at}.accessModes", text))
        elif not spec.get("storageClassName") and not spec.get("volumeName"):
            text = (
                "this key is missing, and the default class of most clusters is a disk of one node: the claim would wait for "
                "ever. Name a class that many nodes can write (`kubectl get storageclass`)."
            )
            found.append(Problem(f"{at}.storageClassName", text))
    return found


def _without_hub_token(job: RayJob) -> list[str]:
    cluster = job.spec.rayClusterSpec
    if cluster is None:
        return []
    pods = [cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)]
    first = [pod.spec.containers[0] for pod in pods]
    if all("HF_TOKEN" in {variable.name for variable in each.env} or "envFrom" in (each.model_extra or {}) for each in first):
        return []
    return ["not every pod has HF_TOKEN, which gated models of the hub need; take it from a Secret (valueFrom.secretKeyRef)"]


def _parts(job: RayJob) -> Iterator[tuple[str, _Part]]:
    yield from (("", job), ("spec.", job.spec))
    cluster, at = job.spec.rayClusterSpec, "spec.rayClusterSpec."
    if cluster is not None:
        yield from ((at, cluster), (f"{at}headGroupSpec.", cluster.headGroupSpec))
        yield from ((f"{at}workerGroupSpecs[{place}].", group) for place, group in enumerate(cluster.workerGroupSpecs))


def _needs(job: RayJob, ray_version: str) -> Iterator[tuple[str, str]]:
    """Yield what a study needs of a RayJob and does not find."""
    if not job.metadata.get("name"):
        yield "metadata.name", "this key is missing and has no default. Add it."
    words = (job.spec.entrypoint or "").split()
    if not words and job.spec.submissionMode != "InteractiveMode":
        yield "spec.entrypoint", "this key is missing and has no default. Add it."
    if ("search" in words or "uipe" in words) and "run" in words:
        if "--address" not in words:
            found = show(job.spec.entrypoint)
            yield "spec.entrypoint", f"found {found}; the study would start a Ray of its own. Add --address auto."
        if "--out" not in words:
            yield "spec.entrypoint", "without --out the results go with the pod. Add --out and a folder on a volume."
    if job.spec.rayClusterSpec is not None:
        yield from _cluster_needs(job.spec.rayClusterSpec, ray_version)
    elif not job.spec.clusterSelector:
        yield "spec.rayClusterSpec", "this key is missing. Add it, or clusterSelector with the labels of a cluster that runs."


def _cluster_needs(cluster: _Cluster, ray_version: str) -> Iterator[tuple[str, str]]:
    at = "spec.rayClusterSpec"
    if cluster.rayVersion != ray_version:
        found = show(cluster.rayVersion)
        yield f"{at}.rayVersion", f"found {found}; this project is pinned to Ray {ray_version}. Write {ray_version}."
    if tuple(int(part) for part in cluster.rayVersion.split(".")[:2]) < FIRST_WITH_TOKENS:
        yield f"{at}.rayVersion", f"found {show(cluster.rayVersion)}; Ray before 2.52 has no tokens. Take a later one."
    groups = cluster.workerGroupSpecs
    names = [group.groupName for group in groups]
    if all(group.maxReplicas == 0 or group.rayStartParams.get("num-cpus") == "0" for group in groups):
        yield (
            f"{at}.workerGroupSpecs",
            "no group has a replica with a CPU, so no trial could run. Raise maxReplicas or num-cpus.",
        )
    for place, group in enumerate(groups):
        key = f"{at}.workerGroupSpecs[{place}]"
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
    pods = [(f"{at}.headGroupSpec", cluster.headGroupSpec.template)]
    pods += [(f"{at}.workerGroupSpecs[{place}]", group.template) for place, group in enumerate(groups)]
    for key, pod in pods:
        yield from _pod_needs(f"{key}.template.spec.containers", pod, cluster.authOptions is not None)


def _pod_needs(key: str, pod: _Pod, tokens_by_operator: bool) -> Iterator[tuple[str, str]]:
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
            if (is_secret(variable.name) or variable.name == "UIPE_STORAGE") and variable.value:
                yield (
                    f"{key}[{place}].env",
                    f"{variable.name} can be read by anyone who has the file. Keep it in a Secret (valueFrom.secretKeyRef).",
                )
    # Ray runs in the first container; with authOptions the operator makes a token and hands it to every pod.
    given = {variable.name: variable.value or "from elsewhere" for variable in pod.spec.containers[0].env}
    mode = given.get("RAY_AUTH_MODE", "token" if tokens_by_operator else None)
    if mode != "token":
        yield (
            f"{key}[0].env",
            f"found RAY_AUTH_MODE {show(mode)}; anyone who reaches the pod could run code. Add authOptions: {{mode: token}} to "
            "rayClusterSpec, or RAY_AUTH_MODE: token and RAY_AUTH_TOKEN from a Secret here.",
        )
    elif not tokens_by_operator and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(given):
        yield (
            f"{key}[0].env",
            "RAY_AUTH_MODE is token, but there is none. Add RAY_AUTH_TOKEN from a Secret (valueFrom.secretKeyRef).",
        )


def _gpus(pod: _Pod) -> float:
    return float(pod.spec.containers[0].resources.limits.get(GPU, 0))
