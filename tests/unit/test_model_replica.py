"""A Model replica around an engine that a test leads by the hand: who waits for whom, and when it counts as broken."""

import asyncio
import math
import os
import threading
from typing import Any

import numpy as np
import pytest

from serve_app import deployments
from serve_app.engines.guard import Guard
from serve_app.errors import EngineBroken, EngineError
from serve_app.packing import Float32, Packed
from serve_app.rate import Rate
from serve_app.threads import background

SHORT = Packed(np.ones(8, np.int32), np.array([8], np.int32))
LONG = Packed(np.ones(64, np.int32), np.array([32, 32], np.int32))
LANES = 2


class HandEngine:
    """Begins batches and finishes them when a test lets it, with or without vectors that are numbers."""

    lanes, lane_tokens, brief_tokens = LANES, 1, 0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.began = asyncio.Semaphore(0)
        self.may_finish = threading.Event()
        self.value = 1.0
        self.niceness: dict[int, int] = {}  # by a batch's tokens

    def embed(self, packed: Packed) -> Float32:
        self.niceness[packed.tokens] = os.getpriority(os.PRIO_PROCESS, 0)
        self._loop.call_soon_threadsafe(self.began.release)
        if packed.tokens >= LONG.tokens:
            assert self.may_finish.wait(30)
        return np.full((packed.rows, 4), self.value, np.float32)


class Names:
    weights = fingerprint = "hand"


class Replica(deployments.Model.func_or_class):  # type: ignore[name-defined,misc]
    """The deployment's own class around an engine, without Serve, weights and a listener."""

    def __init__(self, engine: HandEngine) -> None:
        self._engine, self._broken = Guard(engine, 4), None  # type: ignore[arg-type]
        self._served, self._rate = Names, Rate(LONG.tokens)
        self._short, self._long = (
            deployments.Queue(deployments.partial(self._run, threads), LONG.tokens, lanes=LANES)
            for threads in (None, background(LANES, 0.1))
        )
        self._endpoint = asyncio.get_running_loop().create_future()
        self._endpoint.set_result(None)

    def __del__(self) -> None:  # Serve awaits the original's
        pass


async def test_a_short_text_waits_for_no_long_list_and_has_the_processor_first() -> None:
    engine = HandEngine()
    model: Any = Replica(engine)
    long = [asyncio.create_task(model._long.submit(LONG, LONG.tokens, math.inf)) for _ in range(2 * LANES)]
    for _ in range(LANES):
        await engine.began.acquire()
    assert (await model.infer(SHORT, math.inf)).vectors.shape == (1, 4)
    assert not any(job.done() for job in long)
    await model.check_health()
    engine.may_finish.set()
    assert [(await job).vectors.shape for job in long] == [(2, 4)] * len(long)
    assert engine.niceness[LONG.tokens] == engine.niceness[SHORT.tokens] + 10


async def test_an_engine_that_fails_at_everything_is_not_described_and_not_healthy() -> None:
    engine = HandEngine()
    model: Any = Replica(engine)
    await model.check_health()
    engine.value = math.nan
    with pytest.raises(EngineBroken):
        await model.infer(SHORT, math.inf)
    with pytest.raises(EngineBroken):
        await model.describe()
    with pytest.raises(EngineBroken):
        await model.check_health()


async def test_an_engine_that_hangs_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "ENGINE_STALL_S", 0.0)
    engine = HandEngine()
    model: Any = Replica(engine)
    await model.check_health()
    job = asyncio.create_task(model._long.submit(LONG, LONG.tokens, math.inf))
    await engine.began.acquire()
    with pytest.raises(EngineError, match="at one batch"):
        await model.check_health()
    engine.may_finish.set()
    await job
