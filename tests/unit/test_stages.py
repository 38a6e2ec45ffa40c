"""The stages of a model over real connections, with replicas that come and go as a test says."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from serve_app.channel import Listener
from serve_app.errors import DeadlineExceeded, EngineError, ModelUnavailable
from serve_app.packing import Tokenized
from serve_app.pipeline import SHORT_CHARACTERS, Pipeline
from serve_app.settings import ModelSettings
from serve_app.stages import RemoteStages
from tests.hand import FRAME, HandStages, known, served, tokenized, vector

HOST = "127.0.0.1"
LONG = "long " * SHORT_CHARACTERS


class HandTokenizer:
    frame = FRAME
    tokenize = staticmethod(tokenized)
    tokenize_known = staticmethod(known)


@dataclass
class Deployment:
    """Replicas of one deployment as Serve would know them: what each says of itself."""

    deployment: str
    replicas: list[Any] = field(default_factory=list)
    asleep: bool = False
    is_settled: bool = True

    async def describe(self, deadline: float) -> list[Any]:
        return self.replicas

    async def are_asleep(self) -> bool:
        return self.asleep


class Service:
    """Tokenizers, one at a time, and models as many as a test starts."""

    def __init__(self) -> None:
        self.tokenizers, self.models = Deployment("Tokenizer-x"), Deployment("Model-x")
        self.stages = RemoteStages("x", self.tokenizers, self.models)
        self.pipeline = Pipeline(ModelSettings(batch_tokens=64), self.stages, max_request_tokens=10_000)
        self.tokenizer: Listener
        self.may_hand_over = True
        self.tokenizing = asyncio.Semaphore(0)  # calls that came
        self.may_tokenize = asyncio.Event()  # whether they go on
        self._listeners: list[Listener] = []

    async def start_tokenizer(self, digest: str = "t0k") -> Listener:
        async def hand_over(_: None, deadline: float) -> Any:
            if not self.may_hand_over:
                raise EngineError("not now")
            return digest, HandTokenizer()

        async def tokenize(texts: Sequence[str], deadline: float) -> Tokenized:
            self.tokenizing.release()
            await self.may_tokenize.wait()
            return tokenized(texts)

        listener = Listener({"hand_over": hand_over, "tokenize": tokenize})
        self._listeners.append(listener)
        self.tokenizers.replicas = [(digest, await listener.open(HOST))]
        return listener

    async def lose_tokenizer(self, listener: Listener) -> None:
        """Its connections break, whatever it is at."""
        self.tokenizers.replicas = []
        for peer in listener.peers.copy():
            peer.abort()
        self.may_tokenize.set()
        await listener.close()

    async def start_model(self) -> Listener:
        hand = HandStages()
        listener = Listener({"infer": hand.infer, "infer_bulk": hand.infer})
        self._listeners.append(listener)
        self.models.replicas = [*self.models.replicas, (served(), await listener.open(HOST), 100.0)]
        return listener

    async def stop_models(self, *listeners: Listener) -> None:
        self.models.replicas = []
        for listener in listeners:
            await listener.close()

    async def close(self) -> None:
        self.tokenizers.replicas = self.models.replicas = []
        with suppress(ModelUnavailable):
            await self.pipeline.discover(soon())
        for listener in self._listeners:
            await listener.close()


def soon() -> float:
    return time.monotonic() + 20


async def turns() -> None:
    """Let everything that can run now run."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    made.tokenizer = await made.start_tokenizer()
    yield made
    await made.close()


async def test_a_model_without_a_replica_is_unavailable_until_there_was_one(service: Service) -> None:
    service.models.asleep = True  # as Serve sees a deployment that was never needed
    with pytest.raises(ModelUnavailable, match="No replica of `x` is there"):
        await service.stages.describe(soon())
    assert not service.pipeline.is_asleep
    await service.start_model()
    assert (await service.stages.describe(soon())).models == 1


async def test_a_model_that_never_had_a_tokenizer_is_unavailable(service: Service) -> None:
    await service.start_model()
    await service.lose_tokenizer(service.tokenizer)
    with pytest.raises(ModelUnavailable, match="No replica of `x` is there"):
        await service.stages.describe(soon())


async def test_a_request_waits_for_a_model_that_sleeps_and_is_answered_when_it_wakes(service: Service) -> None:
    first = await service.start_model()
    await service.pipeline.discover(soon())
    await service.pipeline.embed(["before"], soon())
    await service.stop_models(first)
    service.models.asleep = True
    assert (await service.pipeline.discover(soon())).models == 0
    assert service.pipeline.is_asleep
    assert service.stages.is_settled(), "nobody need be asked until one has come"
    await service.pipeline.try_out()  # wakes nothing, and waits for nothing

    _, (inferring, _) = service.pipeline.queues
    asking = asyncio.create_task(service.pipeline.embed(["during"], soon()))
    await turns()
    assert (inferring.unfinished_cost, service.stages.loads) == (len("during") + 2, (0, 0)), "held, at no replica"
    assert service.pipeline.served is not None, "what it serves is still known"
    await service.start_model()
    service.models.asleep = False
    await service.pipeline.discover(soon())
    assert np.allclose((await asking).vectors, [vector("during")])
    assert not service.pipeline.is_asleep
    assert inferring.unfinished_cost == 0 and inferring.asked_cost == len("before" + "during") + 4


async def test_a_model_whose_replicas_are_gone_but_wanted_is_not_asleep(service: Service) -> None:
    first = await service.start_model()
    await service.pipeline.discover(soon())
    await service.stop_models(first)
    with pytest.raises(ModelUnavailable):
        await service.pipeline.discover(soon())
    assert not service.pipeline.is_asleep


async def test_they_are_settled_while_all_that_are_there_have_answered_and_take_calls(service: Service) -> None:
    first = await service.start_model()
    await service.pipeline.discover(soon())
    assert service.stages.is_settled()
    service.models.is_settled = False  # another has come
    assert not service.stages.is_settled()
    service.models.is_settled = True
    for peer in first.peers.copy():
        peer.abort()
    for _ in range(1000):
        if not service.stages.is_settled():
            break
        await asyncio.sleep(0.01)  # until this end has noticed
    assert not service.stages.is_settled()
    await service.pipeline.discover(soon())
    assert service.stages.is_settled(), "it is connected to again"


async def test_a_long_text_is_tokenized_here_if_its_tokenizer_is_lost_and_no_other_is_there(service: Service) -> None:
    await service.start_model()
    await service.pipeline.discover(soon())
    asking = asyncio.create_task(service.pipeline.embed([LONG], soon()))
    await service.tokenizing.acquire()  # a tokenizer that can be reached is asked
    await service.lose_tokenizer(service.tokenizer)
    assert np.allclose((await asking).vectors, [vector(LONG)])


async def test_without_a_tokenizer_models_are_found_and_long_texts_embedded(service: Service) -> None:
    first = await service.start_model()
    await service.pipeline.discover(soon())
    await service.lose_tokenizer(service.tokenizer)
    await service.stop_models(first)
    await service.start_model()
    assert (await service.pipeline.discover(soon())).tokenizers == 0
    assert np.allclose((await service.pipeline.embed([LONG], soon())).vectors, [vector(LONG)])
    assert service.tokenizing.locked(), "none was asked"
    await service.start_tokenizer()
    await service.pipeline.discover(soon())
    assert np.allclose((await service.pipeline.embed([LONG], soon())).vectors, [vector(LONG)])
    await service.tokenizing.acquire()


async def test_tokenizers_that_only_do_not_say_who_they_are_are_still_asked(service: Service) -> None:
    await service.start_model()
    await service.pipeline.discover(soon())
    service.tokenizers.replicas = []
    await service.pipeline.discover(soon())
    service.may_tokenize.set()
    assert np.allclose((await service.pipeline.embed([LONG], soon())).vectors, [vector(LONG)])
    await service.tokenizing.acquire()


async def test_what_can_not_be_tokenized_in_time_is_over_at_its_deadline(service: Service) -> None:
    await service.start_model()
    await service.pipeline.discover(soon())
    await service.lose_tokenizer(service.tokenizer)
    with pytest.raises(DeadlineExceeded):
        await service.stages.tokenize([LONG], time.monotonic())


async def test_a_model_with_another_tokenizer_than_the_last_known_waits_for_its_own(service: Service) -> None:
    await service.start_model()
    await service.pipeline.discover(soon())
    await service.lose_tokenizer(service.tokenizer)
    [(mine, endpoint, rate)] = service.models.replicas
    service.models.replicas = [(replace(mine, tokenizer="an0ther", weights="0ther"), endpoint, rate)]
    with pytest.raises(ModelUnavailable, match="changing to another model"):
        await service.pipeline.discover(soon())


async def test_tokenizers_that_never_handed_over_are_not_asked_for_the_models_before(service: Service) -> None:
    """An update that begins and is gone again, with tokenizers that can be reached and then do not say who they are."""
    await service.start_model()
    await service.pipeline.discover(soon())
    before = service.models.replicas
    [(mine, endpoint, rate)] = before
    service.models.replicas = [(replace(mine, tokenizer="an0ther", weights="0ther"), endpoint, rate)]
    service.may_hand_over = False
    await service.start_tokenizer("an0ther")
    with pytest.raises(EngineError, match="not now"):
        await service.stages.describe(soon())
    service.tokenizers.replicas, service.models.replicas = [], before
    await service.pipeline.discover(soon())
    assert np.allclose((await service.pipeline.embed([LONG], soon())).vectors, [vector(LONG)])
    assert service.tokenizing.locked(), "none was asked"


async def test_a_backlog_stays_where_a_new_replica_can_take_it(service: Service) -> None:
    """A replica is sent no more full calls than keep it busy; one that comes later takes the rest."""
    gate = asyncio.Event()
    hand = HandStages()

    async def infer(packed: Any, deadline: float) -> Any:
        await gate.wait()
        return await hand.infer(packed, deadline)

    stuck = Listener({"infer": infer, "infer_bulk": infer})
    service._listeners.append(stuck)
    service.models.replicas = [(served(), await stuck.open(HOST), 100.0)]
    await service.pipeline.discover(soon())
    texts = [f"text {number:6}" for number in range(64)]  # 13 tokens each, 4 to a call
    asking = asyncio.create_task(service.pipeline.embed(texts, soon()))
    _, (_, inferring) = service.pipeline.queues
    await turns()
    held = inferring.unfinished_cost - service.stages.loads[1]
    assert held >= 0.8 * inferring.unfinished_cost
    await service.start_model()
    await service.pipeline.discover(soon())
    gate.set()
    assert np.allclose((await asking).vectors, [vector(text) for text in texts])
