"""Clients that leave cost the others nothing, though their requests travel and compute together."""

import asyncio
import random

import httpx
import numpy as np
import pytest

from tests.model import MODEL
from tests.service.conftest import Service

pytestmark = pytest.mark.service

ROUNDS, TOGETHER = 12, 48


async def embed(http: httpx.AsyncClient, text: str) -> np.ndarray:
    answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": text})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["data"][0]["embedding"], np.float32)


async def test_who_stays_is_answered_rightly_whoever_leaves(service: Service) -> None:
    pick = random.Random(1)
    texts = [f"number {number} " + "of many words " * 12 for number in range(TOGETHER)]
    limits = httpx.Limits(max_connections=TOGETHER)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as http:
        alone = [await embed(http, text) for text in texts]
        left = 0
        for _ in range(ROUNDS):
            tasks = [asyncio.create_task(embed(http, text)) for text in texts]
            leavers = set(pick.sample(range(TOGETHER), TOGETHER // 3))
            for place in pick.sample(sorted(leavers), len(leavers)):
                await asyncio.sleep(pick.random() * 0.01)
                left += tasks[place].cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            for place, outcome in enumerate(outcomes):
                if place in leavers and isinstance(outcome, asyncio.CancelledError):
                    continue
                assert isinstance(outcome, np.ndarray), f"one who stayed got {outcome!r}"
                assert float(outcome @ alone[place]) >= 0.9999
    assert left > ROUNDS, "nobody left in time to matter"
