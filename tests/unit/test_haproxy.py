"""HAProxy under one keeper after another: the real program, a small server behind it, and requests all the while."""

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

from serve_app.haproxy import LastingHAProxy
from tests.service.conftest import free_port

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process groups that keepers went to; that of these tests stays as it is."""
    joined: list[int] = []

    def join(_: int, group: int) -> None:
        joined.append(group)

    monkeypatch.setattr(os, "setpgid", join)
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getpid()))
    yield joined
    for leader in set(joined):
        os.kill(leader, signal.SIGKILL)
        os.waitpid(leader, 0)


class House:
    """Keepers of one node: they share its files and ports."""

    def __init__(self, folder: Path, *servers: int) -> None:
        self._file = str(folder / "haproxy.cfg")
        self._ports = [free_port() for _ in range(3)]
        self.port = self._ports[0]
        self._folder = folder
        self.backends = {
            "app": haproxy.BackendConfig(
                "app", "/", servers=[haproxy.ServerConfig(f"on-{port}", "127.0.0.1", port) for port in servers]
            )
        }

    def keeper(self) -> LastingHAProxy:
        port, stats, metrics = self._ports
        config = haproxy.HAProxyConfig(
            socket_path=str(self._folder / "admin.sock"),
            server_state_base=str(self._folder),
            server_state_file=str(self._folder / "state"),
            stats_port=stats,
            metrics_port=metrics,
            metrics_enabled=False,
            nbthread=1,
            retry_on=yaml.safe_load(CONFIG.read_text())["controller_options"]["runtime_env"]["env_vars"][
                "RAY_SERVE_HAPROXY_RETRY_ON"
            ],
            http_options=HTTPOptions(host="127.0.0.1", port=port),
        )
        return LastingHAProxy(cfg=config, config_file_path=self._file)

    async def is_served(self) -> bool:
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
                return bool(answer.read() == b"ok")
        except OSError:
            return False


@asynccontextmanager
async def server(answer: bytes, asked: list[bytes] | None = None) -> AsyncIterator[int]:
    """One that answers every request alike, or with nothing, and lists what it was asked; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        _, _, size = head.partition(b"content-length: ")
        with suppress(asyncio.IncompleteReadError):
            await reader.readexactly(int(size.split()[0]) if size and answer else 0)
        is_check = b"/-/healthz" in head
        if asked is not None and not is_check:
            asked.append(head)
        writer.write(ANSWER if is_check else answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with server(ANSWER) as port:
        yield House(tmp_path, port)


@asynccontextmanager
async def asked(house: House) -> AsyncIterator[list[bool]]:
    """Requests one after another while the block runs; whether each was answered."""
    answers: list[bool] = []

    async def ask() -> None:
        while True:
            answers.append(await house.is_served())

    asking = asyncio.create_task(ask())
    yield answers
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await holds():  # noqa: ASYNC110 # of another process
            await asyncio.sleep(0.01)


def pid(keeper: LastingHAProxy) -> int:
    assert keeper._proc is not None
    return keeper._proc.pid


def forget(keeper: LastingHAProxy) -> None:
    """As if its actor was killed."""
    assert keeper._keeper is not None
    keeper._keeper.cancel()


async def test_the_next_keeper_takes_over_and_no_request_fails(house: House) -> None:
    first, second = house.keeper(), house.keeper()
    first.set_backend_configs(house.backends)
    await first.start()
    forget(first)
    async with asked(house) as answers:
        starting = asyncio.create_task(second.start())
        await asyncio.sleep(0.5)
        assert second._proc is None  # it knows nothing to route to yet
        second.set_backend_configs(house.backends)
        await starting
        assert first._proc is not None
        await asyncio.wait_for(first._proc.wait(), 10)
        before = len(answers)
        await until(lambda: asyncio.sleep(0, len(answers) > before + 5))
    assert all(answers)
    await until(lambda: asyncio.sleep(0, second._running() == [str(pid(second))]))
    await second.stop()
    assert second._running() == []


async def test_what_died_is_started_again(house: House) -> None:
    keeper = house.keeper()
    keeper.set_backend_configs(house.backends)
    await keeper.start()
    for _ in range(2):
        killed = pid(keeper)
        os.kill(killed, signal.SIGKILL)
        await until(lambda old=killed: asyncio.sleep(0, pid(keeper) != old))  # type: ignore[misc]
        assert await house.is_served()
    await keeper.stop()
    await until(lambda: asyncio.sleep(0, keeper._running() == []))


async def test_what_died_after_a_reload_is_started_again_while_the_one_before_still_has_clients(house: House) -> None:
    keeper = house.keeper()
    keeper.set_backend_configs(house.backends)
    await keeper.start()
    _, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n")  # it waits for the rest
    await writer.drain()
    await asyncio.sleep(0.1)
    first = pid(keeper)
    await keeper.reload()
    killed = pid(keeper)
    assert str(first) in keeper._running() and killed != first
    os.kill(killed, signal.SIGKILL)
    await until(lambda: asyncio.sleep(0, pid(keeper) != killed))
    assert await house.is_served()
    await keeper.stop()
    await until(lambda: asyncio.sleep(0, keeper._running() == []))
    writer.close()


async def test_a_reload_while_it_is_dead_starts_it(house: House) -> None:
    keeper = house.keeper()
    await keeper.start()
    forget(keeper)
    assert keeper._proc is not None
    os.kill(pid(keeper), signal.SIGKILL)
    await keeper._proc.wait()
    keeper.set_backend_configs(house.backends)
    await keeper.reload()
    assert await house.is_served()
    await keeper.stop()


async def test_one_that_cannot_be_asked_is_replaced_all_the_same(house: House) -> None:
    first, second = house.keeper(), house.keeper()
    await first.start()
    forget(first)
    os.unlink(first.cfg.socket_path)
    second.set_backend_configs(house.backends)
    await second.start()
    assert await house.is_served()
    await second.stop()


async def test_where_nothing_is_to_be_served_the_next_keeper_takes_over_as_well(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.haproxy.TARGETS_TIMEOUT_S", 0.1)
    first, second = house.keeper(), house.keeper()
    await first.start()
    forget(first)
    await second.start()
    assert pid(second) != pid(first)
    await second.stop()


@pytest.mark.parametrize(("size", "saved"), [(200, True), (12_000, True), (40_000, False)])
async def test_what_a_replica_had_when_it_died_is_sent_to_another(tmp_path: Path, size: int, saved: bool) -> None:
    """If HAProxy has all of it: also of a client that sends head and body apart, as Python's do."""
    asked: list[bytes] = []
    async with server(ANSWER) as good, server(b"", asked) as dying:
        house = House(tmp_path, good, dying)
        keeper = house.keeper()
        keeper.set_backend_configs(house.backends)
        await keeper.start()
        answers = []
        for _ in range(2):  # each of the two has its turn
            reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
            writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % size)
            await asyncio.sleep(0.05)
            writer.write(b"x" * size)
            answers.append((await reader.readuntil(b"\r\n")).split()[1])
            writer.close()
        assert sorted(answers) == [b"200", b"200" if saved else b"500"] and len(asked) == 1
        await keeper.stop()


async def test_haproxy_ends_with_the_raylet(monkeypatch: pytest.MonkeyPatch, house: House, groups: list[int]) -> None:
    raylet = await asyncio.create_subprocess_exec("sleep", "60")
    monkeypatch.setenv("RAY_RAYLET_PID", str(raylet.pid))
    first, second = house.keeper(), house.keeper()
    leader = first._find_leash()
    monkeypatch.setattr(first, "_find_leash", lambda: leader)
    for keeper in (first, second):
        keeper.set_backend_configs(house.backends)
    # As HAProxy is started by an actor that is in the group.
    spawn = asyncio.create_subprocess_exec
    monkeypatch.setattr(asyncio, "create_subprocess_exec", partial(spawn, process_group=leader))
    await first.start()
    forget(first)
    await second.start()
    assert groups == [leader, leader], "the next keeper's HAProxy must be on the same leash"
    forget(second)
    raylet.kill()
    await raylet.wait()
    assert second._proc is not None
    assert await asyncio.wait_for(second._proc.wait(), 10) == -signal.SIGKILL
    assert second._running() == []


async def test_a_start_is_seen_before_serve_looks_again(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    """Serve waits for half a second between two looks, and the first is always too early."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds: float) -> None:
        slept.append(seconds)
        await sleep(seconds)

    keeper = house.keeper()
    monkeypatch.setattr("serve_app.haproxy.LOOK_TIMEOUT_S", 30.0)
    monkeypatch.setattr(asyncio, "sleep", record)
    await keeper.start()
    await keeper._graceful_reload()
    assert slept and max(slept) < 0.5
    await keeper.stop()


async def test_a_start_that_fails_is_told_by_serve(house: House) -> None:
    keeper = house.keeper()
    await asyncio.to_thread(Path(keeper.config_file_path).write_text, "no configuration")
    with pytest.raises(RuntimeError, match="crashed during startup"):
        await keeper._start_and_wait_for_haproxy()


async def test_one_that_is_silent_is_left_to_serve(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    """As one that was stopped, and accepts without an answer."""
    keeper = house.keeper()
    asked: list[object] = []

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(reader)
        await reader.read()
        writer.close()

    monkeypatch.setattr("serve_app.haproxy.LOOK_TIMEOUT_S", 0.1)
    sleeper = await asyncio.create_subprocess_exec("sleep", "60")
    sleeper._stderr_path = "/dev/null"  # type: ignore[attr-defined]  # as Serve has it on its own
    try:
        async with await asyncio.start_unix_server(be_silent, keeper.cfg.socket_path):
            with pytest.raises(RuntimeError, match="within 0 seconds"):
                await keeper._wait_for_hap_availability(sleeper, 0)
    finally:
        sleeper.kill()
        await sleeper.wait()
    assert len(asked) == 1, "only until the time for looks was over"
