"""The service on several Ray nodes of this machine, with what it takes to break it and to see whether it is whole.

Only processes of this cluster are ever signalled: children of the raylets that were started here, and HAProxy by the
folder in its environment.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.cluster_utils import Cluster

from cluster import local
from loadtest.meter import ray_role
from serve_app.__main__ import HAPROXY_PORTS, NODE_ENVIRONMENT

NODES = 3  # beside the head
# Of each deployment, always. What one node carries the two others can carry, too.
REPLICAS = {"Ingress": 2, "Tokenizer": 2, "Model": 4}
CPUS_A_NODE = 3
# Shorter than the service's own default, so that a request which waits past it is seen.
REQUEST_TIMEOUT_S = 20.0
START_TIMEOUT_S = 120.0
POLL_PERIOD_S = 0.5
# Of these there may be more or fewer at any time.
UNCOUNTED = ("other", "dashboard and agents")
ASK_TIMEOUT_S = 3.0


def config(port: int) -> dict[str, Any]:
    """serve_config.yaml for this cluster, on free ports: sleeping models, and a fixed number of each replica."""
    written = local.config(NODES, models_a_node=2)
    written["http_options"] = {"host": "127.0.0.1", "port": port}
    environment = {name: str(free_port()) for name in HAPROXY_PORTS}
    written["controller_options"]["runtime_env"]["env_vars"] |= environment
    [application] = written["applications"]
    application["runtime_env"]["env_vars"] |= environment
    application["args"]["request_timeout_s"] = REQUEST_TIMEOUT_S
    for deployment in application["deployments"]:
        kind = deployment["name"].partition("-")[0]
        deployment.pop("max_replicas_per_node", None)
        deployment["autoscaling_config"] |= {"min_replicas": REPLICAS[kind], "max_replicas": REPLICAS[kind]}
        if kind == "Tokenizer":  # anywhere but on the head, which has no CPU
            deployment["ray_actor_options"] = {"num_cpus": 0.1}
    return written


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Service:
    """The running service."""

    def __init__(self, cluster: Cluster, folder: Path, url: str, dashboard: str, has_redis: bool) -> None:
        self.cluster = cluster
        self.url = url
        self.has_redis = has_redis
        self._folder = folder
        self._dashboard = dashboard
        self._http = httpx.Client(timeout=ASK_TIMEOUT_S)
        self._whole: Counter[str] = Counter()  # processes by role while nothing is broken

    def close(self) -> None:
        self._http.close()

    def processes(self) -> dict[psutil.Process, str]:
        """Every worker and HAProxy of this cluster, with its role, those first that have run for longest."""
        return family(self.cluster, self._folder)

    def oldest(self, role: str) -> psutil.Process:
        """Who of a role has run for longest: killed again and again, each has its turn."""
        return next(process for process, its in self.processes().items() if its == role)

    def state(self) -> dict[str, Any]:
        """The application in Serve's own account; empty while nobody tells."""
        try:
            answer = self._http.get(f"{self._dashboard}/api/serve/applications/")
            found: dict[str, Any] = answer.json()["applications"]["embeddings"]
            return found
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return {}

    def is_whole(self, gone: Iterable[int] = ()) -> bool:
        """Whether every replica and every other process is there again, without those process ids."""
        state = self.state()
        if state.get("status") != "RUNNING":
            return False
        for name, deployment in state["deployments"].items():
            running = [each["pid"] for each in deployment["replicas"] if each["state"] == "RUNNING"]
            if len(running) < REPLICAS[name.partition("-")[0]] or not set(running).isdisjoint(gone):
                return False
        here = Counter(role for process, role in self.processes().items() if process.pid not in gone)
        self._whole = self._whole or here
        return all(here[role] >= count for role, count in self._whole.items() if role not in UNCOUNTED)

    def wait(self) -> None:
        """Until all replicas are there and embed; raises TimeoutError."""
        until = time.monotonic() + START_TIMEOUT_S
        while not self.is_whole() or not self._embeds():
            if time.monotonic() > until:
                raise TimeoutError(f"the service did not start: {self.state()}")
            self._whole.clear()
            time.sleep(POLL_PERIOD_S)

    def _embeds(self) -> bool:
        try:
            return (self._http.get(f"{self.url}/readyz")).status_code == 200
        except httpx.HTTPError:
            return False

    def add_node(self) -> None:
        """A further node, as large as the others."""
        self.cluster.add_node(num_cpus=CPUS_A_NODE)

    def deploy(self, written: dict[str, Any]) -> None:
        """Hand the configuration to Serve."""
        answer = self._http.put(f"{self._dashboard}/api/serve/applications/", json=written, timeout=60)
        answer.raise_for_status()


def family(cluster: Cluster, folder: Path) -> dict[psutil.Process, str]:
    """Every worker of a cluster's nodes, and HAProxy by its folder, with its role; the longest running first."""
    found = {process for node in cluster.list_all_nodes() for process in workers_of(node)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it ended, or is somebody else's
            # It outlives the actor that started it, and so is below no raylet then.
            if process.name() == "haproxy" and process.environ().get("RAY_TMPDIR") == str(folder):
                found.add(process)
    roles: dict[psutil.Process, str] = {}
    for process in sorted(found, key=lambda process: process.create_time()):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                roles[process] = ray_role(" ".join(process.cmdline()))
    return roles


def workers_of(node: Any) -> list[psutil.Process]:
    """The processes of a Ray node below its raylet."""
    [raylet] = node.all_processes["raylet"]
    try:
        return psutil.Process(raylet.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def running(logs: Path | None = None) -> Iterator[Service]:
    """The service on a cluster of its own, with Redis behind its head if that is installed; nothing of it is left, but
    Ray's logs where a folder is given for them."""
    # A short path, as sockets' must be; and nobody else's Ray finds this cluster by Ray's own note of it.
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    os.environ.pop("RAY_ADDRESS", None)
    # This process's own interpreter path reaches the workers, so that they run the same tree.
    os.environ |= NODE_ENVIRONMENT | {"RAY_TMPDIR": str(folder), "PYTHONPATH": str(local.ROOT), "HF_HUB_OFFLINE": "1"}
    (folder / "ray").mkdir()
    redis = _start_redis(folder)
    cluster = None
    try:
        port, dashboard_port = free_port(), free_port()
        head = {"num_cpus": 0, "resources": {"head": 1}, "include_dashboard": True, "dashboard_port": dashboard_port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        service = Service(
            cluster, folder, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", redis is not None
        )
        for _ in range(NODES):
            service.add_node()
        service.deploy(config(port))
        service.wait()
        yield service
        service.close()
    finally:
        if cluster is not None:
            left = family(cluster, folder)
            cluster.shutdown()
            for process in left:
                with suppress(psutil.Error):  # it ended; psutil knows it by its start, so a reused id is spared
                    process.kill()
        if redis is not None:
            redis.kill()
            redis.wait()
        if logs is not None:
            shutil.copytree(folder / "ray" / "session_latest" / "logs", logs, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _start_redis(folder: Path) -> "subprocess.Popen[bytes] | None":
    """A Redis behind the head, which so finds what it knew after it was killed; None where it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        return None
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, start_new_session=True)
    os.environ["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{port}"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return process
        time.sleep(0.05)
    process.kill()
    sys.exit("redis-server did not start")
