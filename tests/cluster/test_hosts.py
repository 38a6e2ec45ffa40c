"""Models on hosts of their own, and hosts that are cut off while requests are on their way to them: not one fails."""

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from openai import AsyncOpenAI, OpenAIError

from cluster.local import config
from serve_app.engines import bert
from serve_app.engines.sleep import TOKEN_S, SleepEngine
from serve_app.settings import ModelSettings
from serve_app.tokens import Tokenizer
from serve_app.weights import resolve
from tests.cluster.hosts import Host, Network, reason_against, tool
from tests.model import MODEL

pytestmark = pytest.mark.service

HOSTS = 2
PORT = 8000
REQUEST_TIMEOUT_S = 30.0
START_TIMEOUT_S, HEAL_TIMEOUT_S = 120.0, 90.0
LOOK_PERIOD_S = 0.25
PACE_S = 0.1  # between two requests: one replica alone could do twice as many
FAST_S = 1.0  # what a request takes at most while all is well
LONGEST_S = 8.0  # what one takes at most, come what may: less than the 10 s after which TCP gives a host up
CALM_S = 3.0  # for how long every answer is fast before all is called well
TEXTS = [f"how long does red wine keep in the fridge once bottle {number} of twelve is open" for number in range(48)]
SHORT_LIST, LONG_LISTS = 8, 3
# How soon Ray gives up a node that is silent: after 20 s, where its own values (3 s, 10 s and 5) make 65.
GIVE_UP = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request: times in `time.monotonic()` seconds, and what was wrong with it."""

    texts: int
    asked: float
    arrived: float
    fault: str

    @property
    def took_s(self) -> float:
        return self.arrived - self.asked

    @property
    def is_slow(self) -> bool:
        return self.texts <= SHORT_LIST and self.took_s > FAST_S


class Load:
    """Requests at a steady pace, each tried once and held against vectors that are computed here."""

    def __init__(self, url: str) -> None:
        self.answers: list[Answer] = []
        self._pending: dict[asyncio.Task[None], float] = {}  # a request -> when it was asked
        self._expected = expected_vectors()
        patience_s = REQUEST_TIMEOUT_S + 5
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=patience_s, limits=limits, trust_env=False)
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=patience_s)
        self._pacing = asyncio.create_task(self._pace())

    async def _pace(self) -> None:
        due = time.monotonic()
        for number in range(1 << 30):
            rows = list(range(SHORT_LIST)) if number % 10 == 0 else [number % len(TEXTS)]
            self._start(self._by_openai if number % 5 == 2 else self._by_hand, rows)
            due += PACE_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    def _start(self, way: Callable[[list[int]], Awaitable[NDArray[Any]]], rows: list[int]) -> None:
        task = asyncio.create_task(self._ask(way, rows))
        self._pending[task] = time.monotonic()
        task.add_done_callback(self._pending.pop)

    async def _ask(self, way: Callable[[list[int]], Awaitable[NDArray[Any]]], rows: list[int]) -> None:
        asked, fault = time.monotonic(), ""
        try:
            np.testing.assert_allclose(await way(rows), self._expected[rows], atol=1e-5)
        except (AssertionError, ValueError, KeyError, httpx.HTTPError, OpenAIError) as error:
            fault = f"{type(error).__name__}: {error}"
        self.answers.append(Answer(len(rows), asked, time.monotonic(), fault))

    async def _by_hand(self, rows: list[int]) -> NDArray[Any]:
        answer = await self._http.post("/v1/embeddings", json={"model": MODEL, "input": [TEXTS[row] for row in rows]})
        assert answer.status_code == 200, answer.text
        return np.array([each["embedding"] for each in answer.json()["data"]])

    async def _by_openai(self, rows: list[int]) -> NDArray[Any]:
        answer = await self._openai.embeddings.create(model=MODEL, input=[TEXTS[row] for row in rows])
        return np.array([each.embedding for each in answer.data])

    async def occupy(self) -> None:
        """Ask for more than both replicas do in a second, and return once calls are on the way to each."""
        for _ in range(LONG_LISTS):
            self._start(self._by_hand, list(range(len(TEXTS))))
        await self._ask(self._by_hand, [0])  # of what came later, only a short text is answered earlier

    def since(self, moment: float) -> list[Answer]:
        """Answers that came from then on."""
        return [answer for answer in self.answers if answer.arrived > moment]

    async def is_fast(self, since: float = 0.0) -> bool:
        """Whether all answers have been for a while, since that moment, and none is still waited for."""
        now = time.monotonic()
        lately = self.since(now - CALM_S)
        if now < since + CALM_S or len(lately) < CALM_S / PACE_S / 2:
            return False
        return not any(answer.is_slow for answer in lately) and now - min(self._pending.values(), default=now) < FAST_S

    async def is_shared(self) -> bool:
        """Whether more than one replica works: a list comes back in less time than one engine sleeps for it."""
        asked = time.monotonic()
        answer = await self._http.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS})
        took_s = time.monotonic() - asked
        assert answer.status_code == 200, answer.text
        return took_s < answer.json()["usage"]["prompt_tokens"] * TOKEN_S

    async def finish(self) -> None:
        self._pacing.cancel()
        await asyncio.gather(*self._pending)
        await self._http.aclose()
        await self._openai.close()


class Service:
    """The application on the hosts, as Ray's dashboard sees it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.url = f"http://{network.head.address}:{PORT}"

    def start(self, folder: Path) -> None:
        self.network.build()
        self.network.head.start()
        wait(lambda: self.nodes("ALIVE"))
        for host in self.network.hosts:
            host.start()
        file = folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(one_model_a_host()))
        command = [tool("serve"), "deploy", "--address", self.network.dashboard, str(file)]
        environment = self.network.environment
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        wait(self.replicas)
        wait(lambda: httpx.get(f"{self.url}/readyz", timeout=10, trust_env=False).is_success)

    def nodes(self, state: str) -> set[str]:
        """Addresses of the nodes that are `ALIVE`, or `DEAD`; one of which the dashboard has no news is neither."""
        summary = self.network.ask("/nodes?view=summary")["data"]["summary"]
        # A node that has just come is listed before its address is.
        return {node["ip"] for node in summary if "ip" in node and node["raylet"].get("state") == state}

    def replicas(self) -> dict[str, str]:
        """The model's replica on each host, by address, once each host has one that runs and there is no other."""
        applications = self.network.ask("/api/serve/applications/")["applications"]
        deployments = applications["embeddings"]["deployments"] if applications else {}
        found = deployments.get("Model-Ivysaur", {"replicas": []})["replicas"]
        where = {each["node_ip"]: each["replica_id"] for each in found if each["state"] == "RUNNING"}
        return where if len(found) == len(where) == HOSTS else {}


def one_model_a_host() -> dict[str, Any]:
    written = config(nodes=HOSTS, models_a_node=1)
    written["http_options"] = {"host": "0.0.0.0", "port": PORT}
    [application] = written["applications"]
    application["args"]["request_timeout_s"] = REQUEST_TIMEOUT_S
    for deployment in application["deployments"]:
        if deployment["name"].startswith("Model-"):
            deployment["autoscaling_config"]["min_replicas"] = HOSTS
    return written


def expected_vectors() -> NDArray[np.float32]:
    found = resolve(ModelSettings(sources=("embedded",)))
    engine = SleepEngine(bert.load(found.folder, found.pooling, found.normalize))
    return engine.embed(Tokenizer(found.folder, found.max_tokens, found.lowercase).tokenize(TEXTS).packed)


def wait(condition: Callable[[], Any]) -> None:
    """Ask until the answer is true."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if condition():
                return
        except (OSError, httpx.TransportError):  # nobody answers yet
            pass
        assert time.monotonic() < deadline
        time.sleep(LOOK_PERIOD_S)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + HEAL_TIMEOUT_S
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(LOOK_PERIOD_S)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    if reason := reason_against():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short, as sockets' paths must be
        network = Network(HOSTS, Path(folder), GIVE_UP)
        try:
            service = Service(network)
            service.start(tmp_path)
            yield service
        finally:
            network.remove()


async def cut_off(service: Service, load: Load, host: Host, is_given_up: bool) -> None:
    """Until answers are fast again, or also until Ray has given the node up; then the cable is put back."""

    async def is_gone() -> bool:
        return host.address in await asyncio.to_thread(service.nodes, "DEAD")

    async def is_whole() -> bool:
        await asyncio.to_thread(host.keep)  # a node that was given up ends as soon as it hears of it
        return bool(await asyncio.to_thread(service.replicas)) and await load.is_shared()

    before = await asyncio.to_thread(service.replicas)
    await load.occupy()
    cut = time.monotonic()
    service.network.cut(host)
    await until(lambda: load.is_fast(since=cut))
    if is_given_up:
        await until(is_gone)
    healed = time.monotonic()
    service.network.heal(host)
    await until(is_whole)
    whole = time.monotonic()
    await until(load.is_fast)
    after = await asyncio.to_thread(service.replicas)
    assert (before != after) == is_given_up
    answers = load.since(cut)
    slow = [answer for answer in answers if answer.is_slow and answer.asked < healed]
    fast_again = max((answer.arrived for answer in slow), default=cut)
    alone_s = [answer.took_s for answer in answers if fast_again < answer.asked and answer.arrived < healed]
    print(
        f"\n{host.address} was cut off for {healed - cut:.1f} s: {len(answers)} requests, "
        f"{sum(bool(answer.fault) for answer in answers)} failed, {len(slow)} took over {FAST_S:g} s, the longest "
        f"{max(answer.took_s for answer in answers):.1f} s; fast again {fast_again - cut:.1f} s after the cut, p99 "
        f"{np.percentile(alone_s, 99) * 1e3:.0f} ms on the other host; both served {whole - healed:.1f} s after its "
        f"end, {'the same replicas' if before == after else 'one of them new'}"
    )


async def test_a_host_that_is_cut_off_costs_no_request_and_comes_back(service: Service) -> None:
    load = Load(service.url)
    try:
        await until(load.is_shared)
        await until(load.is_fast)
        first, second = service.network.hosts
        await cut_off(service, load, first, is_given_up=False)
        await cut_off(service, load, second, is_given_up=True)
    finally:
        await load.finish()
    assert not [answer for answer in load.answers if answer.fault]
    assert max(answer.took_s for answer in load.answers) < LONGEST_S
