"""More than can be done, in the real service: what is accepted is answered in time, the rest is refused at once."""

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from tests.model import MODEL
from tests.service.conftest import Keeper, Service

pytestmark = pytest.mark.service

# Fifty-odd tokens; the sleeping engine does some eighteen of these a second, and a busy machine sends many more.
TEXT = " ".join(["how long does red wine keep in the fridge"] * 5)
DEADLINE_S = 2.0
TOO_MANY = 250
REFUSED_TIMEOUT_S = 120.0


def asleep(config: dict[str, Any]) -> None:
    """One model that sleeps instead of computing, so that the cores are left to those who ask and refuse."""
    [application] = config["applications"]
    application["args"]["models"] = [{"id": "Mihaiii/Ivysaur", "sources": ["embedded"], "engine": "sleep"}]
    application["args"]["models"][0]["batch_tokens"] = 128
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0}
        deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}


@pytest.fixture
def service(keeper: Keeper) -> Service:
    return keeper.get(asleep)


async def flood(service: Service, requests: int) -> list[tuple[httpx.Response, float]]:
    """So many requests at once, each with the seconds that it took."""
    limits = httpx.Limits(max_connections=None)
    headers = {"x-deadline-ms": str(round(DEADLINE_S * 1e3))}
    async with httpx.AsyncClient(base_url=service.url, timeout=30, limits=limits, headers=headers) as http:

        async def ask() -> tuple[httpx.Response, float]:
            started = time.monotonic()
            answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXT})
            return answer, time.monotonic() - started

        return await asyncio.gather(*(ask() for _ in range(requests)))


async def test_what_would_come_too_late_is_refused_and_the_rest_is_answered(service: Service) -> None:
    answers = await flood(service, TOO_MANY)
    statuses = Counter(answer.status_code for answer, _ in answers)
    # Two seconds' worth, and what is done while a busy machine still sends; one that stands still makes some late.
    assert 20 <= statuses[200] <= TOO_MANY * 2 / 3 and statuses[429] >= TOO_MANY / 3, statuses
    assert statuses[200] + statuses[429] + statuses[504] == TOO_MANY and statuses[504] <= 20, statuses
    for answer, _ in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "slow_down"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        elif answer.status_code == 200:
            assert len(answer.json()["data"][0]["embedding"]) == 384
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as http:
        assert (await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXT})).status_code == 200


async def test_openais_client_is_told_and_its_own_retries_get_an_answer(service: Service) -> None:
    headers = {"x-deadline-ms": str(round(DEADLINE_S * 1e3))}
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", default_headers=headers) as client:
        is_refused = asyncio.Event()

        async def keep_flooding() -> None:
            while not is_refused.is_set():
                await flood(service, TOO_MANY)

        flooding = asyncio.create_task(keep_flooding())
        refused = None
        async with asyncio.timeout(REFUSED_TIMEOUT_S):
            while refused is None:
                try:
                    await client.with_options(max_retries=0).embeddings.create(model=MODEL, input=TEXT)
                except openai.RateLimitError as error:
                    refused = error
        is_refused.set()
        assert "What waits before this request takes about" in refused.message
        answer = await client.with_options(max_retries=5).embeddings.create(model=MODEL, input=TEXT)
        assert len(answer.data[0].embedding) == 384
        await flooding
