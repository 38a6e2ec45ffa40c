"""A request before Serve and the routes see it: its path, its headers, and whether its client is there."""

import re
from collections.abc import Callable
from contextvars import ContextVar

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# uvicorn's own `receive`, whose connection knows if the client is there; not in the scope, which Serve may pickle.
_received_by: ContextVar[Receive | None] = ContextVar("_received_by", default=None)


def is_gone() -> Callable[[], bool]:
    """Whether the client has left, by uvicorn's own note of it; always False behind another server."""
    connection = getattr(_received_by.get(), "__self__", None)
    return lambda: getattr(connection, "disconnected", False)


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
