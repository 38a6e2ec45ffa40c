"""Request bodies as they come in: a limit for each, and one for all that are held at once."""

from types import TracebackType

from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve_app.errors import Overloaded

# Of the largest bodies that are allowed, so many may be held at once: 256 MiB by default.
LARGEST_AT_ONCE = 16
# What is never refused for what others hold, so that who sends large bodies slowly keeps no short query out. There are
# few enough: Serve passes on 4,096 requests at once.
SMALL_BYTES = 65_536
RETRY_S = 5.0


class Bodies:
    """What the bodies of all requests in hand take together; at most `limit_bytes` each."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class Body:
    """The body of one request, which counts among `bodies` until this context is left."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._size_bytes = 0

    def __enter__(self) -> "Body":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bodies.held_bytes -= self._size_bytes

    async def read(self, request: Request) -> bytes:
        """All of it.

        Raises HTTPException of status 413 by its declared length before any of it is read, else as soon as it passes
        the limit, or of 415 if it is not said to be JSON; Overloaded if all bodies together are too much.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"Unsupported content type: {kind[:80]!r}. Send 'application/json'.")
        declared = request.headers.get("content-length", "")
        self._hold_limit(int(declared[:20]) if declared.isdecimal() else 0)
        most_bytes = LARGEST_AT_ONCE * self._bodies.limit_bytes
        chunks: list[bytes] = []
        async for chunk in request.stream():
            self._size_bytes += len(chunk)
            self._bodies.held_bytes += len(chunk)
            self._hold_limit(self._size_bytes)
            if self._bodies.held_bytes > most_bytes and self._size_bytes > SMALL_BYTES:
                raise Overloaded(
                    f"The requests in hand have {self._bodies.held_bytes} bytes, the limit is {most_bytes}; try again "
                    "later.",
                    RETRY_S,
                )
            chunks.append(chunk)
        return b"".join(chunks)

    def _hold_limit(self, size_bytes: int) -> None:
        if size_bytes > (limit_bytes := self._bodies.limit_bytes):
            raise HTTPException(
                413, f"The body is over the limit of {limit_bytes} bytes: it has at least {size_bytes}."
            )
