"""Every document fits its schema, and one with a slip in it does not."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.documents import CLUSTER, Document, Refused, check, load

FILES = (
    "aws.yaml",
    "gcp.yaml",
    "serve_config.yaml",
    "kuberay/disruption.yaml",
    "kuberay/network.yaml",
    "kuberay/podmonitor.yaml",
    "kuberay/rayservice.yaml",
    "kuberay/redis.yaml",
)
Slip = Callable[[Document], None]


def at(document: Any, path: str) -> Any:
    """`spec.containers.0` of a document."""
    for key in path.split(".") if path else ():
        document = document[int(key) if isinstance(document, list) else key]
    return document


def misspelt(path: str) -> Slip:
    def slip(document: Document) -> None:
        above, _, key = path.rpartition(".")
        owner = at(document, above)
        owner[key[:-1]] = owner.pop(key)

    return slip


def missing(path: str) -> Slip:
    def slip(document: Document) -> None:
        above, _, key = path.rpartition(".")
        del at(document, above)[key]

    return slip


def wrong(path: str, value: object) -> Slip:
    def slip(document: Document) -> None:
        above, _, key = path.rpartition(".")
        at(document, above)[key] = value

    return slip


def within(old: str, new: str) -> Slip:
    """Of a RayService's serveConfigV2, which is one string to KubeRay."""

    def slip(document: Document) -> None:
        assert old in document["spec"]["serveConfigV2"]
        document["spec"]["serveConfigV2"] = document["spec"]["serveConfigV2"].replace(old, new)

    return slip


def test_every_document_has_a_schema_here() -> None:
    # What Kustomize itself reads has none; test_agreement.py has kubectl read it.
    found = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*.yaml")}
    assert found == {*FILES, "overlay.yaml", "kuberay/kustomization.yaml"}


@pytest.mark.parametrize("file", FILES)
def test_it_fits(file: str) -> None:
    for document in load(file):
        check(document)


GROUP = "spec.rayClusterConfig.workerGroupSpecs.0"
HEAD = "spec.rayClusterConfig.headGroupSpec"
POD = f"{GROUP}.template.spec"
CONTAINER = f"{POD}.containers.0"
DEPLOYMENT = "applications.0.deployments.2"
DISK = "available_node_types.head.node_config.BlockDeviceMappings.0.Ebs"
BROKEN: list[tuple[str, int, str, Slip]] = [
    ("kuberay/rayservice.yaml", 0, what, slip)
    for what, slip in {
        "misspelt rayVersion": misspelt("spec.rayClusterConfig.rayVersion"),
        "misspelt enableInTreeAutoscaling": misspelt("spec.rayClusterConfig.enableInTreeAutoscaling"),
        "misspelt redisAddress": misspelt("spec.rayClusterConfig.gcsFaultToleranceOptions.redisAddress"),
        "misspelt labels of a group": misspelt(f"{GROUP}.labels"),
        "misspelt topologyKey": misspelt(f"{POD}.topologySpreadConstraints.0.topologyKey"),
        "misspelt preStop": misspelt(f"{CONTAINER}.lifecycle.preStop"),
        "misspelt httpGet": misspelt(f"{CONTAINER}.readinessProbe.httpGet"),
        "misspelt serveConfigV2": misspelt("spec.serveConfigV2"),
        "no head": missing(HEAD),
        "no cluster": missing("spec.rayClusterConfig"),
        "no name of a group": missing(f"{GROUP}.groupName"),
        "no maxReplicas": missing(f"{GROUP}.maxReplicas"),
        "no template": missing(f"{GROUP}.template"),
        "no containers": missing(f"{POD}.containers"),
        "a word for minReplicas": wrong(f"{GROUP}.minReplicas", "two"),
        "a number for a start parameter": wrong(f"{GROUP}.rayStartParams.num-cpus", 6),
        "a number for a label": wrong(f"{GROUP}.labels.pool", 1),
        "a unit that is none": wrong(f"{CONTAINER}.resources.limits.memory", "8GB!"),
        "an autoscaler that is none": wrong("spec.rayClusterConfig.autoscalerOptions.version", "v3"),
        "another apiVersion": wrong("apiVersion", "ray.io/v2"),
        "a setting that is none": within("keys_file:", "key_file:"),
        "a deployment's option that is none": within("max_ongoing_requests:", "max_ongoing_request:"),
        "an actor's option that is none": within("num_gpus:", "num_gpu:"),
        "a selector that is none": within("pool: cpu", "pool: in(cpu"),
    }.items()
]
BROKEN += [
    ("kuberay/disruption.yaml", 0, "misspelt minAvailable", misspelt("spec.minAvailable")),
    ("kuberay/disruption.yaml", 0, "misspelt matchLabels", misspelt("spec.selector.matchLabels")),
    ("kuberay/disruption.yaml", 1, "a list for minAvailable", wrong("spec.minAvailable", [1])),
    ("kuberay/disruption.yaml", 1, "another apiVersion", wrong("apiVersion", "policy/v3")),
    ("kuberay/network.yaml", 0, "misspelt podSelector", misspelt("spec.podSelector")),
    ("kuberay/network.yaml", 0, "misspelt from", misspelt("spec.ingress.0.from")),
    ("kuberay/network.yaml", 0, "a list for a port", wrong("spec.ingress.1.ports.0.port", [8000])),
    ("kuberay/network.yaml", 1, "a word for ingress", wrong("spec.ingress", "all")),
    ("kuberay/podmonitor.yaml", 0, "misspelt podMetricsEndpoints", misspelt("spec.podMetricsEndpoints")),
    ("kuberay/podmonitor.yaml", 0, "misspelt port", misspelt("spec.podMetricsEndpoints.0.port")),
    ("kuberay/podmonitor.yaml", 0, "no selector", missing("spec.selector")),
    ("kuberay/podmonitor.yaml", 0, "a number for interval", wrong("spec.podMetricsEndpoints.0.interval", 15)),
    ("kuberay/redis.yaml", 0, "no port's number", missing("spec.ports.0.port")),
    ("kuberay/redis.yaml", 0, "misspelt clusterIP", misspelt("spec.clusterIP")),
    ("kuberay/redis.yaml", 1, "no selector", missing("spec.selector")),
    ("kuberay/redis.yaml", 1, "misspelt volumeMounts", misspelt("spec.template.spec.containers.0.volumeMounts")),
    ("kuberay/redis.yaml", 1, "a word for replicas", wrong("spec.replicas", "one")),
    ("serve_config.yaml", 0, "no import_path", missing("applications.0.import_path")),
    ("serve_config.yaml", 0, "misspelt http_options", misspelt("http_options")),
    ("serve_config.yaml", 0, "misspelt autoscaling_config", misspelt(f"{DEPLOYMENT}.autoscaling_config")),
    ("serve_config.yaml", 0, "misspelt max_replicas", misspelt(f"{DEPLOYMENT}.autoscaling_config.max_replicas")),
    ("serve_config.yaml", 0, "a word for num_gpus", wrong(f"{DEPLOYMENT}.ray_actor_options.num_gpus", "a")),
    ("serve_config.yaml", 0, "a batch of no tokens", wrong("applications.0.args.models.0.batch_tokens", 0)),
]
BROKEN += [
    ("aws.yaml", 0, "misspelt InstanceType", misspelt("available_node_types.gpu.node_config.InstanceType")),
    ("aws.yaml", 0, "a word for a disk's size", wrong(f"{DISK}.VolumeSize", "large")),
]
for cloud in ("aws.yaml", "gcp.yaml"):
    BROKEN += [
        (cloud, 0, "misspelt max_workers", misspelt("max_workers")),
        (cloud, 0, "misspelt labels", misspelt("available_node_types.cpu.labels")),
        (cloud, 0, "misspelt worker_image", misspelt("available_node_types.gpu.docker.worker_image")),
        (cloud, 0, "no cluster_name", missing("cluster_name")),
        (cloud, 0, "no resources", missing("available_node_types.gpu.resources")),
        (cloud, 0, "a word for GPUs", wrong("available_node_types.gpu.resources.GPU", "one")),
        (cloud, 0, "a head that is none", wrong("head_node_type", "boss")),
        (cloud, 0, "more at least than at most", wrong("available_node_types.cpu.min_workers", 100)),
    ]


@pytest.mark.parametrize(("file", "index", "what", "slip"), BROKEN, ids=[f"{row[0]}: {row[2]}" for row in BROKEN])
def test_it_is_refused(file: str, index: int, what: str, slip: Slip) -> None:
    document = load(file)[index]
    slip(document)
    with pytest.raises(Refused):
        check(document)
