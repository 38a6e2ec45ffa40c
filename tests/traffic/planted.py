"""`python -m tests.traffic.planted FAULT PORT`: an embeddings service of one file, right but for the named fault.

A text's vector is drawn from a generator that the text seeds: of length 1, the same each time, far from every other's.
"""

import asyncio
import base64
import itertools
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import uvicorn

MODEL, DIMENSIONS = "planted", 384
# With `together`, no request is answered before so many of them wait.
TOGETHER = 4
# Every answer takes this long, as a fast service's would; a slow one's every 25th this long.
USUAL_S, SLOW_S = 0.003, 1.5
SLOW_EVERY, ERROR_EVERY, WRONG_EVERY = 25, 100, 3

Items = list[dict[str, Any]]
Fault = Callable[[Items], Items]


def vector(text: str) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """float32 [DIMENSIONS]."""
    drawn = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSIONS)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def encode(values: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> str:
    """As OpenAI's `base64`."""
    return base64.b64encode(values.tobytes()).decode()


def decode(embedding: str) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """What `encode` made of it."""
    return np.frombuffer(base64.b64decode(embedding), np.float32)


def exchange(items: Items) -> Items:
    """The first two vectors change places, while the indexes count on."""
    items[0]["embedding"], items[1]["embedding"] = items[1]["embedding"], items[0]["embedding"]
    return items


def reverse(items: Items) -> Items:
    """The items come in another order, each with its own index."""
    return items[::-1]


def another(items: Items) -> Items:
    """The vector of somebody else's text."""
    return [item | {"embedding": encode(vector("somebody else's"))} for item in items]


def drop(items: Items) -> Items:
    """One vector too few."""
    return items[:-1]


def shorten(items: Items) -> Items:
    """The last vector lacks its last value."""
    items[-1]["embedding"] = encode(decode(items[-1]["embedding"])[:-1])
    return items


def stretch(items: Items) -> Items:
    """The last vector is twice as long."""
    items[-1]["embedding"] = encode(decode(items[-1]["embedding"]) * 2)
    return items


# Done to every WRONG_EVERY-th answer to a list.
WRONG: dict[str, Fault] = {
    "exchanged-vectors": exchange,
    "reversed-items": reverse,
    "another-texts-vector": another,
    "missing-vector": drop,
    "short-vector": shorten,
    "long-vector": stretch,
}


class Service:
    """ASGI."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._numbers = itertools.count(1)
        self._lists = itertools.count(1)
        self._together = asyncio.Barrier(TOGETHER)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            await respond(send, 200, {"data": [{"id": MODEL, "dimensions": DIMENSIONS}]})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self._fault == "together":
            await self._together.wait()
        number = next(self._numbers)
        await asyncio.sleep(SLOW_S if self._fault == "slow-tail" and number % SLOW_EVERY == 0 else USUAL_S)
        if self._fault == "errors" and number % ERROR_EVERY == 0:
            await respond(send, 503, {"error": {"message": "planted", "type": "server_error"}})
            return
        asked = orjson.loads(body)
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        vectors = [encode(vector(text)) for text in texts]
        items: Items = [{"object": "embedding", "index": i, "embedding": each} for i, each in enumerate(vectors)]
        if self._fault in WRONG and len(texts) > 1 and next(self._lists) % WRONG_EVERY == 0:
            items = WRONG[self._fault](items)
        tokens = sum(len(text.split()) + 2 for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await respond(send, 200, {"object": "list", "data": items, "model": MODEL, "usage": usage})


async def respond(send: Any, status: int, content: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": orjson.dumps(content)})


if __name__ == "__main__":
    uvicorn.run(Service(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", lifespan="off")
