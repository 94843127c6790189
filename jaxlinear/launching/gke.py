"""A run as a JobSet of a GKE cluster: one job per slice of TPUs, or one for all GPUs, with one pod per host. All are
started again together when one of them is lost."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from jaxlinear.errors import UserError
from jaxlinear.exit_status import BAD_INPUT, PREEMPTED
from jaxlinear.launching.request import Request

_PORT = 8476
_SHARED_MEMORY = PurePosixPath("/dev/shm")

# Seconds that a pod on a spot node has by default, and at most if its node pool grants more, whatever the pod asks for
# (cloud.google.com/kubernetes-engine/docs/concepts/spot-vms).
_SPOT_GRACE, _MOST_SPOT_GRACE = 15, 120

# Labels of the nodes (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and .../how-to/gpus).
_TPUS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
_GPUS = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "a100": "nvidia-tesla-a100"}


def render(
    request: Request,
    *,
    image: str,
    mounts: Sequence[str],
    service_account: str | None = None,
    restarts: int = 20,
    grace: int | None = None,
    spot: bool = False,
    queue: str | None = None,
) -> str:
    """The manifest for ``kubectl apply -f``.

    Args:
      request: for TPUs or GPUs.
      image: a container image with this project in its working directory.
      mounts: what is mounted in every pod: ``gs://BUCKET:/PATH``, or ``CLAIM:/PATH`` for a PersistentVolumeClaim that many
        nodes may write. The work directory is inside one of them: a pod's own disk is lost with the pod.
      service_account: the Kubernetes service account that may read and write the buckets.
      restarts: how often a failure is followed by another start; preemptions do not count.
      grace: seconds between SIGTERM and SIGKILL; by default 300, and 15 on spot nodes.
      spot: whether to use nodes that may be taken away at any time.
      queue: the Kueue queue in which the set waits.
    """
    if request.kind not in _TPUS | _GPUS:
        raise UserError(
            f"--platform=gke needs a target with known nodes, one of {', '.join(_TPUS | _GPUS)}, not {request.target}"
        )
    if not image:
        raise UserError("--platform=gke needs --image, a container with this project in its working directory")
    hosts = request.hosts // request.slices
    if request.slices > 1 and hosts == 1:
        raise UserError(
            f"{request.target}: GKE joins only slices of several hosts, and one of {request.shape} chips has one "
            "host; use one slice of as many chips, or larger slices"
        )
    grace = grace or (_SPOT_GRACE if spot else 300)
    if spot and grace > _MOST_SPOT_GRACE:
        raise UserError(
            f"--grace={grace}: spot nodes are gone {_SPOT_GRACE} seconds after SIGTERM, or up to {_MOST_SPOT_GRACE} "
            f"if their node pool allows it; with --spot, --grace must be at most {_MOST_SPOT_GRACE}"
        )
    volumes, mounted = _volumes(mounts)
    paths = [PurePosixPath(mount["mountPath"]) for mount in mounted]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"--mount is given twice at {path}; mount each bucket or claim at a path of its own")
    if request.platform == "gpu" and _SHARED_MEMORY in paths:
        raise UserError(f"--mount at {_SHARED_MEMORY}: NCCL's shared memory is mounted there; give another path")
    workdir = PurePosixPath(request.workdir)
    if ".." in workdir.parts or not any(workdir.is_relative_to(path) for path in paths):
        below = " or ".join(map(str, paths)) or "/PATH of a --mount=gs://BUCKET:/PATH or --mount=CLAIM:/PATH"
        raise UserError(
            f"--workdir={request.workdir} would be on a pod's own disk, which is lost with the pod and not visible to "
            f"other pods; give one below {below}"
        )
    on_tpu = request.platform == "tpu"
    resource = "google.com/tpu" if on_tpu else "nvidia.com/gpu"
    selector = (
        {
            "cloud.google.com/gke-tpu-accelerator": _TPUS[request.kind],
            "cloud.google.com/gke-tpu-topology": request.shape,
        }
        if on_tpu
        else {"cloud.google.com/gke-accelerator": _GPUS[request.kind]}
    )
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    # Kubernetes expands $(NAME) and $$ in a command before bash does (the command of a Container in its API).
    line = " ".join([request.line().replace("$", "$$"), *_joining(request)])
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", f"exec {line}"],
        "resources": {"limits": {resource: request.chips_a_host}},
    }
    if request.hosts > 1:
        container["ports"] = [{"containerPort": _PORT}]
    if not on_tpu:  # for NCCL's buffers: a container's 64 MB are too few
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounted.append({"name": "shared-memory", "mountPath": str(_SHARED_MEMORY)})
    container["volumeMounts"] = mounted
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": volumes,
    }
    if service_account:
        pod["serviceAccountName"] = service_account
    template: dict[str, Any] = {"spec": pod}
    if any("csi" in volume for volume in volumes):
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    # A pod that is evicted, or that saved itself, ends the job at once; the set then starts again, and this is not counted.
    # Bad input ends the set, which recognises it by the message: a job's reason is the same for all rules. Any other
    # failure is counted.
    rules = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [BAD_INPUT]}},
    ]
    refused = {
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f".*failed with exit code {BAD_INPUT} matching FailJob rule.*"],
    }
    job = {
        "backoffLimit": 0,
        "completions": hosts,
        "parallelism": hosts,
        "completionMode": "Indexed",
        "podFailurePolicy": {"rules": rules},
        "template": template,
    }
    metadata: dict[str, Any] = {"name": request.name}
    if queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    if on_tpu and request.hosts > 1:
        # Puts all pods of a job on the hosts of one slice, and no others there. From the set, GKE's own webhook also tells
        # the pods which slice of how many is theirs (cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice).
        topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        metadata["annotations"] = topology
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [
                    refused,
                    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "hosts", "replicas": request.slices, "template": {"spec": job}}],
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False, width=1000)


def _volumes(mounts: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The volumes of a pod, and where its container mounts them
    (cloud.google.com/kubernetes-engine/docs/how-to/persistent-volumes; for buckets, its page
    cloud-storage-fuse-csi-driver)."""
    volumes: list[dict[str, Any]] = []
    mounted = []
    for i, mount in enumerate(mounts):
        given = re.fullmatch(r"(?:gs://([^:/]+)|([^:/]+)):(/[^:]+)", mount)
        if given is None:
            raise UserError(f"--mount={mount!r} must be gs://BUCKET:/PATH or CLAIM:/PATH")
        bucket, claim, path = given.groups()
        source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": claim}}
        if bucket:
            attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
            source = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        volumes.append({"name": f"mount-{i}", **source})
        mounted.append({"name": f"mount-{i}", "mountPath": path})
    return volumes, mounted


def _joining(request: Request) -> list[str]:
    """How the processes find one another: on TPU, JAX knows it from the pods' environment."""
    if request.platform == "tpu" or request.hosts == 1:
        return []
    first = f"{request.name}-hosts-0-0.{request.name}"
    return [f"--coordinator={first}:{_PORT}", f"--processes={request.hosts}", '--process="$JOB_COMPLETION_INDEX"']
