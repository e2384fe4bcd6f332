"""Check files that describe a cluster, offline: by Ray's own schema and checks, and for what a study needs beyond them."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import ray
import yaml

from search.cluster.kuberay import claim_problems, rayjob_problems, read_schema
from search.cluster.secrets import literal_secrets
from search.execution.ray_compat import check_cluster_config
from search.spec.errors import Problem, StudyFileError, did_you_mean, key_text, show
from uipe_core.errors import UserError
from uipe_core.storage.files import read_regular

MAX_BYTES = 2**20
PROVIDERS = ("aws", "azure", "gcp", "local")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
LOOPBACK = ("127.0.0.1", "localhost", "::1")

COMMANDS = (
    "initialization_commands",
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *START_COMMANDS,
)

IDENTITIES = {
    "aws": ("IamInstanceProfile", "instance profile", "s3://"),
    "gcp": ("serviceAccounts", "service account", "gs://"),
}
"""What a machine of a cloud may do follows from this key of its node_config; its name, and the URLs that fail without one."""

BY_LOOKUP = "resolve:ssm:"
"""Start of the name of an image that EC2 looks up, with the rights of who starts the machine."""


def check_cluster_file(path: Path, schema: str | None = None) -> tuple[str, list[str]]:
    """Check a cluster file of ``ray up``, or a manifest with a KubeRay RayJob.

    Args:
        path: The file.
        schema: Source of KubeRay's schema (`search.cluster.kuberay.read_schema`), to check every field of a RayJob by.

    Returns:
        What the file describes in a few words, and notes on what was not checked.

    Raises:
        UserError: The file or the schema cannot be read.
        StudyFileError: With everything that is wrong, as far as Ray says it at once.
    """
    documents = _read(path)
    notes: list[str] = []
    if any("run" in document and "provider" not in document and "apiVersion" not in document for document in documents):
        raise UserError(f"{path}: this is a task of SkyPilot, which checks it by itself: sky launch {path} --dryrun")
    manifests = [document for document in documents if "apiVersion" in document or "kind" in document]
    if not manifests:
        if len(documents) != 1:
            raise UserError(f"{path}: holds {len(documents)} YAML documents; a cluster file of `ray up` is a single one")
        if schema is not None:
            raise UserError("--schema: it is for RayJobs of KubeRay, and this is a cluster file of `ray up`; leave it out")
        problems, described = _ray_up_problems(documents[0])
        notes = list(_notes(documents[0])) if not problems else []
    else:
        jobs = [document for document in manifests if document.get("kind") == "RayJob"]
        if len(jobs) != 1:
            kinds = ", ".join(str(document.get("kind")) for document in manifests)
            raise UserError(f"{path}: holds {len(jobs)} documents of kind RayJob ({kinds}); give it one")
        fields = None if schema is None else read_schema(schema)
        problems, described, notes = rayjob_problems(jobs[0], ray.__version__, fields)
        problems += claim_problems(manifests, jobs[0])
    if problems:
        raise StudyFileError(problems, str(path))
    return described, notes


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for a cluster file; give the YAML file")
        found = yaml.safe_load_all(read_regular(path).decode("utf-8-sig"))
        documents = [document for document in found if document is not None]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give the YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}: not valid YAML{where} ({type(error).__name__}); correct it there or just before") from error
    for document in documents:
        if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
            raise UserError(f"{path}: found {show(document)}; a cluster file is a mapping (lines of `key: value`)")
    if not documents:
        raise UserError(f"{path}: the file is empty; start from ray_cluster.yaml or a file in deploy")
    return documents


def _ray_up_problems(content: dict[str, Any]) -> tuple[list[Problem], str]:
    found = [Problem(key, text) for key, text in _before_ray(content)]
    if not found:
        found = [Problem(key, text) for key, text in _by_ray(content)]
    if not found:
        found = [Problem(key, text) for key, text in _beyond_ray(content)]
    kind = dict(content.get("provider") or {}).get("type")
    types = content.get("available_node_types") or {}
    workers = [f"{name} up to {node.get('max_workers', content.get('max_workers'))}" for name, node in _workers(content, types)]
    if kind == "local" and not found:
        workers = [str(len(content["provider"]["worker_ips"]))]
    return found, f"ray up on {kind}, workers: {', '.join(workers)}"


def _before_ray(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield faults at which Ray's checks exit or crash instead of naming them."""
    provider = content.get("provider")
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        yield (
            "provider",
            f"found {show(provider)}; must be a mapping with a type. Write for example {{type: aws, region: us-east-1}}.",
        )
        return
    if provider["type"] not in PROVIDERS:
        found = show(provider["type"])
        yield (
            "provider.type",
            f"found {found}; this provider cannot be checked. {did_you_mean(provider['type'], PROVIDERS)}",
        )
    if provider["type"] == "local":
        if not isinstance(provider.get("head_ip"), str):
            yield "provider.head_ip", f"found {show(provider.get('head_ip'))}; must be the address of the head. Write it."
        if not isinstance(provider.get("worker_ips"), list):
            yield (
                "provider.worker_ips",
                f"found {show(provider.get('worker_ips'))}; must be a list of addresses. Write [] for none.",
            )
        for key in ("available_node_types", "head_node", "worker_nodes", "head_node_type"):
            if key in content:
                yield key, "machines of your own have no node types: Ray detects what they have. Remove it."
    for key in START_COMMANDS:
        commands = content.get(key)
        if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
            yield key, f"found {show(commands)}; must be a list of commands, so that authentication is explicit. Write it."


def _by_ray(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what Ray's own schema and checks refuse."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            check_cluster_config(content)
    except (click.ClickException, SystemExit) as error:
        yield "", f"Ray refuses it: {said.getvalue().strip() or error}. Change it so."
    except Exception as error:
        where = getattr(error, "absolute_path", None)  # of an error of the schema
        key = "" if where is None else key_text(tuple(where))
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        yield key, f"{message}. Correct it; Ray's schema is at https://docs.ray.io/en/latest/cluster/vms/references/."


def _beyond_ray(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield faults that Ray does not check."""
    types = content.get("available_node_types") or {}
    for name, node in _workers(content, types):
        key = f"available_node_types.{name}"
        least, most = node.get("min_workers", 0), node.get("max_workers", content.get("max_workers", 0))
        if least > most:
            yield f"{key}.min_workers", f"found {least}; must be at most max_workers ({most}). Correct one of them."
    if content["provider"]["type"] == "gcp":
        for name, node in types.items():
            if (node.get("node_config") or {}).get("guestAccelerators") and not (node.get("resources") or {}).get("GPU"):
                key = f"available_node_types.{name}.resources"
                yield (
                    key,
                    f"found {show(node.get('resources'))}; Ray does not ask this cloud for GPUs. Write {{CPU: ..., GPU: 1}}.",
                )
    yield from _rights(content, types)
    yield from _of_commands(content)
    for key in START_COMMANDS:
        starts = [command for command in content[key] if re.search(r"\bray start\b", command)]
        if not starts:
            yield key, "no command starts Ray. Add one with `ray start`."
        for command in starts:
            modes = re.findall(r"\bRAY_AUTH_MODE=[\"']?(\w+)", command)
            if modes != ["token"]:
                yield (
                    key,
                    f"found RAY_AUTH_MODE {show(modes[0] if modes else None)} in {show(command)}; anyone who reaches "
                    "the node could run code. Write RAY_AUTH_MODE=token before `ray start`.",
                )
            hosts = re.findall(r"--dashboard-host[= ][\"']?([^\s\"']+)", command)
            if any(host not in LOOPBACK for host in hosts):
                yield (
                    key,
                    f"found --dashboard-host {hosts[0]}; the job server would be open to the network. Write "
                    "127.0.0.1 and reach it through `ray dashboard`.",
                )
            if re.search(r"\bRAY_AUTH_TOKEN=", command):
                yield key, "the token can be read by anyone who has the file. Mount its file at ~/.ray/auth_token instead."
    mounts = content.get("file_mounts") or {}
    elsewhere = any("RAY_AUTH_TOKEN_PATH=" in command for key in START_COMMANDS for command in content[key])
    if not elsewhere and not any(str(place).endswith(".ray/auth_token") for place in mounts):
        yield (
            "file_mounts",
            "no token reaches the nodes. Add ~/.ray/auth_token: ~/.ray/auth_token (docs/clusters.md).",
        )


def _rights(content: Mapping[str, Any], types: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the head could not do when it starts workers on AWS."""
    head = types.get(content.get("head_node_type", ""), {}).get("node_config") or {}
    if content["provider"]["type"] != "aws" or "IamInstanceProfile" in head:
        return
    for name, node in _workers(content, types):
        machine, key = node.get("node_config") or {}, f"available_node_types.{name}.node_config"
        if str(machine.get("ImageId", "")).startswith(BY_LOOKUP):
            yield (
                f"{key}.ImageId",
                f"found {show(machine['ImageId'])}; the role that Ray gives the head may not look it up, so no worker would "
                "start. Give the head an IamInstanceProfile (deploy/aws/head_policy.json), or name the id of an image.",
            )
        if "IamInstanceProfile" in machine:
            yield (
                f"{key}.IamInstanceProfile",
                "the role that Ray gives the head may not hand it on, so no worker would start. Give the head an "
                "IamInstanceProfile with iam:PassRole (deploy/aws/head_policy.json).",
            )


def _of_commands(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield commands that meet a lock of apt, or hold a secret."""
    places = {key: content.get(key) or [] for key in COMMANDS}
    for name, node in (content.get("available_node_types") or {}).items():
        places[f"available_node_types.{name}.worker_setup_commands"] = node.get("worker_setup_commands") or []
    for key, commands in places.items():
        for command in commands:
            if (
                re.search(r"\bapt(-get)?\s[^;&|]*\b(install|update|upgrade)\b", command)
                and "DPkg::Lock::Timeout" not in command
            ):
                yield (
                    key,
                    f"found {show(command)}; a machine that has just come up updates itself, and apt would find it locked. Use "
                    "deploy/apt_install.sh, or write apt-get -o DPkg::Lock::Timeout=600.",
                )
            for secret in literal_secrets(command):
                yield (
                    key,
                    f"the value of {secret} can be read by anyone who has the file. Pass it by name: uipe submit --pass-env "
                    f"{secret}, or {secret}=$(cat FILE) of a file on the node.",
                )


def _notes(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may be meant so, and may not."""
    types = content.get("available_node_types") or {}
    workers = dict(_workers(content, types))
    key, what, urls = IDENTITIES.get(content["provider"]["type"], ("", "", ""))
    without = [name for name, node in workers.items() if key and not (node.get("node_config") or {}).get(key)]
    if without:
        yield f"{', '.join(without)}: no {what} ({key}), so {urls} fails there; see docs/clusters.md, Rights"
    if workers and all(_is_spot(node.get("node_config") or {}) for node in workers.values()):
        names = ", ".join(workers)
        yield f"{names}: spot machines only, so trials wait while there are none; add a node type on demand of lower priority"


def _is_spot(machine: Mapping[str, Any]) -> bool:
    said = [machine.get("InstanceMarketOptions"), machine.get("scheduling")]
    return any(word in str(said) for word in ("spot", "SPOT", "preemptible"))


def _workers(content: Mapping[str, Any], types: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(types, dict):
        return []
    return [(name, node) for name, node in types.items() if name != content.get("head_node_type") and isinstance(node, dict)]
