"""When a Model replica counts as broken: by batches that failed in a row, not by how many it is at."""

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest

from serve_app import deployments
from serve_app.errors import EngineError
from serve_app.packing import Float32, Packed
from serve_app.rate import Rate
from serve_app.scheduler import Scheduler

LANES = deployments.ENGINE_FAILURES + 1
TEXT = Packed(np.ones(64, np.int32), np.array([64], np.int32))


class HandEngine:
    """Begins batches and finishes them when a test lets it, with or without vectors that are numbers."""

    lanes, brief_tokens = LANES, 0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.began = asyncio.Semaphore(0)
        self.may_finish = threading.Event()
        self.value = 1.0

    def embed(self, packed: Packed) -> Float32:
        self._loop.call_soon_threadsafe(self.began.release)
        assert self.may_finish.wait(30)
        return np.full((packed.rows, 4), self.value, np.float32)


class Names:
    weights = fingerprint = "hand"


class Replica(deployments.Model.func_or_class):  # type: ignore[name-defined,misc]
    """The deployment's own class around an engine, without Serve, weights and a listener."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:  # Serve awaits the original's
        pass


def replica(engine: HandEngine) -> Any:
    model: Any = Replica()
    model._engine, model._served, model._failures, model._rate = engine, Names, 0, Rate(TEXT.tokens)
    model._scheduler = Scheduler(model._run, TEXT.tokens, lanes=LANES)
    model._endpoint = asyncio.get_running_loop().create_future()
    model._endpoint.set_result(None)
    return model


async def test_many_lanes_at_work_are_no_failures() -> None:
    engine = HandEngine()
    model = replica(engine)
    jobs = [asyncio.create_task(model._scheduler.submit(TEXT, TEXT.tokens, math.inf)) for _ in range(LANES)]
    for _ in range(LANES):
        await engine.began.acquire()
    assert model._scheduler.running == LANES
    await model.check_health()
    engine.may_finish.set()
    await asyncio.gather(*jobs)


async def test_an_engine_that_fails_at_every_batch_is_broken_until_one_succeeds() -> None:
    engine = HandEngine()
    model = replica(engine)
    engine.may_finish.set()
    engine.value = math.nan
    for failures in range(deployments.ENGINE_FAILURES):
        assert model._failures == failures
        await model.check_health()
        with pytest.raises(EngineError, match="not finite"):
            await model._scheduler.submit(TEXT, TEXT.tokens, math.inf)
    with pytest.raises(EngineError, match=f"failed at the last {deployments.ENGINE_FAILURES} batches"):
        await model.check_health()
    engine.value = 1.0
    await model._scheduler.submit(TEXT, TEXT.tokens, math.inf)
    await model.check_health()
