"""`python -m loadtest.hops`: where the milliseconds and the core-milliseconds of one short request go."""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import psutil

from loadtest import wrk
from loadtest.meter import Meter, ray_role, tree
from loadtest.systems import systems
from loadtest.weights import TOKENIZER
from loadtest.workload import CELLS, body, requests, write
from serve_app import wire

SECONDS = 6.0
REQUESTS = 400
TURNS = 5  # of two seconds each, with and without HAProxy: what drifts on the machine meets both
HOST = "127.0.0.1"


def ingress_port(root: int) -> int:
    """The port on which the ingress replica itself listens, behind HAProxy."""
    for process in tree(root):
        if ray_role(" ".join(process.cmdline())) == "ingress":
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and each.laddr.ip == HOST and 30_000 <= each.laddr.port <= 31_000:
                    return int(each.laddr.port)
    raise SystemExit("hops: the ingress listens nowhere; does the service run with HAProxy?")


def server_timings(port: int) -> dict[str, float]:
    """Medians of what the ingress says of its stages, in milliseconds, one request at a time."""
    seen: dict[str, list[float]] = defaultdict(list)
    connection = HTTPConnection(HOST, port)
    for request in requests(CELLS[0])[:REQUESTS]:
        connection.request("POST", "/v1/embeddings", body(request, "base64"), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        for part in answer.headers["server-timing"].split(", "):
            name, _, duration = part.partition(";dur=")
            seen[name].append(float(duration))
    return {name: statistics.median(values) for name, values in seen.items()}


def each_ms(run: Callable[[], object], times: int = 2_000) -> float:
    """Milliseconds of a call with warm caches."""
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times * 1e3


def main() -> None:
    """Run and print Markdown tables."""
    argparse.ArgumentParser(prog="python -m loadtest.hops").parse_args()
    wrk.require()
    by_load: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="hops-") as scratch:
        folder = Path(scratch)
        system = systems(folder)["ours"]
        with system.running(folder) as root:
            bodies = write(CELLS[0], folder)
            direct = f"http://{HOST}:{ingress_port(root)}/v1"
            wrk.run(system.url, bodies, 8, 3)  # warm up
            turns = [[wrk.run(url, bodies, 1, 2).p50_ms for url in (system.url, direct)] for _ in range(TURNS)]
            through, behind = (statistics.median(column) for column in zip(*turns, strict=True))
            timing = server_timings(ingress_port(root))
            for connections in (1, 8, 64):
                with Meter(root, system.role) as meter:
                    load = wrk.run(system.url, bodies, connections, SECONDS)
                by_load[connections] = {role: used / load.answers * 1e3 for role, used in meter.cpu_s.items()}
    texts = requests(CELLS[0])[0]
    sent = body(texts, "base64").encode()
    vectors = np.random.default_rng(0).normal(size=(1, 384)).astype(np.float32)
    stages = sum(timing.values())
    rows = {
        "HAProxy (beside a connection to the ingress itself)": through - behind,
        "HTTP server, Serve, FastAPI, and the two below": behind - stages,
        "- of it reading the request, warm": each_ms(lambda: wire.parse(sent, 2048, 300_000)),
        "- of it rendering the answer, warm": each_ms(
            lambda: wire.render(vectors, json.loads(sent)["model"], 11, "base64")
        ),
        "tokenizing in the ingress": timing["tokenize"],
        "- of it, warm": each_ms(lambda: TOKENIZER.tokenize(texts)),
        "to the model and back, and its queue": timing["queue"],
        "the engine": timing["infer"],
        "all": through,
    }
    print("`python -m loadtest.hops`\n\n| one query of 9 words, one connection | ms |\n|---|---|")
    for name, spent in rows.items():
        print(f"| {name} | {spent:.2f} |")
    print(f"\n| CPU ms a request | {' | '.join(f'{n} connections' for n in by_load)} |\n|---{'|---' * len(by_load)}|")
    for role in sorted({role for spent in by_load.values() for role in spent}, key=lambda r: -by_load[1].get(r, 0)):
        print(f"| {role} | {' | '.join(f'{spent.get(role, 0):.2f}' for spent in by_load.values())} |")


if __name__ == "__main__":
    main()
