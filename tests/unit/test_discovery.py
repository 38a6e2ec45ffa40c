"""Which replicas to keep to while a rollout mixes them, and how often they are asked who they are."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app import discovery
from serve_app.answers import Described
from serve_app.discovery import choose, refresh
from serve_app.errors import ModelUnavailable
from serve_app.pipeline import Pipeline
from serve_app.replicas import Replicas
from serve_app.settings import ModelSettings
from tests.hand import HandStages, served


@pytest.mark.parametrize(
    ("replicas", "current", "chosen"),
    [
        ("", "old", ""),
        ("o", "", "o"),
        ("ooo n", "o", "o"),
        ("oo nn", "o", "o"),
        ("oo nn", "n", "n"),
        ("o nnn", "o", "n"),
        ("nnnn", "o", "n"),
    ],
)
def test_calls_go_to_the_weights_that_most_replicas_have_and_change_no_sooner_than_needed(
    replicas: str, current: str, chosen: str
) -> None:
    models = [replace(served(), weights=weights) for weights in replicas.replace(" ", "")]
    assert choose(models, current) == chosen


class Asked(HandStages):
    """Says each time that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = asyncio.Semaphore(0)

    async def describe(self, deadline: float) -> Described:
        self.questions.release()
        return await super().describe(deadline)


@asynccontextmanager
async def refreshing(stages: HandStages, is_settled: Callable[[], bool]) -> AsyncIterator[None]:
    task = asyncio.create_task(refresh(Pipeline(ModelSettings(), stages, 1000), is_settled))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a hundredth, but for the longest, which then never ends."""
    monkeypatch.setattr(discovery, "REFRESH_PERIOD_S", 0.005)
    monkeypatch.setattr(discovery, "REFRESH_A_REPLICA_S", 0.00075)
    monkeypatch.setattr(discovery, "REFRESH_LONGEST_S", 1000.0)


@pytest.mark.usefixtures("quick")
async def test_replicas_are_asked_again_when_one_has_come_or_gone_and_else_left_alone() -> None:
    stages = Asked()
    is_settled, looks = True, asyncio.Semaphore(0)

    def look() -> bool:
        looks.release()
        return is_settled

    async with refreshing(stages, look):
        for _ in range(20):
            await looks.acquire()
        assert stages.descriptions == 1, "nothing changed, nobody is asked"
        is_settled = False
        for _ in range(3):
            await stages.questions.acquire()


@pytest.mark.usefixtures("quick")
async def test_while_there_is_no_replica_the_asking_goes_on() -> None:
    stages = Asked()
    async with refreshing(stages, lambda: True):
        stages.failure = ModelUnavailable("none is there")
        for _ in range(3):
            await stages.questions.acquire()


@pytest.mark.usefixtures("quick")
async def test_no_fault_ends_the_asking(caplog: pytest.LogCaptureFixture) -> None:
    stages = Asked()

    def fail() -> bool:
        raise AttributeError("what Serve no longer has")

    async with refreshing(stages, fail):
        for _ in range(3):
            await stages.questions.acquire()
    assert "what Serve no longer has" in caplog.text


async def test_also_what_changes_without_a_sign_is_learnt_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "REFRESH_PERIOD_S", 0.005)
    monkeypatch.setattr(discovery, "REFRESH_A_REPLICA_S", 0.0)
    monkeypatch.setattr(discovery, "REFRESH_LONGEST_S", 0.05)
    stages = Asked()
    looks: list[int] = []

    def look() -> bool:
        looks.append(stages.descriptions)
        return True

    async with refreshing(stages, look):
        for _ in range(3):
            await stages.questions.acquire()
    assert looks == [1] * 9 + [2] * 9


async def test_the_more_replicas_answer_the_longer_is_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "REFRESH_PERIOD_S", 0.001)
    monkeypatch.setattr(discovery, "REFRESH_A_REPLICA_S", 1.0)
    monkeypatch.setattr(discovery, "REFRESH_LONGEST_S", 0.1)
    stages = Asked()
    stages.models = 200
    async with refreshing(stages, lambda: pytest.fail("the longest pause leaves nothing to look for")):
        started = time.monotonic()
        for _ in range(3):
            await stages.questions.acquire()
        assert time.monotonic() - started >= 0.2


async def test_replicas_are_settled_while_those_that_answered_are_those_that_serve_names() -> None:
    class Reply:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        async def get_async(self) -> str:
            if self.answer == "silent":
                raise TimeoutError
            return self.answer

    class Handle:
        """As much of Serve's as is used: whom it would call, and the call to all of them."""

        deployment_name = "Model-x"

        def __init__(self) -> None:
            self.named: dict[str, str] = {}
            router = SimpleNamespace(request_router=SimpleNamespace(curr_replicas=self.named))
            self._router = SimpleNamespace(_asyncio_router=router)

        def broadcast(self, method: str) -> Any:
            async def replies() -> list[Reply]:
                return [Reply(answer) for answer in self.named.values()]

            return SimpleNamespace(_fetch_replica_results_async=replies)

    handle: Any = Handle()
    replicas = Replicas(handle)
    assert not replicas.is_settled, "nobody was asked yet"
    handle.named["1"] = "one"
    assert await replicas.describe(time.monotonic() + 20) == ["one"]
    assert replicas.is_settled
    handle.named["2"] = "silent"
    assert not replicas.is_settled, "another has come"
    assert await replicas.describe(time.monotonic() + 20) == ["one"]
    assert not replicas.is_settled, "it said nothing"
    handle.named["2"] = "two"
    await replicas.describe(time.monotonic() + 20)
    assert replicas.is_settled
    del handle.named["1"]
    assert not replicas.is_settled, "one has gone"
