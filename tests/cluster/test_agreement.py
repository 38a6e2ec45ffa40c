"""What is said in two files is the same in both: configuration, versions, labels, secrets, ports."""

import doctest
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from cluster import render
from serve_app.__main__ import HAPROXY_PORTS, NODE_ENVIRONMENT
from serve_app.deployments import DRAIN_MARGIN_S
from serve_app.settings import Settings
from tests.cluster.documents import CLUSTER, ROOT, Document, find, load

RAY_SERVICE = load("kuberay/rayservice.yaml")[0]
CONFIG = load("serve_config.yaml")[0]
RAY_CLUSTER: Document = RAY_SERVICE["spec"]["rayClusterConfig"]
GROUPS: dict[str, Document] = {group["groupName"]: group for group in RAY_CLUSTER["workerGroupSpecs"]}
PODS: list[Document] = [each["template"] for each in (RAY_CLUSTER["headGroupSpec"], *GROUPS.values())]
APPLICATION: Document = CONFIG["applications"][0]
DEPLOYMENTS: dict[str, Document] = {each["name"]: each for each in APPLICATION["deployments"]}
README = (CLUSTER / "README.md").read_text()
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_the_committed_files_are_what_the_generator_makes() -> None:
    for path, text in render.render().items():
        assert path.read_text() == text, f"{path} is old: run `python -m cluster.render`"


def test_the_ray_service_has_the_same_configuration() -> None:
    assert yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]) == CONFIG


def test_all_that_serve_config_has_is_there_but_for_what_the_overlay_says() -> None:
    base = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    change = yaml.safe_load((CLUSTER / "overlay.yaml").read_text())

    def expect(base: Any, change: Any, made: Any, path: str) -> None:
        if isinstance(base, dict) and isinstance(change, dict | None):
            for key in base.keys() | (change or {}).keys():
                if not path and key.startswith("x-"):
                    assert key not in made
                    continue
                expect(base.get(key), (change or {}).get(key), made[key], f"{path}.{key}")
        elif isinstance(base, list) and change and isinstance(change[0], dict):
            named = {each.get("name", each.get("id")): each for each in change}
            for old, new in zip(base, made, strict=True):
                expect(old, named.get(old.get("name", old.get("id"))), new, f"{path}.{old}")
        else:
            assert made == (base if change is None else change), path

    expect(base, change, CONFIG, "")


def test_the_example_holds() -> None:
    ran = doctest.testmod(render)
    assert ran.attempted > 0 and ran.failed == 0


def test_an_overlay_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing of serve_config\.yaml is called Tokeniser"):
        render.overlay({"deployments": [{"name": "Ingress"}]}, {"deployments": [{"name": "Tokeniser", "a": 1}]})


def test_the_deployments_are_those_that_the_builder_makes() -> None:
    models = Settings.model_validate(APPLICATION["args"]).models
    made = {"Ingress"} | {f"{kind}-{model.slug}" for model in models for kind in ("Tokenizer", "Model")}
    assert set(DEPLOYMENTS) == made


def test_a_cluster_takes_its_weights_from_the_image_alone() -> None:
    for model in APPLICATION["args"]["models"]:
        assert model["sources"] == [f"/models/{model['id'].rpartition('/')[2]}"]
    assert f"ARG MODEL={APPLICATION['args']['models'][0]['id']}\n" in DOCKERFILE
    assert re.search(r"^ARG REVISION=[0-9a-f]{40}$", DOCKERFILE, re.MULTILINE)


def test_ray_is_the_same_everywhere() -> None:
    [pinned] = [
        line.partition("==")[2]
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("ray[")
    ]
    assert RAY_CLUSTER["rayVersion"] == pinned == version("ray")


def test_the_image_sets_what_a_node_wants() -> None:
    variables = re.search(r"^ENV (.*)$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    assert variables is not None
    assert dict(pair.split("=") for pair in variables[1].split()) == NODE_ENVIRONMENT
    [user] = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    for pod in PODS:
        assert pod["spec"]["securityContext"]["runAsUser"] == int(user)


def test_every_deployment_finds_nodes_that_offer_what_it_asks_for() -> None:
    offers = [group["labels"] for group in GROUPS.values()]
    clouds = [load(file)[0]["available_node_types"] for file in ("aws.yaml", "gcp.yaml")]
    for name, deployment in DEPLOYMENTS.items():
        selector = deployment["ray_actor_options"].get("label_selector", {})
        assert any(selector.items() <= labels.items() for labels in offers), name
        for types in clouds:
            assert any(selector.items() <= each.get("labels", {}).items() for each in types.values()), name


def test_groups_label_their_pods_as_they_label_their_nodes() -> None:
    for group in GROUPS.values():
        labels = group["template"]["metadata"]["labels"]
        assert group["labels"].items() <= labels.items()
        for constraint in group["template"]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == labels
        assert {each["topologyKey"] for each in group["template"]["spec"]["topologySpreadConstraints"]} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_disruption_budget_is_of_real_pods_and_lets_one_go(name: str) -> None:
    budget = find("kuberay/disruption.yaml", "PodDisruptionBudget", f"embeddings-{name}")["spec"]
    selected = [pod for pod in PODS if budget["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()]
    assert selected == [GROUPS[name]["template"]]
    assert 0 < budget["minAvailable"] < GROUPS[name]["minReplicas"]
    assert "maxUnavailable" not in budget  # which Kubernetes refuses for pods of another's controller


def test_secrets_are_those_that_the_page_makes_and_none_is_in_a_file() -> None:
    made = {
        (name, key)
        for name, key in re.findall(r"create secret generic (\S+) (?:\\\n\s+)?--from-(?:file|literal)=([\w.]+)", README)
    }
    redis = find("kuberay/redis.yaml", "StatefulSet", "embeddings-redis")["spec"]["template"]["spec"]["containers"][0]
    references = [
        RAY_CLUSTER["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"],
        redis["env"][0]["valueFrom"]["secretKeyRef"],
    ]
    asked = {(each["name"], each["key"]) for each in references}
    [mount] = GROUPS["cpu"]["template"]["spec"]["containers"][0]["volumeMounts"]
    [volume] = GROUPS["cpu"]["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"] and "subPath" not in mount  # such a mount never changes
    folder, _, file = APPLICATION["args"]["keys_file"].rpartition("/")
    assert mount["mountPath"] == folder
    assert made == asked | {(volume["secret"]["secretName"], file)}
    for path in (CLUSTER / "kuberay").glob("*.yaml"):
        assert not [each for each in load(f"kuberay/{path.name}") if each.get("kind") == "Secret"]
    for cloud in ("aws.yaml", "gcp.yaml"):
        assert folder in load(cloud)[0]["file_mounts"]


def test_redis_is_where_the_head_looks_for_it() -> None:
    service = find("kuberay/redis.yaml", "Service", "embeddings-redis")
    stateful = find("kuberay/redis.yaml", "StatefulSet", "embeddings-redis")["spec"]
    host, _, port = RAY_CLUSTER["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert (host, int(port)) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert service["spec"]["selector"] == stateful["template"]["metadata"]["labels"]
    assert stateful["serviceName"] == host
    assert stateful["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] == int(port)


def allowed(policy: Document, client: dict[str, str] | None, port: int) -> bool:
    """Whether a policy lets a pod with these labels, or somebody outside for None, connect to a port."""
    for rule in policy["spec"]["ingress"]:
        peers = rule.get("from")
        known = peers is None or any(
            client is not None and peer["podSelector"]["matchLabels"].items() <= client.items() for peer in peers
        )
        if known and ("ports" not in rule or port in {each["port"] for each in rule["ports"]}):
            return True
    return False


def test_the_network_is_open_where_it_must_be_and_nowhere_else() -> None:
    policy = find("kuberay/network.yaml", "NetworkPolicy", "embeddings")
    for pod in PODS:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ours: dict[str, str] = PODS[0]["metadata"]["labels"]
    operator = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    http: int = CONFIG["http_options"]["port"]
    ports = {
        port["name"]: port["containerPort"] for port in GROUPS["cpu"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert http == ports["serve"]
    # GCS, client, dashboard, the agents', replicas that answer HAProxy, replicas that answer each other.
    rays = {6379, 10001, 8265, 52365, 30000, 45678}
    for port in (http, ports["metrics"], *HAPROXY_PORTS.values(), *rays):
        assert allowed(policy, ours, port)
        assert allowed(policy, None, port) == (port == http)
        assert allowed(policy, {"app": "other"}, port) == (port == http)
        assert allowed(policy, operator, port) == (port in {http, 8265})
        assert allowed(policy, prometheus, port) == (port in {http, ports["metrics"]})
    redis = find("kuberay/network.yaml", "NetworkPolicy", "embeddings-redis")
    stateful = find("kuberay/redis.yaml", "StatefulSet", "embeddings-redis")["spec"]["template"]
    assert redis["spec"]["podSelector"]["matchLabels"] == stateful["metadata"]["labels"]
    assert allowed(redis, ours, 6379) and not allowed(redis, None, 6379) and not allowed(redis, prometheus, 6379)


def test_prometheus_finds_every_pods_metrics() -> None:
    [monitor] = load("kuberay/podmonitor.yaml")
    assert "ray.io/cluster" in monitor["spec"]["podTargetLabels"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for pod in PODS:
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        ports = pod["spec"]["containers"][0].get("ports", [])
        # KubeRay names the port where a container names none.
        assert not ports or endpoint["port"] in {port["name"] for port in ports}


def test_kubectl_builds_the_folder_with_every_image_from_the_registry() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", CLUSTER / "kuberay"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"]["namespace"] for each in built} == {"embeddings"}
    ours = [
        document for file in load("kuberay/kustomization.yaml")[0]["resources"] for document in load(f"kuberay/{file}")
    ]
    assert sorted(each["kind"] for each in built) == sorted(each["kind"] for each in ours)
    images = re.findall(r"image: (\S+)", done.stdout)
    tags = {f"registry.example.com/embeddings:{version('ivysaur-serve')}-{kind}" for kind in ("cpu", "cuda")}
    assert set(images) == {"redis:7.4"} | tags
    for cloud in ("aws.yaml", "gcp.yaml"):
        assert set(re.findall(r"image: (\S+)", (CLUSTER / cloud).read_text())) == tags


def test_the_page_names_every_file() -> None:
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix in {".yaml", ""}:
            assert f"`{path.relative_to(CLUSTER)}`" in README, path


def test_a_drained_pod_stays_until_an_ingress_may_have_ended_and_another_has_started() -> None:
    # Serve stops a replica, whether another took its place or not, as long before the deadline as it may take to end.
    settings = Settings.model_validate(APPLICATION["args"])
    to_end_s = settings.request_timeout_s + DRAIN_MARGIN_S
    for group in ("cpu", "gpu"):
        spec = GROUPS[group]["template"]["spec"]
        script = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        deadline_s, sleep_s = map(int, re.findall(r"--deadline-remaining-seconds (\d+) && sleep (\d+)", script)[0])
        assert to_end_s + 60 <= deadline_s == sleep_s < spec["terminationGracePeriodSeconds"]
