"""The same load against a running service: each request at its time, and the replicas as Serve's own API tells them."""

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from cluster.simulate.arrivals import Arrivals
from cluster.simulate.controller import Timeline
from cluster.simulate.replay import TAIL_S, Run

REQUEST_TIMEOUT_S = 70.0
WATCH_PERIOD_S = 1.0
# A word that is one token; a text has a start and an end token besides.
WORD = "water"


@dataclass
class Outcome:
    """What a real run was, and what went wrong: an error's text for each request that was not answered with vectors."""

    run: Run
    failures: list[str]
    start_s: list[float]  # of each replica, from Serve's decision until it runs
    unseen: list[str]  # why the replicas could not be seen, each time that they could not


@dataclass
class _Watch:
    """The replicas of an application's Model deployments, once a second."""

    dashboard: str
    application: str
    timeline: Timeline = field(default_factory=Timeline)
    seen: dict[str, dict[str, float]] = field(default_factory=dict)  # replica -> state -> when it was first seen

    async def look(self, http: httpx.AsyncClient, at_s: float, waiting_tokens: int) -> None:
        application = (await _applications(http, self.dashboard))[self.application]
        models = [each for name, each in application["deployments"].items() if name.startswith("Model-")]
        states = [replica["state"] for model in models for replica in model["replicas"]]
        for model in models:
            for replica in model["replicas"]:
                self.seen.setdefault(replica["replica_id"], {}).setdefault(replica["state"], at_s)
        self.timeline.at_s.append(at_s)
        self.timeline.running.append(states.count("RUNNING"))
        self.timeline.target.append(sum(model["target_num_replicas"] for model in models))
        self.timeline.waiting_tokens.append(waiting_tokens)

    def replica_s(self, end_s: float) -> float:
        """Replica-seconds from each one's start, or from the begin of the run, to its end."""
        return sum(times.get("STOPPING", end_s) - min(times.values()) for times in self.seen.values() if times)

    def start_s(self) -> list[float]:
        starts = [times for times in self.seen.values() if {"STARTING", "RUNNING"} <= times.keys()]
        return [times["RUNNING"] - times["STARTING"] for times in starts]


async def _applications(http: httpx.AsyncClient, dashboard: str) -> dict[str, Any]:
    answer = await http.get(f"{dashboard}/api/serve/applications/")
    applications: dict[str, Any] = answer.raise_for_status().json()["applications"]
    return applications


def texts(tokens: int, most: int) -> list[str]:
    """Texts of so many tokens together, each of at most `most`.

    >>> [len(text.split()) for text in texts(30, 12)]  # and 2 each for its start and end
    [8, 8, 8]
    """
    count = -(-tokens // most)
    return [" ".join([WORD] * (tokens // count + (number < tokens % count) - 2)) for number in range(count)]


async def drive(url: str, dashboard: str, arrivals: Arrivals, rate: float) -> list[Outcome]:
    """Send the same load to every application of a service at once, so that all meet the same machine."""
    token = os.environ.get("RAY_AUTH_TOKEN")  # `make serve` and every cluster want it; `ray get-auth-token` prints it
    async with httpx.AsyncClient(timeout=10.0, headers={"authorization": f"Bearer {token}"} if token else {}) as http:
        applications = await _applications(http, dashboard)
        return await asyncio.gather(
            *(
                _drive(url + application["route_prefix"].rstrip("/"), _Watch(dashboard, name), http, arrivals, rate)
                for name, application in applications.items()
            )
        )


async def _drive(url: str, watch: _Watch, other: httpx.AsyncClient, arrivals: Arrivals, rate: float) -> Outcome:
    """Send each request when it is due, whatever became of those before, and watch on for a while after the last."""
    latency_s = np.full(len(arrivals), np.nan)
    failures: list[str] = []
    unseen: list[str] = []
    waiting = 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as http:
        model = (await http.get(f"{url}/v1/models")).raise_for_status().json()["data"][0]
        begun = time.monotonic()

        async def ask(number: int) -> None:
            nonlocal waiting
            tokens = int(arrivals.tokens[number])
            sent = texts(tokens, model["max_tokens"])
            body = {"model": model["id"], "input": sent, "encoding_format": "base64"}
            waiting += tokens
            try:
                answer = await http.post(f"{url}/v1/embeddings", json=body)
                if answer.status_code != 200 or answer.json()["usage"]["total_tokens"] != tokens:
                    failures.append(f"{answer.status_code} {answer.text[:200]}")
            except httpx.HTTPError as error:
                failures.append(repr(error))
            latency_s[number] = time.monotonic() - begun - arrivals.at_s[number]
            waiting -= tokens

        async def look_on() -> None:
            while True:
                try:
                    await watch.look(other, time.monotonic() - begun, waiting)
                # The dashboard is away for a while, or does not know the application yet.
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    unseen.append(repr(error))
                await asyncio.sleep(WATCH_PERIOD_S)

        watching = asyncio.create_task(look_on())
        async with asyncio.TaskGroup() as asking:
            for number, at_s in enumerate(arrivals.at_s.tolist()):
                await asyncio.sleep(max(0.0, begun + at_s - time.monotonic()))
                asking.create_task(ask(number))
        await asyncio.sleep(max(0.0, begun + float(arrivals.at_s[-1]) + TAIL_S - time.monotonic()))
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        end_s = time.monotonic() - begun
    run = Run(watch.application, arrivals, latency_s, watch.timeline, watch.replica_s(end_s), rate)
    return Outcome(run, failures, watch.start_s(), unseen)
