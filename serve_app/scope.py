"""A request before Serve and the routes see it: its path, its headers, its client, and how its answer leaves."""

import asyncio
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# uvicorn's own `receive`, whose connection knows if the client is there; not in the scope, which Serve may pickle.
_received_by: ContextVar[Receive | None] = ContextVar("_received_by", default=None)


def is_gone() -> Callable[[], bool]:
    """Whether the client has left, by uvicorn's own note of it; always False behind another server."""
    connection = _connection(_received_by.get())
    return lambda: getattr(connection, "disconnected", False)


def _connection(receive: Receive | None) -> Any:
    """uvicorn's own record of a request, to which its `receive` belongs; None behind another server."""
    return getattr(receive, "__self__", None)


class _Whole:
    """uvicorn's connection during one answer, whose header and body it writes one after the other: here both at once.

    HAProxy sends what a killed replica had in hand to another, unless it has read a header: between the two writes an
    answer would be lost.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held, self._is_first = b"", True

    def write(self, data: bytes) -> None:
        self._held += data
        if not self._is_first:
            self.flush()
        self._is_first = False

    def flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


def _at_once(receive: Receive, send: Send) -> Send:
    """uvicorn's `send`, but an answer's header waits for its body; behind another server it is `send` itself."""
    connection = _connection(receive)
    transport = getattr(connection, "transport", None)
    if transport is None:
        return send

    async def send_whole(message: Message) -> None:
        if message["type"] == "http.response.start":
            connection.transport = _Whole(transport)
        await send(message)
        if message["type"] == "http.response.body":
            connection.transport.flush()

    return send_whole


class _CleanScope:
    """Routes by the canonical path, and keeps from Serve the headers that it would read and clients may not set.

    They would change the service's time limit or a replica's choice, and a byte in them that is no UTF-8 fails the
    request before it gets here. A request id of plain characters is kept, and echoed by Serve. A client that leaves is
    noticed by asking its connection, when the request's turn comes.
    """

    SERVES_OWN = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id"})
    # Serve would watch every connection with two tasks of its own, a tenth of a short request's time.
    UNWATCHED = (b"x-request-disconnect-disabled", b"?1")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = canonical(scope["path"])
            scope["headers"] = [(name, value) for name, value in scope["headers"] if self._may_pass(name, value)]
            scope["headers"].append(self.UNWATCHED)
            _received_by.set(receive)
            send = _at_once(receive, send)
        await self._app(scope, receive, send)

    def _may_pass(self, name: bytes, value: bytes) -> bool:
        if name == b"x-request-id":
            return value.isascii()
        return name not in self.SERVES_OWN and not name.startswith((b"serve-multiplexed", b"serve_multiplexed"))


def middlewares() -> list[Middleware]:
    """What Serve puts around its own reading of a request (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(_CleanScope)]


def canonical(path: str) -> str:
    """The path that a client means whose base URL lacks `/v1`, has it twice, or has a slash too many.

    >>> canonical("//v1/v1/embeddings/"), canonical("/embeddings")
    ('/v1/embeddings', '/v1/embeddings')
    """
    path = re.sub(r"/{2,}", "/", path)
    if len(path) > 1:
        path = path.rstrip("/")
    if path.startswith(("/embeddings", "/models")):
        return f"/v1{path}"
    return path.removeprefix("/v1") if path.startswith("/v1/v1/") else path
