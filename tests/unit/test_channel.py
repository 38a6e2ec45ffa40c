"""Calls between replicas over real sockets: order, errors, strangers, and what happens when a replica goes away."""

import asyncio
import gc
import pickle
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve_app import channel, pool
from serve_app.channel import HEADER, MAX_PAYLOAD_BYTES, Endpoint, Listener
from serve_app.errors import DeadlineExceeded, EngineBroken, EngineError, InvalidInput, ModelUnavailable
from serve_app.pool import ATTEMPTS, REPEATS, Pool

HOST = "127.0.0.1"


def soon() -> float:
    return time.monotonic() + 20


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


class Process:
    """A replica that answers, waits at a gate, or fails, as its caller says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.gate = asyncio.Event()
        self.arrived = asyncio.Event()
        self.listener = Listener(
            {"echo": self.echo, "wait": self.wait, "fail": self.fail, "odd": self.odd, "unreadable": self.unreadable}
        )

    async def echo(self, job: Any, deadline: float) -> Any:
        self.asked.append(job)
        return job

    async def wait(self, job: Any, deadline: float) -> Any:
        self.arrived.set()
        await self.gate.wait()
        return await self.echo(job, deadline)

    async def fail(self, error: Exception, deadline: float) -> Any:
        raise error

    async def odd(self, job: Any, deadline: float) -> Any:
        """What can't be sent."""
        return lambda: job

    async def unreadable(self, job: Any, deadline: float) -> Any:
        """What can be sent and not read: a class that the caller does not have, say."""
        return Unreadable()

    def freeze(self) -> None:
        """As when a process is stopped: its connections stay, and it reads nothing."""
        for peer in self.listener.peers:
            peer.pause_reading()

    def die(self) -> None:
        """As when a process ends: the system closes its connections."""
        for peer in self.listener.peers:
            peer.abort()


class Service:
    """Replicas and a pool of them, all closed at the end of a test."""

    def __init__(self) -> None:
        self.pool = Pool("Mihaiii/Ivysaur")
        self._processes: list[Process] = []

    async def start(self, count: int) -> tuple[list[Process], list[Endpoint]]:
        started = [Process() for _ in range(count)]
        self._processes += started
        return started, [await process.listener.open(HOST) for process in started]

    async def stop(self) -> None:
        await self.pool.update([])
        for process in self._processes:
            process.gate.set()
            await process.listener.close()
            await asyncio.sleep(0.01)  # for the sockets to close, which nothing tells


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    yield service
    await service.stop()


async def test_many_calls_at_once_each_get_their_own_answer(service: Service) -> None:
    _, endpoints = await service.start(2)
    await service.pool.update(endpoints)
    jobs = [np.full(1 + 97 * number, number, np.int32) for number in range(200)]  # up to 78 kB: many reads a frame
    answers = await asyncio.gather(*(service.pool.call("echo", job, len(job), soon()) for job in jobs))
    assert all(np.array_equal(answer, job) for answer, job in zip(answers, jobs, strict=True))


async def test_the_least_loaded_replica_is_called(service: Service) -> None:
    [busy, free], [first, second] = await service.start(2)
    await service.pool.update([first])
    held = asyncio.ensure_future(service.pool.call("wait", "long", 1000, soon()))
    await busy.arrived.wait()
    await service.pool.update([first, second])
    for number in range(10):
        await service.pool.call("echo", number, 10, soon())
    assert free.asked == list(range(10))
    busy.gate.set()
    assert await held == "long"


@pytest.mark.parametrize("error", [InvalidInput("'input' is odd.", "input"), ModelUnavailable("later")])
async def test_the_services_own_errors_arrive_as_they_were_raised(service: Service, error: Exception) -> None:
    _, endpoints = await service.start(1)
    await service.pool.update(endpoints)
    with pytest.raises(type(error)) as caught:
        await service.pool.call("fail", error, 1, soon())
    assert str(caught.value) == str(error) and vars(caught.value) == vars(error)


async def test_any_other_error_arrives_without_its_message(service: Service) -> None:
    _, endpoints = await service.start(1)
    await service.pool.update(endpoints)
    with pytest.raises(EngineError, match=r"^a replica failed with ValueError$"):
        await service.pool.call("fail", ValueError("somebody's text"), 1, soon())
    with pytest.raises(EngineError, match=r"^a replica failed with KeyError$"):
        await service.pool.call("no such method", None, 1, soon())
    assert await service.pool.call("echo", "still there", 1, soon()) == "still there"


async def test_a_job_that_failed_is_freed_without_the_garbage_collector(service: Service) -> None:
    _, endpoints = await service.start(1)
    await service.pool.update(endpoints)
    jobs = [EngineError("of no use")]
    freed = weakref.ref(jobs[0])
    gc.collect()
    gc.disable()
    try:
        with suppress(EngineError):
            await service.pool.call("fail", jobs.pop(), 1, soon())
        await asyncio.sleep(0)  # the loop holds the answer for as long as this task goes on with it
        assert freed() is None
    finally:
        gc.enable()


async def test_calls_of_a_replica_that_dies_are_made_again_at_another(service: Service) -> None:
    [dying, other], [first, second] = await service.start(2)
    await service.pool.update([first])
    calls = [asyncio.ensure_future(service.pool.call("wait", number, 1, soon())) for number in range(20)]
    await dying.arrived.wait()
    await service.pool.update([first, second])
    other.gate.set()
    dying.die()
    assert await asyncio.gather(*calls) == list(range(20))
    assert sorted(other.asked) == list(range(20))
    assert await service.pool.call("echo", "after", 1, soon()) == "after"


async def test_a_call_of_a_replica_whose_engine_is_broken_is_made_again_at_another(service: Service) -> None:
    asked: list[int] = []

    async def broken(job: Any, deadline: float) -> Any:
        asked.append(job)
        raise EngineBroken("the engine fails at everything")

    _, endpoints = await service.start(1)
    bad = Listener({"echo": broken})
    await service.pool.update([await bad.open(HOST), *endpoints])
    calls = range(2 * REPEATS)  # more than could be made again
    assert [await service.pool.call("echo", number, 1, soon()) for number in calls] == list(calls)
    assert len(asked) == 1, "it answers at once, so it would have been asked each time"
    await bad.close()


async def test_repeats_end_where_most_calls_need_one(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "REPEATS", 2)
    service.pool = Pool("Mihaiii/Ivysaur")
    [replica], endpoints = await service.start(1)
    await service.pool.update(endpoints)
    calls = [asyncio.ensure_future(service.pool.call("wait", number, 1, soon())) for number in range(5)]
    await replica.arrived.wait()
    others, more = await service.start(1)
    await service.pool.update([*endpoints, *more])
    others[0].gate.set()
    replica.die()
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(each).__name__ for each in done) == ["ModelUnavailable"] * 3 + ["int"] * 2


async def test_calls_of_a_replica_that_falls_silent_are_made_again_at_another(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SILENT_S", 0.05)
    [frozen, other], [first, second] = await service.start(2)
    await service.pool.update([first])
    calls = [asyncio.ensure_future(service.pool.call("wait", number, 1, soon())) for number in range(20)]
    await frozen.arrived.wait()
    frozen.freeze()
    await asyncio.sleep(0.3)  # no other is known to live, so it is waited for
    assert not any(call.done() for call in calls)
    other.gate.set()
    await service.pool.update([first, second])
    assert await asyncio.gather(*calls) == list(range(20))


async def test_a_replica_that_takes_long_is_not_taken_for_a_silent_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SILENT_S", 0.05)
    [busy, other], [first, second] = await service.start(2)
    await service.pool.update([first])
    call = asyncio.ensure_future(service.pool.call("wait", "long", 1, soon()))
    await busy.arrived.wait()
    await service.pool.update([first, second])
    await asyncio.sleep(0.3)
    busy.gate.set()
    assert await call == "long"
    assert busy.asked == ["long"] and other.asked == []


async def test_a_call_waits_for_a_replica_to_come(service: Service) -> None:
    call = asyncio.ensure_future(service.pool.call("echo", "early", 1, soon()))
    await service.pool.update([])
    _, endpoints = await service.start(1)
    await service.pool.update(endpoints)
    assert await call == "early"


async def test_a_call_ends_at_its_deadline_with_no_replica_or_a_silent_one(service: Service) -> None:
    with pytest.raises(DeadlineExceeded, match="No replica of `Mihaiii/Ivysaur` answered in time"):
        await service.pool.call("echo", 1, 1, time.monotonic() + 0.05)
    [replica], endpoints = await service.start(1)
    await service.pool.update(endpoints)
    with pytest.raises(DeadlineExceeded):
        await service.pool.call("wait", "late", 1, time.monotonic() + 0.05)
    replica.gate.set()  # the late answer is dropped, and does not go to the next call
    assert await service.pool.call("echo", "next", 1, soon()) == "next"


async def test_it_gives_up_after_replicas_died_in_a_row(service: Service) -> None:
    replicas, endpoints = await service.start(ATTEMPTS)
    await service.pool.update(endpoints)
    call = asyncio.ensure_future(service.pool.call("wait", "poison", 1, soon()))
    while replicas:
        arrivals = [asyncio.ensure_future(replica.arrived.wait()) for replica in replicas]
        await asyncio.wait(arrivals, return_when=asyncio.FIRST_COMPLETED)
        for arrival in arrivals:
            arrival.cancel()
        victim = next(replica for replica in replicas if replica.arrived.is_set())
        replicas.remove(victim)
        victim.die()
    with pytest.raises(ModelUnavailable, match=f"lost {ATTEMPTS} replicas in a row"):
        await call


async def test_a_replica_that_leaves_the_list_finishes_its_calls_and_gets_no_more(service: Service) -> None:
    [leaving, staying], [first, second] = await service.start(2)
    await service.pool.update([first])
    held = asyncio.ensure_future(service.pool.call("wait", "held", 1, soon()))
    await leaving.arrived.wait()
    await service.pool.update([second])
    assert await service.pool.call("echo", "new", 1, soon()) == "new"
    closing = asyncio.ensure_future(leaving.listener.close())
    leaving.gate.set()
    assert await held == "held"
    await closing
    assert leaving.asked == ["held"] and staying.asked == ["new"]


async def test_a_stranger_is_cut_off_before_anything_is_read(service: Service) -> None:
    [replica], [endpoint] = await service.start(1)
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    writer.write(b"x" * len(endpoint.secret) + HEADER.pack(0, 3, False) + b"abc")
    with suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    await service.pool.update([replace(endpoint, secret=bytes(len(endpoint.secret)))])
    with pytest.raises(DeadlineExceeded):
        await service.pool.call("echo", 1, 1, time.monotonic() + 0.2)
    assert replica.asked == []
    assert repr(endpoint.secret) not in repr(endpoint)


async def test_a_frame_over_the_limit_closes_the_connection(service: Service) -> None:
    _, [endpoint] = await service.start(1)
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    writer.write(endpoint.secret + HEADER.pack(0, MAX_PAYLOAD_BYTES + 1, False))
    with suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


async def test_a_secret_and_frames_may_come_byte_by_byte(service: Service) -> None:
    [replica], [endpoint] = await service.start(1)
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    payload = pickle.dumps(("echo", "job", 20.0))
    for byte in endpoint.secret + (HEADER.pack(7, len(payload), False) + payload) * 2:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    for _ in range(2):
        number, size_bytes, is_error = HEADER.unpack(await reader.readexactly(HEADER.size))
        assert (number, is_error) == (7, False) and pickle.loads(await reader.readexactly(size_bytes)) == "job"
    assert replica.asked == ["job", "job"]
    writer.close()


async def test_an_answer_that_cannot_be_read_is_an_error_to_its_caller_alone(service: Service) -> None:
    [replica], endpoints = await service.start(1)
    await service.pool.update(endpoints)
    beside = asyncio.ensure_future(service.pool.call("wait", "beside", 1, soon()))
    await replica.arrived.wait()
    with pytest.raises(EngineError, match="an answer can't be read: ValueError"):
        await service.pool.call("unreadable", 1, 1, soon())
    replica.gate.set()
    assert await beside == "beside"


async def test_an_answer_that_cannot_be_sent_leaves_nobody_waiting(service: Service) -> None:
    _, endpoints = await service.start(ATTEMPTS)
    await service.pool.update(endpoints)
    with pytest.raises(ModelUnavailable, match="lost 3 replicas"):
        await service.pool.call("odd", 1, 1, soon())


async def test_calls_of_a_replica_that_leaves_and_never_answers_are_made_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "RETIRE_TIMEOUT_S", 0.05)
    [silent, other], [first, second] = await service.start(2)
    await service.pool.update([first])
    call = asyncio.ensure_future(service.pool.call("wait", "held", 1, soon()))
    await silent.arrived.wait()
    other.gate.set()
    await service.pool.update([second])
    assert await call == "held"
    assert other.asked == ["held"] and silent.asked == []


async def test_a_peer_that_shows_no_secret_is_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "TRUST_TIMEOUT_S", 0.05)
    _, [endpoint] = await service.start(1)
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    writer.write(endpoint.secret[:-1])
    with suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    await service.pool.update([endpoint])
    await asyncio.sleep(0.1)
    assert await service.pool.call("echo", "trusted", 1, soon()) == "trusted"


async def test_one_replica_that_cannot_be_reached_keeps_no_call_from_another(service: Service) -> None:
    _, [reachable] = await service.start(1)
    await service.pool.update([replace(reachable, port=1), reachable])
    assert await service.pool.call("echo", 1, 1, soon()) == 1
