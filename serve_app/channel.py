"""Calls between replicas over one TCP connection a pair: Serve's handles in small, where their cost would decide.

Serve starts, watches, scales and replaces the replicas, and says which there are. But the way of one call through its
handles costs as much as a short query costs the model: of the 6.2 ms that a request took with an engine that does
nothing, 3.2 were two processes' Python around one message, against 0.4 ms here.

A peer proves that it belongs to the service by a secret that each replica makes for itself and hands out through Serve
alone. What follows it is pickled, as between all of Ray's processes: the ports belong on the cluster's own network.
"""

import asyncio
import hmac
import logging
import pickle
import random
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

from serve_app.errors import DeadlineExceeded, EmbeddingError, EngineError, ModelUnavailable

logger = logging.getLogger("ray.serve")

# What a replica does for its peers: from a job and a deadline (`time.monotonic()` seconds, here) to the answer.
Method = Callable[[Any, float], Awaitable[Any]]

HEADER = struct.Struct("<QIB")  # the call's number, the payload's bytes, whether the payload is an error
MAX_PAYLOAD_BYTES = 1 << 28
SECRET_BYTES = 32
# A peer whose host has gone says nothing, so silence must end the connection: probes after 5 s of it, every 2 s, three
# times; and what was sent must arrive within 10 s.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
CONNECT_TIMEOUT_S = 3.0
# Times that a call is made at most. Embedding twice is harmless, so what a dying replica had accepted is sent again.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one replica listens, and the secret that opens it."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class PeerLost(ConnectionError):
    """The connection broke, so that nobody knows whether the call was done."""


class _Frames(asyncio.Protocol):
    """Cuts the bytes of a connection into frames, and closes it at the first that can't be one."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._bytes = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has the methods and not the class
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        start = 0
        while len(self._bytes) >= start + HEADER.size:
            number, size_bytes, is_error = HEADER.unpack_from(self._bytes, start)
            if size_bytes > MAX_PAYLOAD_BYTES:
                logger.error(f"a peer announced {size_bytes} bytes, the limit is {MAX_PAYLOAD_BYTES}")
                self.transport.abort()
                return
            stop = start + HEADER.size + size_bytes
            if len(self._bytes) < stop:
                break
            self.frame_received(number, bytes(self._bytes[start + HEADER.size : stop]), bool(is_error))
            start = stop
        if start:
            del self._bytes[:start]

    def frame_received(self, number: int, payload: bytes, is_error: bool) -> None:
        raise NotImplementedError

    def send(self, number: int, value: Any, is_error: bool = False) -> None:
        payload = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise EngineError(f"a message of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
        self.transport.write(HEADER.pack(number, len(payload), is_error) + payload)


class Listener:
    """Answers the calls of peers that know its secret, each call in a task of its own."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods = methods
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._calls: set[asyncio.Task[None]] = set()
        self.peers: set[asyncio.Transport] = set()

    @property
    def ongoing_calls(self) -> int:
        return len(self._calls)

    async def open(self, host: str) -> Endpoint:
        """Listen on a free port of this address."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Answering(self), host, 0)
        return Endpoint(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def close(self) -> None:
        """Take no new peers, answer every call that came, then let the peers go."""
        self._server.close()
        while self._calls:
            await asyncio.wait(self._calls)
        for peer in self.peers:
            peer.close()

    def is_secret(self, shown: bytes) -> bool:
        return hmac.compare_digest(shown, self._secret)

    def start(self, peer: "_Answering", number: int, payload: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(peer, number, payload))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, peer: "_Answering", number: int, payload: bytes) -> None:
        try:
            name, job, timeout_s = pickle.loads(payload)
            peer.send(number, await self._methods[name](job, time.monotonic() + timeout_s))
        except EmbeddingError as error:
            peer.send(number, error, is_error=True)
        except Exception as error:
            # The traceback stays in this replica's log; the message may hold somebody's text, so it stays too.
            logger.exception("a call failed")
            peer.send(number, EngineError(f"a replica failed with {type(error).__name__}"), is_error=True)


class _Answering(_Frames):
    """The listener's side of a connection: silent until the peer has shown the secret."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._is_trusted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.peers.add(self.transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.peers.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        if not self._is_trusted:
            self._bytes += data
            if len(self._bytes) < SECRET_BYTES:
                return
            if not self._listener.is_secret(bytes(self._bytes[:SECRET_BYTES])):
                logger.warning(f"refused a peer without the secret: {self.transport.get_extra_info('peername')}")
                self.transport.abort()
                return
            self._is_trusted = True
            del self._bytes[:SECRET_BYTES]
            data = b""
        super().data_received(data)

    def frame_received(self, number: int, payload: bytes, is_error: bool) -> None:
        self._listener.start(self, number, payload)


class _Channel(_Frames):
    """The caller's side of a connection, with any number of calls in flight."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self.load = 0  # cost of the calls in flight, in the callers' unit
        self.is_open = True
        self._endpoint = endpoint
        self._numbers = count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._is_retired = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(self._endpoint.secret)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(f"{self._endpoint} closed the connection"))

    def frame_received(self, number: int, payload: bytes, is_error: bool) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None and not answer.done():  # else the caller gave it up
            value = pickle.loads(payload)
            answer.set_exception(value) if is_error else answer.set_result(value)
        self._close_if_idle()

    def retire(self) -> None:
        """Take no more calls and close once those in flight are answered."""
        self._is_retired = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._is_retired and not self._answers:
            self.transport.close()

    async def call(self, name: str, job: Any, cost: int, timeout_s: float) -> Any:
        if not self.is_open:
            raise PeerLost(f"{self._endpoint} closed the connection")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.load += cost
        try:
            self.send(number, (name, job, timeout_s))
            return await answer
        finally:
            self.load -= cost
            self._answers.pop(number, None)


class Pool:
    """The replicas of one deployment: a call goes to the one with the least work, and to another if that one dies."""

    def __init__(self, name: str) -> None:
        """`name` is what the errors call the replicas' model."""
        self._name = name
        self._channels: dict[Endpoint, _Channel] = {}
        self._changed = asyncio.Event()

    async def update(self, endpoints: Iterable[Endpoint]) -> None:
        """Connect to those of these that are new, and send no more calls to those that are not among them."""
        wanted = set(endpoints)
        for endpoint in self._channels.keys() - wanted:
            self._channels.pop(endpoint).retire()
        new = [each for each in wanted if each not in self._channels or not self._channels[each].is_open]
        for endpoint, channel in zip(new, await asyncio.gather(*map(_connect, new)), strict=True):
            if channel is not None:
                self._channels[endpoint] = channel
        self._changed.set()

    async def call(self, method: str, job: Any, cost: int, deadline: float) -> Any:
        """The answer of a replica; raises DeadlineExceeded, ModelUnavailable, or the replica's own EmbeddingError."""
        lost: list[_Channel] = []
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while len(lost) < ATTEMPTS:
                    channel = await self._least_loaded(lost)
                    try:
                        return await channel.call(method, job, cost, deadline - time.monotonic())
                    except PeerLost:
                        logger.warning(f"a replica of {self._name} was lost with a call in flight")
                        lost.append(channel)
        except TimeoutError:
            raise DeadlineExceeded(f"No replica of `{self._name}` answered in time.") from None
        raise ModelUnavailable(f"The model `{self._name}` lost {ATTEMPTS} replicas in a row; try again.")

    async def _least_loaded(self, lost: list[_Channel]) -> _Channel:
        while True:
            candidates = [each for each in self._channels.values() if each.is_open and each not in lost]
            if candidates:
                return min(candidates, key=lambda channel: (channel.load, random.random()))
            self._changed.clear()
            await self._changed.wait()


async def _connect(endpoint: Endpoint) -> _Channel | None:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, channel = await asyncio.get_running_loop().create_connection(
                lambda: _Channel(endpoint), endpoint.host, endpoint.port
            )
            return channel
    except (OSError, TimeoutError) as error:
        logger.warning(f"{endpoint} can't be reached: {type(error).__name__}")
        return None
