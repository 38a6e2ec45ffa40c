"""Scaling, from nothing and back to nothing, in the real service: replicas follow the work, and no request fails."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tests.model import MODEL
from tests.service.conftest import Keeper, Service

pytestmark = pytest.mark.service

CLIENTS = 32
LOOK_PERIOD_S = 0.25
# Twelve tokens; the sleeping engine takes a millisecond for each.
TEXT = "how long does red wine keep in the fridge"


def elastic(config: dict[str, Any]) -> None:
    """Models that sleep instead of computing, none to two of them, with delays that a test can wait for."""
    [application] = config["applications"]
    application["args"]["models"] = [{"id": "Mihaiii/Ivysaur", "sources": ["embedded"], "engine": "sleep"}]
    application["args"]["models"][0]["batch_tokens"] = 64
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0}
        deployment["autoscaling_config"]["downscale_delay_s"] = 3
        if deployment["name"].startswith("Model-"):
            deployment["autoscaling_config"] |= {"min_replicas": 0, "max_replicas": 2}


def models(service: Service) -> int:
    """Processes that are model replicas."""
    running = 0
    for process in psutil.Process(service.process.pid).children(recursive=True):
        try:
            running += "ServeReplica:embeddings:Model-" in " ".join(process.cmdline())
        except psutil.Error:  # it ended meanwhile
            continue
    return running


async def until(holds: Callable[[], bool], timeout_s: float) -> None:
    for _ in range(round(timeout_s / LOOK_PERIOD_S)):
        if await asyncio.to_thread(holds):
            return
        await asyncio.sleep(LOOK_PERIOD_S)
    pytest.fail(f"it did not come to that within {timeout_s:.0f} s")


async def test_replicas_come_with_the_work_and_go_with_it_and_no_request_fails(keeper: Keeper) -> None:
    service = keeper.get(elastic)
    answers: list[int] = []

    def is_asleep() -> bool:
        ready = httpx.get(f"{service.url}/readyz", timeout=10)
        return ready.status_code == 200 and ready.json()["models"] == {"Mihaiii/Ivysaur": "asleep"}

    async with httpx.AsyncClient(base_url=service.url, timeout=70) as http:

        async def ask() -> None:
            answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXT})
            answers.append(answer.status_code)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["data"][0]["embedding"]) == 384

        # From zero: what is served is still known, and the first requests wait for the model and are answered.
        await until(is_asleep, 40)
        await until(lambda: models(service) == 0, 20)
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == MODEL
        asked = time.monotonic()
        await asyncio.gather(*(ask() for _ in range(8)))
        print(f"the first requests to a model at zero were answered after {time.monotonic() - asked:.1f} s")
        assert models(service) >= 1

        # More work than one replica does: there are two, and the work is faster done.
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                await ask()

        clients = [asyncio.create_task(keep_asking()) for _ in range(CLIENTS)]
        await until(lambda: models(service) == 2, 40)
        await asyncio.sleep(3)  # so that the second has its share, or fails
        stop.set()
        await asyncio.gather(*clients)

        # Nobody asks any more: back to none, and still there when somebody does.
        await until(is_asleep, 40)
        await ask()
    assert set(answers) == {200} and len(answers) > 100
