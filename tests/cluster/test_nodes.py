"""Which node does what: as Ray's autoscaler decides it from each file, and as a real cluster of three nodes does it."""

import contextlib
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from serve_app import keys
from serve_app.__main__ import HAPROXY_PORTS, NODE_ENVIRONMENT
from serve_app.session import stop
from tests.cluster.documents import ROOT, Document, load
from tests.model import FOLDER
from tests.service.conftest import free_port

CONFIG = load("serve_config.yaml")[0]
DEPLOYMENTS: list[Document] = CONFIG["applications"][0]["deployments"]
START_TIMEOUT_S = 120.0


def autoscaler_config(file: str) -> AutoscalingConfig:
    [document] = load(file)
    if document.get("kind") == "RayService":
        document = {"metadata": {"name": "a", "namespace": "b"}, "spec": document["spec"]["rayClusterConfig"]}
        return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(document))
    document["file_mounts"] = {}  # the folder of keys is the user's
    return AutoscalingConfig(document)


def launched(file: str, replicas: dict[str, int], at_least: bool = True) -> dict[str, int]:
    """The nodes by type that the autoscaler adds to an empty cluster for so many replicas of each deployment."""
    config = autoscaler_config(file)
    requests = []
    for deployment in DEPLOYMENTS:
        options = deployment["ray_actor_options"]
        bundle = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
        selector = [
            (key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value])
            for key, value in options.get("label_selector", {}).items()
        ]
        request = ResourceRequestUtil.make(
            {name: amount for name, amount in bundle.items() if amount},
            label_selectors=[selector] if selector else None,
        )
        requests += [request] * replicas.get(deployment["name"], 0)
    types = config.get_node_type_configs()
    assert types is not None
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types if at_least else {n: replace(t, min_worker_nodes=0) for n, t in types.items()},
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


FILES = pytest.mark.parametrize("file", ["kuberay/rayservice.yaml", "aws.yaml", "gcp.yaml"])


@FILES
def test_replicas_that_wait_get_nodes_of_their_kind(file: str) -> None:
    for deployment in DEPLOYMENTS:
        kind = "gpu" if deployment["name"].startswith("Model-") else "cpu"
        assert launched(file, {deployment["name"]: 1}, at_least=False) == {kind: 1}


@FILES
def test_the_fewest_replicas_fit_the_fewest_nodes(file: str) -> None:
    least = {each["name"]: each["autoscaling_config"]["min_replicas"] for each in DEPLOYMENTS}
    assert launched(file, least) == launched(file, {}) == {"cpu": 2, "gpu": 2}


@FILES
def test_the_most_replicas_fit_the_most_nodes(file: str) -> None:
    most = {each["name"]: each["autoscaling_config"]["max_replicas"] for each in DEPLOYMENTS}
    config = autoscaler_config(file)
    types = config.get_node_type_configs()
    assert types is not None
    cores = sum(most[each["name"]] for each in DEPLOYMENTS if "label_selector" in each["ray_actor_options"])
    assert launched(file, most) == {
        "cpu": math.ceil(cores / types["cpu"].resources["CPU"]),
        "gpu": most["Model-Ivysaur"],
    }
    assert {name: types[name].max_worker_nodes for name in ("cpu", "gpu")} == launched(file, most)


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml"])
def test_a_node_with_a_gpu_runs_the_image_for_it(file: str) -> None:
    config = autoscaler_config(file)
    assert config.get_docker_config("gpu")["image"].endswith("-cuda")
    assert config.get_docker_config("cpu")["image"].endswith("-cpu")


class Nodes:
    """A cluster on this machine: a head that only steers, a node of the CPU pool, one that says it has two GPUs.

    Started as every cluster is, by `ray start`, and with a token, without which Ray's own ports answer nobody.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(32)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TMPDIR": str(folder),
            "PYTHONPATH": str(ROOT),
            **NODE_ENVIRONMENT,
        }
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        port = free_port()
        self._start("--head", f"--port={port}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}", "--num-cpus=0")
        [head] = wait(self.summary)
        # The node with GPUs has cores to spare, which those that may not run there must leave alone.
        for known, flags in enumerate(
            ("--num-cpus=4 --labels=pool=cpu", "--num-cpus=8 --num-gpus=2 --labels=pool=gpu"), 1
        ):
            self._start(f"--address={head['ip']}:{port}", *flags.split())
            wait(lambda known=known: len(self.summary()) > known)  # two at once would take the same sockets

    def summary(self) -> list[Document]:
        found: list[Document] = self.get("/nodes?view=summary")["data"]["summary"]
        return [node for node in found if "ip" in node]  # one that has just come is listed before its address is

    def _start(self, *flags: str) -> None:
        command = [tool("ray"), "start", *flags, "--dashboard-agent-listen-port=0", "--block"]
        quiet = subprocess.DEVNULL
        self._started.append(
            subprocess.Popen(command, stdout=quiet, stderr=quiet, env=self.environment, start_new_session=True)
        )

    def get(self, path: str) -> Any:
        """What the dashboard's API answers."""
        request = urllib.request.Request(self.dashboard + path, headers={"authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def stop(self) -> None:
        for process in reversed(self._started):
            stop(process)


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def wait(condition: Callable[[], Any]) -> Any:
    """Ask until the answer is true."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(urllib.error.URLError):
            if found := condition():
                return found
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short, as sockets' paths must be
        nodes = Nodes(Path(folder))
        try:
            nodes.start()
            yield nodes
        finally:
            nodes.stop()


@pytest.mark.service
def test_tokenizers_run_on_cpu_nodes_and_models_on_gpu_nodes(nodes: Nodes, tmp_path: Path) -> None:
    port = free_port()
    key = keys.add(tmp_path / "keys.txt", "me")
    [config] = load("serve_config.yaml")
    # Nodes that share a machine share its ports, so one of them takes requests for all.
    config |= {"http_options": {"host": "127.0.0.1", "port": port}, "proxy_location": "HeadOnly"}
    config["controller_options"]["runtime_env"]["env_vars"] |= {name: str(free_port()) for name in HAPROXY_PORTS}
    arguments = config["applications"][0]["args"]
    arguments["keys_file"] = str(tmp_path / "keys.txt")
    # A Model runs two full batches at its start, and at the sleeping engine's pace a GPU's batch is a minute.
    arguments["models"][0] |= {"sources": [str(FOLDER)], "engine": "sleep", "batch_tokens": 1024}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    deploy = [tool("serve"), "deploy", "--address", nodes.dashboard, str(tmp_path / "config.yaml")]
    done = subprocess.run(deploy, capture_output=True, text=True, timeout=60, env=nodes.environment)
    assert done.returncode == 0, done.stderr

    def running() -> Document | None:
        application = nodes.get("/api/serve/applications/")["applications"].get("embeddings", {})
        return application if application.get("status") == "RUNNING" else None

    application = wait(running)
    pools = {
        node["raylet"]["nodeId"]: node["raylet"]["labels"]["pool"]
        for node in nodes.summary()
        if "pool" in node["raylet"].get("labels", {})
    }
    assert {
        name: [pools[replica["node_id"]] for replica in deployment["replicas"]]
        for name, deployment in application["deployments"].items()
    } == {"Ingress": ["cpu", "cpu"], "Tokenizer-Ivysaur": ["cpu", "cpu"], "Model-Ivysaur": ["gpu", "gpu"]}

    body = json.dumps({"model": "Mihaiii/Ivysaur", "input": "red shoes"}).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body, headers)
    answer = wait(lambda: json.load(urllib.request.urlopen(request, timeout=30)))  # 503 until all have met
    assert len(answer["data"][0]["embedding"]) == 384
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{nodes.dashboard}/api/serve/applications/", timeout=30)
