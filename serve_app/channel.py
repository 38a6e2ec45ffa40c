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
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

from serve_app.errors import EmbeddingError, EngineError

logger = logging.getLogger("ray.serve")

# What a replica does for its peers: from a job and a deadline (`time.monotonic()` seconds, here) to the answer.
Method = Callable[[Any, float], Awaitable[Any]]

HEADER = struct.Struct("<QIB")  # the call's number, the payload's bytes, whether the payload is an error
MAX_PAYLOAD_BYTES = 1 << 28
SECRET_BYTES = 32
# A peer whose host has gone says nothing, so silence must end the connection: probes after 5 s of it, every 2 s, and
# the end once nothing was confirmed for 10 s.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_USER_TIMEOUT": 10_000}
# How long a peer may take to show the secret.
TRUST_TIMEOUT_S = 3.0
# What every listener answers at once.
PING = "ping"
# How long a replica that is leaving may take for the calls that it has; then they are made again at others.
RETIRE_TIMEOUT_S = 10.0


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


async def _pong(job: None, deadline: float) -> None:
    """Says that this replica's loop is turning."""


class Listener:
    """Answers the calls of peers that know its secret, each call in a task of its own."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods: dict[str, Method] = {PING: _pong, **methods}
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self.peers: set[asyncio.Transport] = set()

    async def open(self, host: str) -> Endpoint:
        """Listen on a free port of this address."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Answering(self), host, 0)
        return Endpoint(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def close(self) -> None:
        """Take no new peers, answer every call that came, then let the peers go."""
        if self._server is not None:
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
        answer, is_error = await self._result(payload)
        try:
            if not peer.transport.is_closing():  # else nobody is there to read it
                peer.send(number, answer, is_error)
        except Exception:  # what can't be sent: the caller tries another replica rather than wait
            logger.exception("an answer could not be sent")
            peer.transport.abort()

    async def _result(self, payload: bytes) -> tuple[Any, bool]:
        try:
            name, job, timeout_s = pickle.loads(payload)
            return await self._methods[name](job, time.monotonic() + timeout_s), False
        except EmbeddingError as error:
            return error, True
        except (Exception, asyncio.CancelledError) as error:
            # The traceback stays in this replica's log; the message may hold somebody's text, so it stays too.
            logger.exception("a call failed")
            return EngineError(f"a replica failed with {type(error).__name__}"), True


class _Answering(_Frames):
    """The listener's side of a connection: silent until the peer has shown the secret."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._is_trusted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.peers.add(self.transport)
        asyncio.get_running_loop().call_later(TRUST_TIMEOUT_S, self._distrust)

    def _distrust(self) -> None:
        if not self._is_trusted:
            self.transport.abort()

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


class Channel(_Frames):
    """The caller's side of a connection, with any number of calls in flight."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self.load = 0  # cost of the calls in flight, in the callers' unit
        self.is_open = True
        self._endpoint = endpoint
        self._numbers = count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._is_retired = False
        self._heard = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(self._endpoint.secret)

    @property
    def takes_calls(self) -> bool:
        return self.is_open and not self._is_retired

    @property
    def silent_s(self) -> float:
        """For how long nothing has come from a replica that has calls; 0.0 for one that has none."""
        return time.monotonic() - self._heard if self._answers else 0.0

    async def is_alive(self, timeout_s: float) -> bool:
        """Whether the replica answers within this time, whatever it is at."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.call(PING, None, 0, timeout_s)
        except (TimeoutError, PeerLost):
            return False
        except EmbeddingError:
            pass  # whatever it answers, it does
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(f"{self._endpoint} closed the connection"))

    def frame_received(self, number: int, payload: bytes, is_error: bool) -> None:
        self._heard = time.monotonic()
        answer = self._answers.pop(number, None)
        if answer is not None and not answer.done():  # else the caller gave it up
            try:
                value = pickle.loads(payload)
            except Exception as error:  # a replica of other code
                value, is_error = EngineError(f"an answer can't be read: {type(error).__name__}"), True
            answer.set_exception(value) if is_error else answer.set_result(value)

    def retire(self) -> None:
        """Take no more calls, and close once those in flight are answered or have been given time enough."""
        self._is_retired = True
        self._close_if_idle()
        asyncio.get_running_loop().call_later(RETIRE_TIMEOUT_S, self.transport.abort)

    def _close_if_idle(self) -> None:
        if self._is_retired and not self._answers:
            self.transport.close()

    async def call(self, name: str, job: Any, cost: int, timeout_s: float) -> Any:
        if not self.is_open:
            raise PeerLost(f"{self._endpoint} closed the connection")
        number = next(self._numbers)
        if not self._answers:
            self._heard = time.monotonic()  # it had nothing to say before
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.load += cost
        try:
            self.send(number, (name, job, timeout_s))
            return await answer
        finally:
            self.load -= cost
            self._answers.pop(number, None)
            del answer  # it may be an error, whose traceback holds this frame: a cycle, and the job with it
            self._close_if_idle()
