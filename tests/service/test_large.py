"""The largest requests: right answers, an ingress that stays responsive meanwhile, and memory that comes back."""

import statistics
import threading
import time
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from serve_app.settings import Settings
from tests.model import MODEL
from tests.service.conftest import Keeper, Service

pytestmark = pytest.mark.service

WORDS = ["alpha", "river", "stone", "cloud", "seven", "paper", "green", "north", "table", "music"]
# Growth that is allocators' slack and not a leak: the largest request's own data is some 50 MB in each process.
SLACK_BYTES = 64 << 20


def patient(config: dict[str, Any]) -> None:
    """On a slow machine the largest request takes longer than a request may."""
    config["applications"][0]["args"]["request_timeout_s"] = 900


@pytest.fixture
def large(keeper: Keeper) -> Service:
    return keeper.get(patient)


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + place * (number + 1)) % len(WORDS)] for place in range(words))


def embed(http: httpx.Client, texts: list[str]) -> tuple[np.ndarray, dict[str, Any], httpx.Headers]:
    answer = http.post("/v1/embeddings", json={"model": MODEL, "input": texts}, timeout=900)
    assert answer.status_code == 200, answer.text[:300]
    body = answer.json()
    assert [item["index"] for item in body["data"]] == list(range(len(texts)))
    return np.array([item["embedding"] for item in body["data"]], np.float32), body["usage"], answer.headers


def resident_bytes(service: Service) -> dict[str, int]:
    """Memory of each replica by its process's title."""
    processes = psutil.Process(service.process.pid).children(recursive=True)
    return {
        process.cmdline()[0]: process.memory_info().rss
        for process in processes
        if "ServeReplica" in process.cmdline()[0]
    }


class Probe(threading.Thread):
    """Asks `/healthz` every 20 ms while it is entered; `times_ms` are the answers' times."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.times_ms: list[float] = []
        self._http = httpx.Client(base_url=service.url, timeout=30)
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            started = time.perf_counter()
            assert self._http.get("/healthz").status_code == 200
            self.times_ms.append((time.perf_counter() - started) * 1e3)

    def __enter__(self) -> "Probe":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._http.close()


def test_a_request_as_large_as_can_be(large: Service) -> None:
    count, words, kinds = 2048, 144, 32
    tokens = count * (words + 2)
    assert tokens <= Settings().max_request_tokens < tokens + count, "not the largest request of that many texts"
    with httpx.Client(base_url=large.url) as http:
        alone = np.concatenate([embed(http, [text(number, words)])[0] for number in range(kinds)])
        embed(http, [text(number % kinds, words) for number in range(64)])
        before = resident_bytes(large)
        started = time.perf_counter()
        with Probe(large) as probe:
            vectors, usage, headers = embed(http, [text(number % kinds, words) for number in range(count)])
        took_s = time.perf_counter() - started
    assert usage == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert headers["x-truncated-inputs"] == "0"
    assert vectors.shape == (count, 384)
    lowest = float((vectors * alone[np.arange(count) % kinds]).sum(1).min())
    assert lowest >= 0.9999
    times_ms = sorted(probe.times_ms)
    deadline = time.monotonic() + 20
    while True:
        grown = {name: size - before[name] for name, size in resident_bytes(large).items()}
        if max(grown.values()) < SLACK_BYTES or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    print(
        f"\n{count} texts, {tokens} tokens in {took_s:.1f} s; lowest cosine to each alone {lowest:.6f}; healthz "
        f"p50 {statistics.median(times_ms):.1f} ms, p99 {times_ms[int(len(times_ms) * 0.99)]:.1f} ms, worst "
        f"{times_ms[-1]:.1f} ms of {len(times_ms)}; memory grown by "
        + ", ".join(f"{name.split(':')[-1]} {size / 2**20:.0f} MiB" for name, size in grown.items())
    )
    assert max(grown.values()) < SLACK_BYTES
    assert times_ms[len(times_ms) // 2] < 1000, "the ingress did not stay responsive"
