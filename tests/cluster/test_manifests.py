"""The files of cluster/ are valid, safe and name what exists; no cluster and no network needed."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from orpo_ray.config.file import load_config
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.version import __version__
from tests.cluster.manifests import (
    CLUSTER,
    PLAIN,
    RAYJOBS,
    SCHEMAS,
    containers,
    documents,
    may_connect,
    of_kind,
    pod_templates,
    rayjob,
    unknown_fields,
    worker_groups,
)
from tests.conftest import ROOT

KUBERNETES = "1.34"
LAUNCHER = "ray-cluster-aws.yaml"
SECRET = re.compile(r"TOKEN|SECRET|KEY|PASSWORD|CREDENTIAL", re.IGNORECASE)
SET_SECRET = re.compile(rf"^\s*\w*({SECRET.pattern})\s*:", re.IGNORECASE | re.MULTILINE)
OF_RAY_ON_SIGTERM_S = 30  # RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, unless it is set

all_rayjobs = pytest.mark.parametrize("name", RAYJOBS)


@pytest.fixture(scope="module")
def rayjob_schema() -> dict:
    path = SCHEMAS / "ray.io_rayjobs.yaml"
    if not path.exists():
        pytest.skip("KubeRay's schemas are not beside this checkout")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    [version] = [
        version
        for version in yaml.load(path.read_text(), loader)["spec"]["versions"]
        if version["name"] == "v1"
    ]
    return version["schema"]["openAPIV3Schema"]


def config_of(name: str, folder: Path) -> ORPOConfig:
    """What the command in a RayJob's entrypoint would load."""
    path = Path(rayjob(name)["spec"]["entrypoint"].split()[-1])
    [(_, head)] = [found for found in containers(name) if found[0] == "head"]
    [mount] = [m for m in head["volumeMounts"] if m["mountPath"] == str(path.parent)]
    volumes = pod_templates(name)["head"]["spec"]["volumes"]
    [volume] = [v for v in volumes if v["name"] == mount["name"]]
    [config_map] = of_kind(name, "ConfigMap")
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    copy = folder / path.name
    copy.write_text(config_map["data"][path.name])
    return load_config(str(copy), [])


@all_rayjobs
def test_a_rayjob_has_what_kuberay_knows_and_nothing_else(name, rayjob_schema):
    jsonschema.Draft202012Validator(rayjob_schema).validate(rayjob(name))
    assert unknown_fields(rayjob(name), rayjob_schema) == []


@pytest.mark.parametrize("name", [*RAYJOBS, *PLAIN])
def test_plain_documents_and_pods_are_valid_kubernetes(name):
    plain = [document for document in documents(name) if document["kind"] != "RayJob"]
    assert plain
    if name in RAYJOBS:
        plain += [{"apiVersion": "v1", "kind": "Pod", **t} for t in pod_templates(name).values()]
    for document in plain:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_launcher_file_is_valid_by_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load((CLUSTER / LAUNCHER).read_text()))


def test_no_file_opens_a_server_to_every_address():
    for path in CLUSTER.iterdir():
        assert "0.0.0.0" not in path.read_text(), path


@all_rayjobs
def test_secrets_come_from_secrets(name):
    for pod, container in containers(name):
        for entry in container.get("env", ()):
            if SECRET.search(entry["name"]):
                assert list(entry) == ["name", "valueFrom"], (pod, entry["name"])
                assert list(entry["valueFrom"]) == ["secretKeyRef"], (pod, entry["name"])
    [config_map] = of_kind(name, "ConfigMap")
    for text in config_map["data"].values():
        assert not SET_SECRET.search(text)


@all_rayjobs
def test_pods_run_without_root_and_without_privileges(name):
    for pod, template in pod_templates(name).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, pod
        assert spec["securityContext"]["runAsUser"] > 0, pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert spec["automountServiceAccountToken"] is False, pod
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), pod
        assert not [volume for volume in spec.get("volumes", ()) if "hostPath" in volume], pod
    for pod, container in containers(name):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, pod


@all_rayjobs
def test_every_container_says_what_it_takes(name):
    for pod, container in containers(name):
        resources = container["resources"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= resources[kind].keys(), (pod, kind)
        has_gpu = "nvidia.com/gpu" in resources["limits"]
        assert has_gpu == (pod == "gpu")
        assert container["image"].endswith(f":{__version__}-{'cuda' if has_gpu else 'cpu'}")


@all_rayjobs
def test_workers_that_are_taken_away_give_notice_and_have_the_time_for_it(name):
    from ray.scripts.scripts import drain_node

    for group in worker_groups(name):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (shell, option) == ("/bin/bash", "-c")
        words = shlex.split(script)
        limit_s, wait_s = int(words[1]), int(words[-1])
        assert [words[0], *words[2:4], *words[-3:-1]] == [
            "timeout",
            "ray",
            "drain-node",
            "&&",
            "sleep",
        ]
        options = drain_node.make_context("drain-node", words[4:-3]).params
        assert options["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        assert options["deadline_remaining_seconds"] == wait_s
        taken_s = limit_s + wait_s + OF_RAY_ON_SIGTERM_S
        assert taken_s < spec["terminationGracePeriodSeconds"]


@all_rayjobs
def test_the_cluster_asks_for_a_token_and_runs_the_version_that_is_tested(name):
    spec = rayjob(name)["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    assert f"ray=={ray.__version__}\n" in (ROOT / "constraints.txt").read_text()


@all_rayjobs
def test_the_head_has_no_work_and_data_tasks_find_cpus_without_gpus_only(name):
    head = rayjob(name)["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert head["serviceType"] == "ClusterIP"
    started = {group["groupName"]: group["rayStartParams"] for group in worker_groups(name)}
    assert started == {"cpu": {}, "gpu": {"num-cpus": "0"}}


@all_rayjobs
def test_the_entrypoint_is_a_command_of_the_project_with_a_config_it_takes(name, tmp_path):
    entrypoint = rayjob(name)["spec"]["entrypoint"]
    match = re.fullmatch(r"python (jobs/\w+\.py) (/[\w/.-]+\.yaml)", entrypoint)
    assert match, entrypoint
    assert (ROOT / match[1]).is_file()
    config = config_of(name, tmp_path)
    [gpus] = [g["replicas"] for g in worker_groups(name) if g["groupName"] == "gpu"]
    assert config.ray.max_workers <= gpus
    assert config.ray.use_gpu is True
    assert config.ray.resources_per_worker == {"GPU": 1.0}
    # A retry goes on only where the next cluster finds the run again.
    assert config.output.run_name
    assert config.output.output_dir.startswith("/data/")
    assert rayjob(name)["spec"]["backoffLimit"] > 0


@all_rayjobs
def test_no_cluster_outlives_its_job_for_long_and_no_gpu_a_failure(name):
    """Whatever the end; the rules replace `shutdownAfterJobFinishes`, which excludes them."""
    spec = rayjob(name)["spec"]
    assert spec["preRunningDeadlineSeconds"] <= 3600
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & spec.keys()
    after: dict[str, dict[str, int]] = {}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        (end,) = (value for key, value in rule["condition"].items() if key != "ttlSeconds")
        after.setdefault(end, {})[rule["policy"]] = rule["condition"]["ttlSeconds"]
    assert after.keys() == {"SUCCEEDED", "Failed"}
    assert all(rules["DeleteCluster"] <= 3600 for rules in after.values())
    assert after["Failed"]["DeleteWorkers"] == 0


def test_what_is_searched_are_settings_with_domains(tmp_path):
    from orpo_ray.orchestration.sweep.search_space import search_space

    assert search_space(config_of("rayjob-tune.yaml", tmp_path)).keys() == {"beta", "learning_rate"}


@all_rayjobs
def test_every_ray_pod_has_the_shared_storage(name):
    [claim] = of_kind("storage.yaml", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod, template in pod_templates(name).items():
        if pod == "submitter":
            continue
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        [container] = template["spec"]["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert [(claims[n], mounted[n]) for n in claims] == [(claim["metadata"]["name"], "/data")]


@pytest.mark.parametrize(
    ("peer", "namespace", "target", "port", "expected"),
    [
        ("cpu", None, "head", 6379, True),
        ("head", None, "gpu", 40000, True),
        ("submitter", None, "head", 8265, True),
        ("submitter", None, "head", 6379, False),
        ("submitter", None, "gpu", 8080, False),
        ("stranger", None, "head", 8265, False),
        ("stranger", None, "submitter", 80, False),
        ("operator", "kuberay-system", "head", 8265, True),
        ("operator", "kuberay-system", "head", 6379, False),
        ("operator", "elsewhere", "head", 8265, False),
        ("stranger", "kuberay-system", "head", 8265, False),
        ("stranger", "monitoring", "gpu", 8080, True),
        ("stranger", "monitoring", "head", 8265, False),
        ("cpu", "elsewhere", "head", 6379, False),
    ],
)
@all_rayjobs
def test_only_who_has_to_can_connect(name, peer, namespace, target, port, expected):
    labels = {pod: t["metadata"]["labels"] for pod, t in pod_templates(name).items()}
    labels |= {"stranger": {}, "operator": {"app.kubernetes.io/name": "kuberay-operator"}}
    policies = of_kind("network-policy.yaml", "NetworkPolicy")
    assert may_connect(policies, labels[peer], labels[target], port, namespace) == expected


@all_rayjobs
def test_prometheus_is_told_the_port_that_it_may_connect_to(name):
    for pod, container in containers(name):
        if pod != "submitter":
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            told = pod_templates(name)[pod]["metadata"]["annotations"]
            assert told["prometheus.io/port"] == str(ports["metrics"]) == "8080"


def test_the_image_runs_as_the_user_of_the_manifests():
    stages = re.split(r"^FROM ", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    [user] = {
        template["spec"]["securityContext"]["runAsUser"]
        for name in RAYJOBS
        for template in pod_templates(name).values()
    }
    for target in ("cpu", "cuda"):
        [stage] = [stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}")]
        assert re.findall(r"^USER (\d+):\d+$", stage, flags=re.MULTILINE) == [str(user)]
        assert "COPY jobs /app/jobs\nWORKDIR /app\n" in stage


def test_nodes_of_aws_are_private_and_ask_for_a_token():
    from ray.scripts.scripts import start

    launcher = yaml.safe_load((CLUSTER / LAUNCHER).read_text())
    assert launcher["provider"]["use_internal_ips"] is True
    for node_type in launcher["available_node_types"].values():
        # Without a group of one's own the launcher makes one that is open at port 22.
        assert node_type["node_config"]["SecurityGroupIds"]
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node_type.get("min_workers", 0) == node_type.get("max_workers", 0)
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        before, options = launcher[kind][-1].split("ray start ")
        assert "RAY_AUTH_MODE=token" in before
        start.make_context("start", shlex.split(re.sub(r"\$\(.*?\)", "10.0.0.1", options)))
    assert launcher["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
