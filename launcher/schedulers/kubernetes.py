"""Kubernetes with the operators of Kubeflow: manifests of an MPIJob or a PyTorchJob.

Sources: Kubeflow MPI Operator 0.5.0, pkg/apis/kubeflow/v2beta1/types.go (slotsPerWorker, mpiImplementation, runPolicy)
and pkg/controller/mpi_job_controller.go (/etc/mpi/hostfile in the launcher's pod with lines host:4 for MPICH; the
launcher is a Job with the policy's limits; a finished one has the workers deleted). Kubeflow Training Operator 1.8.0,
pkg/apis/kubeflow.org/v1 (pytorch_types.go: nprocPerNode, a container named pytorch; common_types.go) and
pkg/controller.v1/pytorch (PET_* variables, which torchrun reads).

A pod's end (eviction) is a SIGTERM and terminationGracePeriodSeconds later a SIGKILL, and the pod is started again. At
activeDeadlineSeconds, which counts from the first start, pods end the same way, but for good (Kubernetes documentation,
"Jobs": "Failed", "DeadlineExceeded"; Training Operator, pkg/controller.v1/common/job.go). torchrun passes a SIGTERM on
and kills its ranks 30 s later, or when TORCH_ELASTIC_SHUTDOWN_TIMEOUT says (torch 2.13; 2.11 knows the 30 s only).
"""

import json
from collections.abc import Mapping
from typing import Any

from launcher.hosts.hostfile import Host
from launcher.schedulers.base import Batch, Scheduler, time_to_save

_HOSTFILE = "/etc/mpi/hostfile"
_SHARED_MEMORY = "shared-memory"


def script(batch: Batch) -> str:
    """Returns a manifest for kubectl apply."""
    return "\n".join(_yaml(_mpi_job(batch) if batch.kind == "mpijob" else _pytorch_job(batch))) + "\n"


def hosts(environ: Mapping[str, str]) -> list[Host]:
    """Returns []: a pod's hostfile is named on the command line that the manifest gives it."""
    return []


def _mpi_job(batch: Batch) -> dict[str, Any]:
    command = batch.launch("--hostfile", _HOSTFILE)
    return _job(
        batch,
        "kubeflow.org/v2beta1",
        "MPIJob",
        {
            "slotsPerWorker": batch.ranks_per_node,
            "mpiImplementation": "MPICH",
            "runPolicy": _policy(batch),
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "OnFailure",
                    "template": _pod(batch, "launcher", command, {}),
                },
                "Worker": {
                    "replicas": batch.nodes,
                    "template": _pod(batch, "worker", ["/usr/sbin/sshd", "-De"], _resources(batch)),
                },
            },
        },
    )


def _pytorch_job(batch: Batch) -> dict[str, Any]:
    command = [batch.python, "-m", "torch.distributed.run", *batch.program]
    template = _pod(batch, "pytorch", command, _resources(batch))
    timeout = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(time_to_save(batch.warning))}
    template["spec"]["containers"][0]["env"] = [timeout]
    replicas: dict[str, Any] = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": template}}
    if batch.nodes > 1:
        replicas["Worker"] = {"replicas": batch.nodes - 1, "restartPolicy": "OnFailure", "template": template}
    return _job(
        batch,
        "kubeflow.org/v1",
        "PyTorchJob",
        {
            "nprocPerNode": str(batch.ranks_per_node),
            "runPolicy": _policy(batch),
            "pytorchReplicaSpecs": replicas,
        },
    )


def _job(batch: Batch, version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": batch.name}, "spec": spec}


def _policy(batch: Batch) -> dict[str, Any]:
    return {"activeDeadlineSeconds": batch.seconds, "backoffLimit": 100, "cleanPodPolicy": "Running"}


def _pod(batch: Batch, name: str, command: list[str], resources: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": batch.image,
        "workingDir": batch.directory,
        "command": command,
    }
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": batch.warning, "containers": [container]}
    if resources:
        container["resources"] = {"limits": resources}
        container["volumeMounts"] = [{"name": _SHARED_MEMORY, "mountPath": "/dev/shm"}]
        spec["volumes"] = [{"name": _SHARED_MEMORY, "emptyDir": {"medium": "Memory"}}]
    return {"spec": spec}


def _resources(batch: Batch) -> dict[str, Any]:
    limits: dict[str, Any] = {"cpu": batch.ranks_per_node * batch.cores_per_rank}
    return limits | ({"nvidia.com/gpu": batch.gpus_per_node} if batch.gpus_per_node else {})


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Returns the lines of a mapping; scalars and lists of words are written as JSON, which YAML contains."""
    lines = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            lines += [f"{indent}{key}:", *_yaml(inner, f"{indent}  ")]
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            lines.append(f"{indent}{key}:")
            for item in inner:
                first, *rest = _yaml(item, f"{indent}    ")
                lines += [f"{indent}  - {first.strip()}", *rest]
        else:
            lines.append(f"{indent}{key}: {json.dumps(inner)}")
    return lines


KUBERNETES = Scheduler(
    "k8s", "Kubernetes", hosts, script, "kubectl apply -f", ".yaml", ("mpijob", "pytorchjob"), ("pytorchjob",)
)
