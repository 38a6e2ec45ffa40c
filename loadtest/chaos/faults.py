"""The faults: what is done to the service, and beside it what is promised meanwhile.

Each function breaks one thing, once, and returns the ids of the processes that have to be replaced.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil

from loadtest.chaos.service import POLL_PERIOD_S, REPLICAS, REQUEST_TIMEOUT_S, Service, workers_of
from loadtest.chaos.tally import Promise

Act = Callable[[Service], set[int]]

# How long the head is away, and how long a stopped process may stay: until it was replaced, or so long.
HEAD_DOWN_S = 5.0
STOPPED_S = 75.0
STOPPED_TOKENIZER_S = 15.0
# What comes in while HAProxy is away, at about 100 requests/s: a tenth of a second, or half where it was just changed.
WITHOUT_HAPROXY = 50
# The longest answer while the ingress tokenizes by itself: not the time that another tokenizer takes to start.
WITHOUT_TOKENIZERS_S = 5.0
# Past its deadline a request is over: what the clock and a busy machine add.
LATE_S = 1.0


@dataclass(frozen=True)
class Fault:
    """One fault: `a_round` is how often it is done to have met everybody that it can meet."""

    name: str
    words: str
    promise: Promise
    act: Act
    a_round: int = 1
    needs_redis: bool = False


FAULTS: dict[str, Fault] = {}
SHORT = ("model", "tokenizer", "tokenizers", "ingress", "controller", "node")


def fault(name: str, words: str, promise: Promise, a_round: int = 1, needs_redis: bool = False) -> Callable[[Act], Act]:
    """Put a function among the faults."""

    def add(act: Act) -> Act:
        FAULTS[name] = Fault(name, words, promise, act, a_round, needs_redis)
        return act

    return add


def kill(processes: Iterable[psutil.Process]) -> set[int]:
    """kill -9; their ids."""
    gone = set()
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
        gone.add(process.pid)
    return gone


@fault(
    "model",
    "`kill -9` of a model replica, each in turn",
    Promise("0 failed: what it had is sent to another", within_s=30, longest_s=REQUEST_TIMEOUT_S),
    a_round=REPLICAS["Model"],
)
def kill_model(service: Service) -> set[int]:
    return kill([service.oldest("model")])


@fault(
    "tokenizer",
    "`kill -9` of a tokenizer replica, each in turn",
    Promise("0 failed: what it had is sent to another", within_s=45, longest_s=REQUEST_TIMEOUT_S),
    a_round=REPLICAS["Tokenizer"],
)
def kill_tokenizer(service: Service) -> set[int]:
    return kill([service.oldest("tokenizer")])


@fault(
    "tokenizers",
    "`kill -9` of all tokenizer replicas at once",
    Promise("0 failed: the ingress tokenizes until there are others", within_s=45, longest_s=WITHOUT_TOKENIZERS_S),
)
def kill_tokenizers(service: Service) -> set[int]:
    return kill(process for process, role in service.processes().items() if role == "tokenizer")


@fault(
    "ingress",
    "`kill -9` of an ingress replica, each in turn",
    Promise("0 failed: HAProxy sends what it had to another", within_s=45, longest_s=REQUEST_TIMEOUT_S),
    a_round=REPLICAS["Ingress"],
)
def kill_ingress(service: Service) -> set[int]:
    return kill([service.oldest("ingress")])


@fault(
    "haproxy",
    "`kill -9` of HAProxy",
    Promise(
        "what it had, and what comes until it is back, a tenth of a second later, fails with a closed or refused "
        f"connection, which OpenAI's client hides; at most {WITHOUT_HAPROXY} each time",
        within_s=15,
        failed_each=WITHOUT_HAPROXY,
        longest_s=REQUEST_TIMEOUT_S,
    ),
)
def kill_haproxy(service: Service) -> set[int]:
    return kill([service.oldest("haproxy")])


@fault(
    "controller",
    "`kill -9` of Serve's controller",
    Promise("0 failed: it is on no request's way", within_s=60, longest_s=REQUEST_TIMEOUT_S),
)
def kill_controller(service: Service) -> set[int]:
    return kill([service.oldest("controller")])


@fault(
    "proxy-manager",
    "`kill -9` of the actor that keeps HAProxy",
    Promise("0 failed: HAProxy lives on, and the next actor's takes over", within_s=15, longest_s=REQUEST_TIMEOUT_S),
)
def kill_proxy_manager(service: Service) -> set[int]:
    return kill([service.oldest("proxy manager")])


@fault(
    "node",
    "`kill -9` of a node's raylet and all its workers at once; then a new node joins",
    Promise("0 failed: other nodes have replicas of each kind", within_s=90, longest_s=REQUEST_TIMEOUT_S),
)
def kill_node(service: Service) -> set[int]:
    # One that has models, or there would be nothing to lose.
    model = service.oldest("model")
    node = next(node for node in service.cluster.worker_nodes if model in workers_of(node))
    workers = workers_of(node)
    [raylet] = node.all_processes["raylet"]
    gone = kill([psutil.Process(raylet.process.pid), *workers])
    service.cluster.remove_node(node, allow_graceful=False)
    service.add_node()
    return gone


@fault(
    "head",
    f"`kill -9` of the head's GCS, back after {HEAD_DOWN_S:.0f} s, with Redis behind it",
    Promise("0 failed: it is on no request's way", within_s=60, longest_s=REQUEST_TIMEOUT_S),
    needs_redis=True,
)
def kill_head(service: Service) -> set[int]:
    return without_head(service, set)


@fault(
    "head-model",
    "`kill -9` of the head's GCS, and of a model replica while it is away",
    Promise("0 failed, and the replica is replaced once the head is back", within_s=90, longest_s=REQUEST_TIMEOUT_S),
    needs_redis=True,
)
def kill_head_and_model(service: Service) -> set[int]:
    return without_head(service, lambda: kill_model(service))


def without_head(service: Service, act: Callable[[], set[int]]) -> set[int]:
    """Do something while the head's GCS is away."""
    head: Any = service.cluster.head_node
    head.kill_gcs_server()  # with SIGKILL
    gone = act()
    time.sleep(HEAD_DOWN_S)
    head.start_gcs_server()
    return gone


@fault(
    "model-stopped",
    f"`SIGSTOP` of a model replica until it is replaced, for {STOPPED_S:.0f} s at most",
    Promise(
        "0 failed, no request waits past its deadline, and the replica is replaced",
        within_s=STOPPED_S,
        longest_s=REQUEST_TIMEOUT_S + LATE_S,
    ),
)
def stop_model(service: Service) -> set[int]:
    return stopped(service, service.oldest("model"), STOPPED_S)


@fault(
    "tokenizer-stopped",
    f"`SIGSTOP` of a tokenizer replica for {STOPPED_TOKENIZER_S:.0f} s",
    Promise(
        "0 failed, and no request waits past its deadline",
        within_s=STOPPED_TOKENIZER_S + 30,
        longest_s=REQUEST_TIMEOUT_S + LATE_S,
    ),
)
def stop_tokenizer(service: Service) -> set[int]:
    return stopped(service, service.oldest("tokenizer"), STOPPED_TOKENIZER_S)


def stopped(service: Service, process: psutil.Process, most_s: float) -> set[int]:
    """Stop a process until the service does without it; it goes on after `most_s` if it is still wanted then."""
    until = time.monotonic() + most_s
    os.kill(process.pid, signal.SIGSTOP)
    while time.monotonic() < until:
        time.sleep(POLL_PERIOD_S)
        if not process.is_running() or service.is_whole({process.pid}):
            kill([process])
            return {process.pid}
    process.resume()
    return set()
