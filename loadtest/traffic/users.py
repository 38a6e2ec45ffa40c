"""The users as Locust runs them, and what their process knows of the service."""

import time
from collections.abc import Iterator
from random import Random
from typing import ClassVar

import gevent
from gevent.lock import RLock
from locust import User, task

from loadtest.traffic import checks
from loadtest.traffic.checks import REFUSED, Answer, Fault, Vector
from loadtest.traffic.clients import Client, OpenAIClient, PlainClient
from loadtest.traffic.kinds import KINDS, KNOWN, Kind
from loadtest.workload import SEED

# What the requests before the load are called, in Locust's tables and in the report.
LEARNING = "first answers"
RETRY_S = 1.0


class Service:
    """What a load process knows of the service: its model, and the vector that each text had when it was first seen."""

    def __init__(self, url: str, key: str | None, model: str | None, paced: bool) -> None:
        self.url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        self.key = key
        self.model = model
        self.paced = paced
        self.dimensions = 0
        self._known: dict[str, Vector] = {}
        self._lock = RLock()
        self._learnt: set[type[Client]] = set()

    def check(self, texts: list[str], answer: Answer) -> Fault | None:
        """What is wrong with an answer; of a right one the vectors are remembered: 1.5 KB each, of some 1,200 texts."""
        fault = checks.check(answer, texts, self.dimensions, self._known)
        if fault is None:
            for text, vector in zip(texts, answer.vectors, strict=True):
                self._known.setdefault(text, vector)
        return fault

    def learn(self, user: "EmbeddingUser") -> None:
        """Ask once with each client of a process for the known texts, one by one; before the first, for the model.

        What is refused is asked for again, since the service may be starting; each try counts as a request. A client
        that was used once is warm, too.
        """
        with self._lock:
            if user.client_class in self._learnt:
                return
            while not self.dimensions and not self._describe(user):
                gevent.sleep(RETRY_S)
            for text in KNOWN:
                while (fault := user.ask(LEARNING, [text], time.perf_counter())) and fault.what in REFUSED:
                    gevent.sleep(RETRY_S)
            self._learnt.add(user.client_class)

    def _describe(self, user: "EmbeddingUser") -> bool:
        started = time.perf_counter()
        client = PlainClient(self.url, self.key)
        try:
            models = client.models()
            served = next((each for each in models if self.model in (None, each["id"])), None)
            if served is None:
                raise Fault("body", f"the model asked for is not among the {len(models)} that are served")
            if not isinstance(served.get("dimensions"), int):
                # Another service than this project's: what it answers first has to do.
                served["dimensions"] = client.embed(served["id"], KNOWN[:1]).vectors[0].size
        except Fault as fault:
            user.report(LEARNING, [], started, 0, fault)
            return False
        finally:
            client.close()
        self.model, self.dimensions = served["id"], served["dimensions"]
        return True


class EmbeddingUser(User):
    """Sends what its kind's script says.

    Closed, a pause counts from the answer. Paced, it counts from when the request was due, and so does its latency: a
    service that stalls doesn't hide the requests that would have come meanwhile, they come late and are told as late.
    """

    abstract = True
    service: ClassVar[Service]  # set when a run starts
    numbers: ClassVar[Iterator[int]]  # likewise
    kind: ClassVar[Kind]
    client_class: ClassVar[type[PlainClient | OpenAIClient]] = PlainClient

    def on_start(self) -> None:
        """Connect, and begin somewhere within the first pause: users who come together don't act in step."""
        worker = self.environment.runner.worker_index
        source = Random(f"{SEED} {self.kind.name} {worker} {next(self.numbers)}")
        self.client: Client = self.client_class(self.service.url, self.service.key)
        self.service.learn(self)
        self._script = self.kind.script(source)
        self._due = time.perf_counter() + source.random() * next(self._script).pause_s
        self.wait()

    def on_stop(self) -> None:
        if hasattr(self, "client"):
            self.client.close()

    def wait_time(self) -> float:
        """Seconds until the next request is due."""
        return max(0.0, self._due - time.perf_counter())

    @task
    def step(self) -> None:
        """The next request of the script; Locust waits `wait_time` after it."""
        step = next(self._script)
        since = self._due if self.service.paced else time.perf_counter()
        self.ask(self.kind.name, step.texts, since)
        self._due = (since if self.service.paced else time.perf_counter()) + step.pause_s

    def ask(self, name: str, texts: list[str], since: float) -> Fault | None:
        """Send one request and hold the answer against it; `since` (perf_counter) is when its latency begins."""
        answer, fault = None, None
        try:
            answer = self.client.embed(self.service.model or "", texts)
        except Fault as error:
            fault = error
        latency_s = time.perf_counter() - since
        if answer is not None:
            fault = self.service.check(texts, answer)
        self.report(name, texts, since, latency_s, fault, answer.tokens if answer else 0)
        return fault

    def report(
        self, name: str, texts: list[str], since: float, latency_s: float, fault: Fault | None, tokens: int = 0
    ) -> None:
        """Tell Locust of a request, and through its event whoever records."""
        self.environment.events.request.fire(
            request_type="embed",
            name=name,
            response_time=latency_s * 1e3,
            response_length=0,
            start_time=time.time() - (time.perf_counter() - since),
            exception=fault,
            context={"inputs": len(texts), "characters": sum(map(len, texts)), "tokens": tokens},
        )


class Autocomplete(EmbeddingUser):
    kind = KINDS["autocomplete"]
    weight = kind.weight


class Rag(EmbeddingUser):
    kind = KINDS["rag"]
    weight = kind.weight


class Indexer(EmbeddingUser):
    kind = KINDS["indexer"]
    weight = kind.weight


class Mixed(EmbeddingUser):
    kind = KINDS["mixed"]
    weight = kind.weight


class OpenAI(EmbeddingUser):
    kind = KINDS["openai"]
    weight = kind.weight
    client_class = OpenAIClient
