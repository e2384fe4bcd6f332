"""Files that describe clusters: every shipped one holds, broken ones are refused with key and remedy."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
SKY = ROOT / "deploy" / "sky.yaml"
SHIPPED = [ROOT / "ray_cluster.yaml", *(path for path in sorted((ROOT / "deploy").glob("*.y*ml")) if path != SKY)]
RAY_UP = {path.stem: path for path in SHIPPED if path.stem != "kuberay"}


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def checked(tmp_path, *contents):
    from search.cluster.config_checks import check_cluster_file

    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump_all(contents, sort_keys=False))
    return check_cluster_file(file)[0]


def refused(tmp_path, *contents):
    from search.spec.errors import StudyFileError

    with pytest.raises(StudyFileError) as error:
        checked(tmp_path, *contents)
    return {problem.key: problem.message for problem in error.value.problems}


def test_four_kinds_of_clusters_are_shipped():
    assert {path.stem for path in SHIPPED} >= {"ray_cluster", "gcp", "local", "kuberay"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(path, call):
    code, output, error = call("cluster", "validate", path)
    assert (code, error) == (0, "")
    assert output.startswith(f"{path}: valid; ")
    assert "workers: " in output


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_says_how_nodes_authenticate(path):
    assert "# Authentication: " in path.read_text()


def test_the_shipped_files_name_the_pinned_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    job = next(document for document in documents(ROOT / "deploy" / "kuberay.yaml") if document["kind"] == "RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    for script in ("set_up_node.sh", "Dockerfile"):
        assert "constraints.txt" in (ROOT / "deploy" / script).read_text()
    for path in RAY_UP.values():
        assert "deploy/set_up_node.sh" in path.read_text()


def test_a_shipped_kuberay_job_runs_a_shipped_study():
    job = next(document for document in documents(ROOT / "deploy" / "kuberay.yaml") if document["kind"] == "RayJob")
    named = next(word for word in job["spec"]["entrypoint"].split() if word.endswith(".yaml"))
    assert (ROOT / "studies" / Path(named).name).is_file()


def edited(path, edit):
    content = copy.deepcopy(documents(path)[0])
    edit(content)
    return content


def rename(mapping, old, new):
    mapping[new] = mapping.pop(old)


def start(content, key, old, new):
    content[key] = [command.replace(old, new) for command in content[key]]


def gpu_worker(content):
    return content["available_node_types"]["gpu_spot"]


def head_of(content):
    return content["available_node_types"]["head"]["node_config"]


def profile_that_is_not_handed_on(content):
    head_of(content).pop("IamInstanceProfile")
    for node in content["available_node_types"].values():
        node["node_config"]["ImageId"] = "ami-0123456789abcdef0"


RAY_UP_FAULTS = {
    "misspelt key": ("ray_cluster", lambda c: rename(gpu_worker(c), "node_config", "node_confg"), "gpu_spot", "node_conf"),
    "wrong type": ("ray_cluster", lambda c: c.update(max_workers="eight"), "max_workers", "integer"),
    "no such head type": ("ray_cluster", lambda c: c.update(head_node_type="boss"), "", "head_node_type"),
    "no provider": ("gcp", lambda c: c.pop("provider"), "provider", "mapping"),
    "unknown provider": ("gcp", lambda c: c["provider"].update(type="gpc"), "provider.type", "Did you mean gcp?"),
    "fewest above most": ("gcp", lambda c: gpu_worker(c).update(min_workers=9), None, "max_workers"),
    "no GPU told": ("gcp", lambda c: gpu_worker(c)["resources"].pop("GPU"), "gpu_spot.resources", "GPU: 1"),
    "no head address": ("local", lambda c: c["provider"].pop("head_ip"), "provider.head_ip", "address of the head"),
    "workers no list": ("local", lambda c: c["provider"].update(worker_ips="192.0.2.11"), "provider.worker_ips", "list"),
    "types of own machines": ("local", lambda c: c.update(available_node_types={"a": {}}), "available_node_types", "Remove it"),
    "no token mode": (
        "local",
        lambda c: start(c, "worker_start_ray_commands", "RAY_AUTH_MODE=token ", ""),
        "worker_start_ray_commands",
        "RAY_AUTH_MODE=token",
    ),
    "authentication off": (
        "ray_cluster",
        lambda c: start(c, "head_start_ray_commands", "MODE=token", "MODE=disabled"),
        "head_start_ray_commands",
        "disabled",
    ),
    "job server in the open": (
        "gcp",
        lambda c: start(c, "head_start_ray_commands", "=127.0.0.1", "=0.0.0.0"),
        "head_start_ray_commands",
        "127.0.0.1",
    ),
    "token in the file": (
        "local",
        lambda c: start(c, "head_start_ray_commands", "ulimit", "export RAY_AUTH_TOKEN=secret; ulimit"),
        "head_start_ray_commands",
        "~/.ray/auth_token",
    ),
    "token not sent": ("ray_cluster", lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "file_mounts", "auth_token"),
    "image that the head may not look up": (
        "ray_cluster",
        lambda c: head_of(c).pop("IamInstanceProfile"),
        "gpu_spot.node_config.ImageId",
        "head_policy.json",
    ),
    "role that the head may not hand on": (
        "ray_cluster",
        profile_that_is_not_handed_on,
        "gpu_spot.node_config.IamInstanceProfile",
        "iam:PassRole",
    ),
    "apt meets a lock": (
        "gcp",
        lambda c: c.update(initialization_commands=["sudo apt-get update -qq && sudo apt-get install -y nfs-common"]),
        "initialization_commands",
        "DPkg::Lock::Timeout=600",
    ),
    "apt meets a lock later": (
        "ray_cluster",
        lambda c: c["head_setup_commands"].append("sudo apt install -y nfs-kernel-server"),
        "head_setup_commands",
        "apt_install.sh",
    ),
    "apt meets a lock on one type": (
        "ray_cluster",
        lambda c: gpu_worker(c).update(worker_setup_commands=["apt-get -qq install nfs-common"]),
        "gpu_spot.worker_setup_commands",
        "apt_install.sh",
    ),
    "hub's token in the file": (
        "local",
        lambda c: start(c, "worker_start_ray_commands", "RAY_AUTH_MODE", "HF_TOKEN=hf_abc RAY_AUTH_MODE"),
        "worker_start_ray_commands",
        "--pass-env HF_TOKEN",
    ),
    "key of a cloud in the file": (
        "ray_cluster",
        lambda c: c["setup_commands"].append("export AWS_SECRET_ACCESS_KEY='abc'"),
        "setup_commands",
        "AWS_SECRET_ACCESS_KEY",
    ),
    "commands left to Ray": ("local", lambda c: c.pop("head_start_ray_commands"), "head_start_ray_commands", "explicit"),
    "nothing starts Ray": (
        "local",
        lambda c: c.update(worker_start_ray_commands=["true"]),
        "worker_start_ray_commands",
        "Add one",
    ),
}


@pytest.mark.parametrize(("name", "edit", "key", "word"), RAY_UP_FAULTS.values(), ids=RAY_UP_FAULTS)
def test_broken_files_of_ray_up_are_refused(name, edit, key, word, tmp_path):
    found = refused(tmp_path, edited(RAY_UP[name], edit))
    assert any(key is None or (at.endswith(key) if key else at == "") for at in found), found
    assert any(word in message for message in found.values()), found


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("ray_cluster", lambda c: gpu_worker(c)["node_config"].pop("IamInstanceProfile"), "gpu_spot: no instance profile"),
        ("gcp", lambda c: gpu_worker(c)["node_config"].pop("serviceAccounts"), "gpu_spot: no service account"),
        ("ray_cluster", lambda c: c["available_node_types"].pop("gpu_on_demand"), "gpu_spot: spot machines only"),
        ("gcp", lambda c: c["available_node_types"].pop("gpu_on_demand"), "gpu_spot: spot machines only"),
    ],
)
def test_what_may_be_meant_so_is_a_note(name, edit, said, tmp_path, call):
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(edited(RAY_UP[name], edit), sort_keys=False))
    code, output, error = call("cluster", "validate", file)
    assert (code, error) == (0, "") and f"note: {said}" in output
    assert output.count("note: ") == 1


@pytest.mark.parametrize(
    ("command", "secrets"),
    [
        ("HF_TOKEN=hf_abc ray start", ["HF_TOKEN"]),
        ("export WANDB_API_KEY='abc'; AWS_ACCESS_KEY_ID=AKIA", ["WANDB_API_KEY", "AWS_ACCESS_KEY_ID"]),
        ("HF_TOKEN=$(cat ~/.token) HF_TOKEN=$HF_TOKEN PGPASSWORD=`pass` HF_TOKEN= ray start", []),
        ("RAY_AUTH_TOKEN_PATH=/x HF_HOME=/srv KEY=1 --key=2 --port=6379", []),
    ],
)
def test_secrets_with_their_values_are_found_in_commands(command, secrets):
    from search.cluster.secrets import literal_secrets

    assert list(literal_secrets(command)) == secrets


def test_spot_nodes_come_first_and_nodes_on_demand_when_there_are_none():
    """By Ray's own scheduler: which type it launches for a GPU, and which after spot nodes could not be had."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, ResourceRequestSource, SchedulingNode, SchedulingNodeStatus
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.instance_manager_pb2 import NodeKind

    for path in (RAY_UP["ray_cluster"], RAY_UP["gcp"]):
        types = documents(path)[0]["available_node_types"]
        nodes = {
            name: NodeTypeConfig(name, 0, 8, priority=node["priority"], resources=node["resources"])
            for name, node in types.items()
            if name != "head"
        }
        for missing, expected in (({}, "gpu_spot"), ({"gpu_spot": 0.0}, "gpu_on_demand"), ({"gpu_spot": 1.0}, "gpu_spot")):
            candidates = [
                SchedulingNode.from_node_config(node, SchedulingNodeStatus.TO_LAUNCH, NodeKind.WORKER)
                for node in nodes.values()
            ]
            best, _, _ = ResourceDemandScheduler._sched_best_node(
                [ResourceRequestUtil.make({"GPU": 1, "CPU": 1})],
                candidates,
                ResourceRequestSource.PENDING_DEMAND,
                cloud_resource_availabilities={},
                recoverable_resource_availabilities=missing,
            )
            assert best.node_type == expected


def test_the_policies_are_json_that_names_what_the_cluster_file_asks_for():
    policies = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deploy" / "aws").glob("*.json")}
    assert policies.keys() == {"head_policy", "user_policy", "bucket_policy"}
    content = documents(RAY_UP["ray_cluster"])[0]
    profiles = {node["node_config"]["IamInstanceProfile"]["Name"] for node in content["available_node_types"].values()}
    script = (ROOT / "deploy" / "aws" / "create_roles.sh").read_text()
    assert profiles == {"uipe-head", "uipe-worker"} and all(name in script for name in profiles)
    for name in ("head_policy", "user_policy"):
        statements = {each["Sid"]: each for each in policies[name]["Statement"]}
        handed = next(each for each in statements.values() if each["Action"] == "iam:PassRole")["Resource"]
        assert "arn:aws:iam::*:role/uipe-worker" in ([handed] if isinstance(handed, str) else handed)
        looked_up = statements["ResolveTheImage"]["Resource"].partition(":parameter")[2]
        image = head_of(content)["ImageId"].removeprefix("resolve:ssm:")
        assert image.startswith(looked_up.removesuffix("*"))
        allowed = [each for each in statements.values() if "Condition" in each and "ec2:TerminateInstances" in each["Action"]]
        assert allowed[0]["Condition"]["StringEquals"]["ec2:ResourceTag/ray-cluster-name"] == content["cluster_name"]


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").rglob("*.sh")), ids=lambda path: path.name)
def test_the_shipped_scripts_are_shell(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0


def test_the_task_of_skypilot_runs_a_shipped_study_from_a_bucket(call):
    content = yaml.safe_load(SKY.read_text())
    assert (ROOT / content["envs"]["STUDY"]).is_file()
    # What it asks the user for has no value here.
    assert content["envs"]["BUCKET"] is None and content["secrets"] == {"HF_TOKEN": ""}
    assert {each["use_spot"] for each in content["resources"]["any_of"]} == {True, False}
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=content[part].encode(), capture_output=True).returncode == 0
    assert '--out "$BUCKET/' in content["run"] and "cache.deltas=$BUCKET" in content["run"]
    for word in content["setup"].split():
        assert not word.startswith("deploy/") or (ROOT / word).is_file()
    code, _, error = call("cluster", "validate", SKY)
    assert code == 2 and "a task of SkyPilot" in error and "--dryrun" in error


def named_by_the_dockerfile():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]


def test_what_the_image_copies_is_there_and_let_into_the_build(tmp_path):
    sys.path.insert(0, str(ROOT / "deploy"))
    try:
        import check_image
    finally:
        sys.path.pop(0)
    assert {"pyproject.toml", "LICENSE", "search", "uipe_core", "studies"} <= set(named_by_the_dockerfile())
    for name in named_by_the_dockerfile():
        assert (ROOT / name).exists() and not check_image.ignored(name)
    assert not check_image.ignored("search/cli/main.py")
    for name in (".git", ".venv", "runs", "data", "tests", "docs", "exported", "search/cli/__pycache__"):
        assert check_image.ignored(name), name


def kuberay_job():
    return copy.deepcopy(next(d for d in documents(ROOT / "deploy" / "kuberay.yaml") if d["kind"] == "RayJob"))


def cluster_of(job):
    return job["spec"]["rayClusterSpec"]


def workers_of(job):
    return cluster_of(job)["workerGroupSpecs"][0]


def container_of(job):
    return workers_of(job)["template"]["spec"]["containers"][0]


def env_only(job, *variables):
    cluster_of(job).pop("authOptions")
    for part in (workers_of(job), cluster_of(job)["headGroupSpec"]):
        part["template"]["spec"]["containers"][0]["env"] = list(variables)


FROM_SECRET = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "ray", "key": "token"}}}
TOKEN_MODE = {"name": "RAY_AUTH_MODE", "value": "token"}
AT = "spec.rayClusterSpec"
KUBERAY_FAULTS = {
    "api version": (lambda j: j.update(apiVersion="ray.io/v1alpha1"), "apiVersion", "ray.io/v1"),
    "no entrypoint": (lambda j: j["spec"].pop("entrypoint"), "spec.entrypoint", "missing"),
    "Ray of its own": (
        lambda j: j["spec"].update(entrypoint="uipe run s.yaml --out /srv/x"),
        "spec.entrypoint",
        "--address auto",
    ),
    "output goes with the pod": (
        lambda j: j["spec"].update(entrypoint="python -m search run s.yaml --address auto"),
        "spec.entrypoint",
        "--out",
    ),
    "no cluster": (lambda j: j["spec"].pop("rayClusterSpec"), AT, "clusterSelector"),
    "no place for a trial": (
        lambda j: workers_of(j).update(minReplicas=0, replicas=0, maxReplicas=0),
        f"{AT}.workerGroupSpecs",
        "no trial could run",
    ),
    "no workers": (lambda j: cluster_of(j).update(workerGroupSpecs=[]), f"{AT}.workerGroupSpecs", "must not be empty"),
    "replicas above most": (lambda j: workers_of(j).update(replicas=9), f"{AT}.workerGroupSpecs[0].replicas", "maxReplicas 8"),
    "replicas negative": (
        lambda j: workers_of(j).update(minReplicas=-1),
        f"{AT}.workerGroupSpecs[0].minReplicas",
        "at least 0",
    ),
    "never grows": (lambda j: cluster_of(j).pop("enableInTreeAutoscaling"), f"{AT}.enableInTreeAutoscaling", "Write true"),
    "same name twice": (
        lambda j: cluster_of(j)["workerGroupSpecs"].append(copy.deepcopy(workers_of(j))),
        f"{AT}.workerGroupSpecs[1].groupName",
        "another group",
    ),
    "no image": (
        lambda j: container_of(j).pop("image"),
        f"{AT}.workerGroupSpecs[0].template.spec.containers[0].image",
        "missing",
    ),
    "no containers": (
        lambda j: workers_of(j)["template"]["spec"].update(containers=[]),
        f"{AT}.workerGroupSpecs[0].template.spec.containers",
        "empty",
    ),
    "part of a GPU": (
        lambda j: container_of(j)["resources"].update(limits={"nvidia.com/gpu": 0.5}, requests={}),
        f"{AT}.workerGroupSpecs[0].template.spec.containers[0].resources.limits.nvidia.com/gpu",
        "whole GPUs",
    ),
    "GPU requests unequal": (
        lambda j: container_of(j)["resources"]["limits"].update({"nvidia.com/gpu": 2}),
        f"{AT}.workerGroupSpecs[0].template.spec.containers[0].resources",
        "equal",
    ),
    "other Ray": (lambda j: cluster_of(j).update(rayVersion="2.59.0"), f"{AT}.rayVersion", "pinned"),
    "Ray too old for tokens": (lambda j: cluster_of(j).update(rayVersion="2.9.0"), f"{AT}.rayVersion", "no tokens"),
    "no authentication": (
        lambda j: cluster_of(j).pop("authOptions"),
        f"{AT}.headGroupSpec.template.spec.containers[0].env",
        "authOptions",
    ),
    "mode off": (lambda j: cluster_of(j).update(authOptions={"mode": "disabled"}), f"{AT}.authOptions.mode", "'token'"),
    "mode without token": (
        lambda j: env_only(j, TOKEN_MODE),
        f"{AT}.workerGroupSpecs[0].template.spec.containers[0].env",
        "RAY_AUTH_TOKEN",
    ),
    "token in the file": (
        lambda j: env_only(j, TOKEN_MODE, {"name": "RAY_AUTH_TOKEN", "value": "abc"}),
        f"{AT}.headGroupSpec.template.spec.containers[0].env",
        "Secret",
    ),
    "hub's token in the file": (
        lambda j: container_of(j)["env"].append({"name": "HF_TOKEN", "value": "hf_abc"}),
        f"{AT}.workerGroupSpecs[0].template.spec.containers[0].env",
        "Secret",
    ),
    "service in the open": (
        lambda j: cluster_of(j)["headGroupSpec"].update(serviceType="LoadBalancer"),
        f"{AT}.headGroupSpec.serviceType",
        "ClusterIP",
    ),
}


@pytest.mark.parametrize(("edit", "key", "word"), KUBERAY_FAULTS.values(), ids=KUBERAY_FAULTS)
def test_broken_kuberay_jobs_are_refused(edit, key, word, tmp_path):
    job = kuberay_job()
    edit(job)
    found = refused(tmp_path, job)
    assert key in found, found
    assert word in found[key], found


def claim(edit):
    content = copy.deepcopy(next(d for d in documents(ROOT / "deploy" / "kuberay.yaml") if d["kind"] != "RayJob"))
    edit(content["spec"])
    return content


@pytest.mark.parametrize(
    ("edit", "key", "word"),
    [
        (lambda spec: spec.pop("storageClassName"), "storageClassName", "kubectl get storageclass"),
        (lambda spec: spec.update(accessModes=["ReadWriteOnce"]), "accessModes", "Write [ReadWriteMany]"),
        (lambda spec: spec.pop("accessModes"), "accessModes", "Write [ReadWriteMany]"),
    ],
)
def test_a_volume_that_several_nodes_cannot_write_is_refused(edit, key, word, tmp_path):
    found = refused(tmp_path, claim(edit), kuberay_job())
    assert (
        found.keys() == {f"PersistentVolumeClaim uipe: spec.{key}"} and word in found[f"PersistentVolumeClaim uipe: spec.{key}"]
    )


def test_a_claim_of_another_or_of_a_given_volume_is_let_through(tmp_path):
    other = claim(lambda spec: spec.update(accessModes=["ReadWriteOnce"]))
    other["metadata"]["name"] = "other"
    given = claim(lambda spec: spec.update(volumeName="nfs") or spec.pop("storageClassName"))
    assert "RayJob" in checked(tmp_path, other, given, kuberay_job())


def test_pods_without_the_hubs_token_are_a_note(call, tmp_path):
    job = kuberay_job()
    container_of(job)["env"] = [each for each in container_of(job)["env"] if each["name"] != "HF_TOKEN"]
    code, output, _ = validated(call, tmp_path, job)
    assert code == 0 and "note: not every pod has HF_TOKEN" in output
    container_of(job)["envFrom"] = [{"secretRef": {"name": "uipe-secrets"}}]
    assert "HF_TOKEN" not in validated(call, tmp_path, job)[1]


def test_a_token_from_a_secret_will_do(tmp_path):
    job = kuberay_job()
    env_only(job, TOKEN_MODE, FROM_SECRET)
    assert "gpu 0 to 8 x 1 GPUs" in checked(tmp_path, job)


def validated(call, tmp_path, job, *options):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    return call("cluster", "validate", file, *options)


def misspelt():
    job = kuberay_job()
    rename(workers_of(job), "maxReplicas", "maxReplica")
    return job


def test_a_field_that_is_not_known_is_a_note(call, tmp_path):
    code, output, error = validated(call, tmp_path, misspelt())
    assert (code, error) == (0, "")
    assert f"{AT}.workerGroupSpecs[0].maxReplica (did you mean maxReplicas?)" in output
    assert "spec.backoffLimit" in output and "--schema FILE|kubectl" in output


def test_a_job_may_wait_for_its_submission_or_choose_a_cluster(call, tmp_path):
    job = kuberay_job()
    job["spec"].update(submissionMode="InteractiveMode")
    job["spec"].pop("entrypoint")
    assert validated(call, tmp_path, job)[0] == 0
    job = kuberay_job()
    job["spec"].pop("rayClusterSpec")
    job["spec"]["clusterSelector"] = {"ray.io/cluster": "ours"}
    code, output, _ = validated(call, tmp_path, job)
    assert code == 0 and "RayJob on the cluster of ray.io/cluster=ours" in output


def schema_of(value):
    """A structural schema that fits a value, in the form the API server keeps: only made up for these tests."""
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: schema_of(inner) for key, inner in value.items()}}
    if isinstance(value, list):
        merged = {}
        for inner in value:
            merged = {**merged, **inner} if isinstance(inner, dict) else inner
        return {"type": "array", "items": schema_of(merged)}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer", "format": "int32"}
    return {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}


def definition():
    schema = schema_of(kuberay_job())
    workers = schema["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]["workerGroupSpecs"]["items"]
    workers["properties"]["replicas"]["maximum"] = 100
    workers["properties"]["rayStartParams"] = {"type": "object", "additionalProperties": {"type": "string"}}
    workers["properties"]["template"]["x-kubernetes-preserve-unknown-fields"] = True
    versions = [{"name": "v1alpha1", "schema": {}}, {"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    return {"kind": "CustomResourceDefinition", "spec": {"versions": versions}}


@pytest.mark.parametrize("form", ["crd.yaml", "crd.json", "schema.yaml", "bare.json", "kubectl"])
def test_kuberays_own_schema_checks_every_field(call, tmp_path, form, monkeypatch):
    crd = definition()
    schema = crd["spec"]["versions"][1]["schema"]
    content = {"schema.yaml": schema, "bare.json": schema["openAPIV3Schema"]}.get(form, crd)
    source = tmp_path / form
    if form == "kubectl":
        source.write_text(f"#!{sys.executable}\nprint({json.dumps(crd)!r})\n")
        source.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        source = "kubectl"
    else:
        source.write_text(json.dumps(content) if form.endswith("json") else yaml.safe_dump(content))
    code, output, error = validated(call, tmp_path, kuberay_job(), "--schema", source)
    assert (code, error) == (0, "") and "note: " not in output
    job = misspelt()
    job["spec"]["backoffLimit"] = "three"
    workers_of(job)["replicas"] = 101
    code, _, error = validated(call, tmp_path, job, "--schema", source)
    assert code == 2
    assert f"{AT}.workerGroupSpecs[0].maxReplica: found 8, but KubeRay has no such field. Did you mean maxReplicas?" in error
    assert "spec.backoffLimit: KubeRay's schema refuses it: 'three' is not of type 'integer'" in error
    assert f"{AT}.workerGroupSpecs[0].replicas: KubeRay's schema refuses it: 101 is greater than the maximum of 100" in error


def test_a_schema_that_cannot_be_had_is_refused(call, tmp_path, monkeypatch):
    for name, text, said in (
        ("none.yaml", None, "cannot be read"),
        ("other.yaml", "kind: Secret\n", "holds no schema of a RayJob v1"),
        ("torn.json", "{", "neither YAML nor JSON"),
        ("odd.yaml", "properties: {spec: {type: 3}}\n", "no valid schema"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        code, _, error = validated(call, tmp_path, kuberay_job(), "--schema", tmp_path / name)
        assert code == 2 and said in error and "; give KubeRay's CRD" in error, error
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = validated(call, tmp_path, kuberay_job(), "--schema", "kubectl")
    assert code == 2 and "`kubectl get crd rayjobs.ray.io" in error and "give KubeRay's CRD as a file" in error
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho 'The connection to the server was refused' >&2\nexit 1\n")
    (tmp_path / "kubectl").chmod(0o755)
    code, _, error = validated(call, tmp_path, kuberay_job(), "--schema", "kubectl")
    assert code == 2 and "The connection to the server was refused" in error
    assert "leave it out" in call("cluster", "validate", RAY_UP["gcp"], "--schema", "kubectl")[2]


def test_every_problem_of_a_kuberay_job_is_told_at_once(tmp_path):
    job = kuberay_job()
    workers_of(job).update(replicas=9)
    cluster_of(job).pop("authOptions")
    assert len(refused(tmp_path, job)) == 3  # replicas, and no token for head and workers


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "mapping"),
        ("a: [1\n", "not valid YAML at line"),
        ("a: 1\n---\nb: 2\n", "single one"),
        ("apiVersion: v1\nkind: Secret\n", "kind RayJob"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
        ("\x00\x01", "not valid YAML"),
        ("1: 2\n", "mapping"),
    ],
)
def test_files_that_describe_no_cluster_are_refused(text, word, tmp_path, call):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    code, output, error = call("cluster", "validate", file)
    assert (code, output) == (2, "")
    assert error.startswith(f"error: {file}: ")
    assert word in error


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path, call):
    assert "No such file" in call("cluster", "validate", tmp_path / "none.yaml")[2]
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00\xd8")
    assert "not a text file" in call("cluster", "validate", file)[2]
    assert call("cluster", "validate", tmp_path)[0] == 2
