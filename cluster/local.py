"""`make cluster`: the service on several Ray nodes of this machine, with processes and resources of their own.

The head carries the ingress and the tokenizer, the other nodes the models, spread over them. The engine only sleeps
(serve_app/engines/sleep.py), so that a small machine carries many of them; all else is as serve_config.yaml has it.
"""

import argparse
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray.cluster_utils import Cluster

from serve_app.__main__ import NODE_ENVIRONMENT, POLL_PERIOD_S

ROOT = Path(__file__).parents[1]
# What only the head has. Ingress replicas of two nodes would take the same ports of this one machine.
ON_HEAD = {"resources": {"head": 0.001}, "num_cpus": 0}


def config(
    nodes: int, models_a_node: int, beside_default: bool = False, base: Path = ROOT / "serve_config.yaml"
) -> dict[str, Any]:
    """serve_config.yaml for so many nodes beside the head, each with room for so many models.

    `beside_default`: with a second application, under `/default`, whose models Serve's default policy scales in the
    same bounds, with all else of it as Serve has it.
    """
    written: dict[str, Any] = yaml.safe_load(base.read_text())
    written["proxy_location"] = "HeadOnly"  # HAProxy's ports are one of each to a machine
    [application] = written["applications"]
    for model in application["args"]["models"]:
        model |= {"engine": "sleep", "batch_tokens": 256, "sources": ["embedded"]}
    for deployment in application["deployments"]:
        if deployment["name"].startswith("Model-"):
            deployment["ray_actor_options"] = {"num_cpus": 1}
            deployment["max_replicas_per_node"] = models_a_node
            deployment["autoscaling_config"]["max_replicas"] = nodes * models_a_node
        else:
            deployment["ray_actor_options"] = ON_HEAD
    if beside_default:
        other = copy.deepcopy(application) | {"name": "default", "route_prefix": "/default"}
        other["autoscaling_policy"] = {"policy_function": "cluster.serves_default:serves_default"}
        for deployment in other["deployments"]:
            if deployment["name"].startswith("Model-"):
                scaling = deployment["autoscaling_config"]
                deployment["autoscaling_config"] = {name: scaling[name] for name in ("min_replicas", "max_replicas")}
        written["applications"].append(other)
    return written


@contextmanager
def running(nodes: int, cpus: int) -> Iterator[str]:
    """A head without CPUs and so many nodes with CPUs; its address. Nothing of it is left afterwards."""
    os.environ |= NODE_ENVIRONMENT
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {"head": 1}})
    try:
        for number in range(nodes):
            cluster.add_node(num_cpus=cpus, resources={f"node-{number}": 1})
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def serve(file: Path, address: str, stopping: list[int]) -> int:
    """`make serve` on that cluster, until it ends or a signal comes; returns its exit status."""
    # A session of its own: a Ctrl-C then reaches this process alone, which passes it on once.
    command = [sys.executable, "-m", "serve_app", str(file)]
    service = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, start_new_session=True)
    while not stopping and service.poll() is None:
        time.sleep(POLL_PERIOD_S)
    if service.poll() is None:
        service.send_signal(signal.SIGINT)
    return service.wait()


def main() -> int:
    """Start, serve until stopped, and leave nothing running; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=__doc__)
    parser.add_argument("--nodes", type=int, default=3, help="beside the head")
    parser.add_argument("--models-a-node", type=int, default=4)
    parser.add_argument("--beside-default", action="store_true", help="the same again, scaled by Serve's own policy")
    options = parser.parse_args()
    room = options.nodes * options.models_a_node
    stopping: list[int] = []
    cpus = options.models_a_node * (1 + options.beside_default)
    with running(options.nodes, cpus) as address, tempfile.TemporaryDirectory() as folder:
        # Only now: on SIGTERM the nodes of this process would go first, and requests with them.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, _: stopping.append(received))
        file = Path(folder, "serve_config.yaml")
        file.write_text(yaml.safe_dump(config(options.nodes, options.models_a_node, options.beside_default)))
        print(f"cluster: a head and {options.nodes} nodes at {address}, with room for {room} models", flush=True)
        return serve(file, address, stopping)


if __name__ == "__main__":
    sys.exit(main())
