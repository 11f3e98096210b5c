"""launch/kubernetes against the fields of the API types they are made for, since no cluster is at hand here.

The schemas below hold the fields that exist, not only those in use, of: kubeflow.org/v1 PyTorchJob as in training
operator 1.9; trainer.kubeflow.org/v1alpha1 TrainJob and TrainingRuntime as in Trainer 2.0 to 2.2 (those that all three
have); jobset.x-k8s.io/v1alpha2; and the parts of batch/v1 and core/v1 of Kubernetes 1.31 that a training pod can use.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dctc.config import load_config
from tests.tiny import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))

QUANTITIES = {"*": str}  # resource: amount, which Kubernetes wants as a string
METADATA = {"name": str, "namespace": str, "labels": {"*": str}, "annotations": {"*": str}}
ENV = [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}]
RESOURCES = {"requests": QUANTITIES, "limits": QUANTITIES}
CONTAINER = {
    "name": str, "image": str, "imagePullPolicy": str, "command": [str], "args": [str], "workingDir": str, "env": ENV,
    "ports": [{"name": str, "containerPort": int, "protocol": str}], "resources": RESOURCES,
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
    "securityContext": {
        "allowPrivilegeEscalation": bool, "privileged": bool, "readOnlyRootFilesystem": bool, "runAsNonRoot": bool,
        "runAsUser": int, "runAsGroup": int, "capabilities": {"add": [str], "drop": [str]},
        "seccompProfile": {"type": str, "localhostProfile": str},
    },
}  # fmt: skip
POD = {
    "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": {"*": str}, "hostNetwork": bool,
    "serviceAccountName": str, "priorityClassName": str, "containers": [CONTAINER], "initContainers": [CONTAINER],
    "imagePullSecrets": [{"name": str}],
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}],
    "securityContext": {
        "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int, "fsGroupChangePolicy": str,
        "supplementalGroups": [int], "seccompProfile": {"type": str, "localhostProfile": str},
    },
    "volumes": [{
        "name": str, "emptyDir": {"medium": str, "sizeLimit": str},
        "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
        "configMap": {"name": str}, "secret": {"secretName": str}, "hostPath": {"path": str, "type": str},
    }],
}  # fmt: skip
POD_TEMPLATE = {"metadata": METADATA, "spec": POD}
EXIT_CODES = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int, "activeDeadlineSeconds": int,
    "ttlSecondsAfterFinished": int, "suspend": bool, "podReplacementPolicy": str, "template": POD_TEMPLATE,
    "podFailurePolicy": {"rules": [{
        "action": str, "onExitCodes": EXIT_CODES, "onPodConditions": [{"type": str, "status": str}],
    }]},
}  # fmt: skip
JOBSET = {
    "replicatedJobs": [{
        "name": str, "groupName": str, "replicas": int, "template": {"metadata": METADATA, "spec": JOB},
        "dependsOn": [{"name": str, "status": str}],
    }],
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "successPolicy": {"operator": str, "targetReplicatedJobs": [str]},
    "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": [{
        "name": str, "action": str, "onJobFailureReasons": [str], "targetReplicatedJobs": [str],
    }]},
    "startupPolicy": {"startupPolicyOrder": str}, "suspend": bool, "ttlSecondsAfterFinished": int,
}  # fmt: skip
TOP = {"apiVersion": str, "kind": str, "metadata": METADATA}
REPLICAS = {"replicas": int, "restartPolicy": str, "template": POD_TEMPLATE}
SCHEMAS: dict[tuple[str, str], Any] = {
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): TOP | {"spec": {
        "mlPolicy": {"numNodes": int, "torch": {}}, "podGroupPolicy": {"coscheduling": {"scheduleTimeoutSeconds": int}},
        "template": {"metadata": METADATA, "spec": JOBSET},
    }},
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): TOP | {"spec": {
        "runtimeRef": {"name": str, "apiGroup": str, "kind": str}, "suspend": bool, "managedBy": str,
        "trainer": {
            "image": str, "command": [str], "args": [str], "env": ENV, "numNodes": int, "resourcesPerNode": RESOURCES,
        },
    }},
    ("kubeflow.org/v1", "PyTorchJob"): TOP | {"spec": {
        "nprocPerNode": str,
        "runPolicy": {
            "cleanPodPolicy": str, "ttlSecondsAfterFinished": int, "activeDeadlineSeconds": int, "backoffLimit": int,
            "suspend": bool, "schedulingPolicy": {"minAvailable": int, "queue": str, "priorityClass": str},
        },
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    }},
}  # fmt: skip


def wrong(value: Any, schema: Any, place: str) -> list[str]:
    """Where a document does not follow its schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        unknown = [] if "*" in schema else [f"{place}.{key}" for key in value if key not in schema]
        known = [key for key in value if "*" in schema or key in schema]
        inner = [wrong(value[key], schema.get(key, schema.get("*")), f"{place}.{key}") for key in known]
        return unknown + [line for lines in inner for line in lines]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        inner = [wrong(item, schema[0], f"{place}[{index}]") for index, item in enumerate(value)]
        return [line for lines in inner for line in lines]
    return [] if type(value) is schema else [f"{place} is {value!r}, no {schema.__name__}"]


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def everywhere(value: Any, key: str) -> list[Any]:
    """All values of a key, at any depth."""
    if isinstance(value, list):
        return [found for item in value for found in everywhere(item, key)]
    if not isinstance(value, dict):
        return []
    return [found for name, item in value.items() for found in ([item] if name == key else []) + everywhere(item, key)]


def pods(path: Path) -> list[dict[str, Any]]:
    return [spec for spec in everywhere(documents(path), "spec") if "containers" in spec]


def test_a_wrong_field_is_found() -> None:
    (job,) = documents(FOLDER / "pytorchjob.yaml")
    schema = SCHEMAS[job["apiVersion"], job["kind"]]
    job["spec"]["runPolicy"]["backofLimit"] = 3
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["env"][0]["value"] = 2
    found = wrong(job, schema, "job")
    assert "job.spec.runPolicy.backofLimit" in found
    assert "job.spec.pytorchReplicaSpecs.Worker.template.spec.containers[0].env[0].value is 2, no str" in found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_field_exists(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        assert wrong(document, SCHEMAS[document["apiVersion"], document["kind"]], document["kind"]) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_pods_run_as_the_image_does_and_give_the_ranks_time(path: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)
    wait = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (ROOT / "launch" / "torchrun.sh").read_text())
    assert user
    assert wait
    assert pods(path)
    for pod in pods(path):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user[1]), int(user[2]))
        assert context["fsGroup"] == int(user[2])
        assert pod["terminationGracePeriodSeconds"] > int(wait[1])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "readOnly" not in mounted["/work/runs"]["persistentVolumeClaim"]
        assert {"/work/datasets", "/work/runs", "/dev/shm"} == set(mounted)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_commands_are_ones_that_the_image_has(path: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["tini"' in dockerfile
    copied = re.findall(r"^COPY (\S+/) (\S+/)$", dockerfile, re.MULTILINE)

    def source(inside: str) -> Path:
        """The file of the repository that the image has at a place."""
        relative = Path(inside).relative_to("/opt/dctc")
        assert any(relative.is_relative_to(folder) for folder, _ in copied), f"{inside} is not copied"
        return ROOT / relative

    for command in everywhere(documents(path), "command"):
        assert command[:2] == ["tini", "--"]
        script = source(command[2])
        assert script.name == "torchrun.sh"
        assert script.stat().st_mode & 0o111, "it can be executed"
    arguments = everywhere(documents(path), "args")
    assert arguments
    for config, *overrides in arguments:
        assert source(config).is_file()
        settings = load_config(str(source(config)), overrides)
        assert settings.data.dataset == Path("/work/datasets/potsdam")
        assert settings.run.output == Path("/work/runs")
        ranks = 2 * int(next(iter(everywhere(documents(path), "limits")))["nvidia.com/gpu"])
        assert settings.data.batch_labelled % ranks == settings.data.batch_unlabelled % ranks == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_variables_are_read_by_someone(path: Path) -> None:
    readers = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "dctc").rglob("*.py")]
    text = "\n".join(reader.read_text() for reader in readers)
    names = [variable["name"] for block in everywhere(documents(path), "env") for variable in block]
    assert names
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_the_operator_v1_starts_a_stopped_pod_again() -> None:
    """It takes codes below 128 for final under the policy ExitCode, and knows its container by name."""
    (job,) = documents(FOLDER / "pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {spec["restartPolicy"] for spec in replicas.values()} == {"OnFailure"}
    assert "elasticPolicy" not in job["spec"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    nodes = {variable["name"]: variable["value"] for variable in container["env"]}["NNODES"]
    assert int(nodes) == sum(spec["replicas"] for spec in replicas.values())


def test_the_runtime_of_v2_starts_all_again_but_for_bad_arguments() -> None:
    runtime, job = documents(FOLDER / "trainjob.yaml")
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["apiGroup"] == runtime["apiVersion"].split("/")[0]
    jobset = runtime["spec"]["template"]["spec"]
    (node,) = jobset["replicatedJobs"]
    template = node["template"]
    # The labels and names by which Trainer finds what to fill in.
    assert template["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = template["spec"]["template"]["spec"]["containers"]
    assert node["name"] == container["name"] == "node"
    # A pod failure policy needs pods that are not restarted in place.
    assert template["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert template["spec"]["backoffLimit"] == 0
    (rule,) = template["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [2]}}
    (fatal,) = jobset["failurePolicy"]["rules"]
    assert (fatal["action"], fatal["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["failurePolicy"]["maxRestarts"] > 0
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert not reserved & {variable["name"] for variable in job["spec"]["trainer"]["env"]}
