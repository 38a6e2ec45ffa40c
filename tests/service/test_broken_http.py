"""What no client library sends, over raw sockets: broken HTTP, wrong lengths, huge headers, halves of requests, noise.

Whatever comes in, the service answers no 5xx, its processes live on and hold no more than before, and who sends right
requests meanwhile gets right answers. `BROKEN_REQUESTS=100000` sends as many; each run draws others and names its
seed.
"""

import asyncio
import json
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random, SystemRandom

import numpy as np
import psutil
import pytest

from loadtest.meter import ray_role, tree
from tests.model import MODEL
from tests.service.conftest import Service

pytestmark = pytest.mark.service

REQUESTS = int(os.environ.get("BROKEN_REQUESTS", "4000"))
TOGETHER = 24
# One request in so many is right, and has to be answered with the vector of its text.
RIGHT_EVERY = 20
# After this long without a byte a connection is given up: HAProxy waits longer for the rest of a request.
PATIENCE_S = 0.3
ANSWER_S = 30.0
STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
# Memory and files that the fuzzed processes may hold more of at the end than after the first tenth.
GROWTH_MB, GROWTH_FILES = 40.0, 32

Parts = tuple[bytes, list[bytes], bytes]  # the request line, the headers, and the body
Change = Callable[[Random, Parts], bytes]


def right(encoding: str = "float") -> Parts:
    """A request as it should be."""
    body = json.dumps({"model": MODEL, "input": "red shoes", "encoding_format": encoding}).encode()
    headers = [b"host: service", b"content-type: application/json", b"content-length: %d" % len(body)]
    return b"POST /v1/embeddings HTTP/1.1", headers, body


def joined(line: bytes, headers: list[bytes], body: bytes, end: bytes = b"\r\n") -> bytes:
    return end.join([line, *headers, b"", b""]) + body


def noise(chance: Random, parts: Parts) -> bytes:
    return chance.randbytes(chance.choice([1, 7, 60, 2_000, 40_000]))


def other_line(chance: Random, parts: Parts) -> bytes:
    """Another method, target or version."""
    methods = [b"GET", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"PATCH", b"post", b"P\x00ST", b""]
    targets = [b"/", b"*", b"//", b"/v1/../v1/embeddings", b"/%00", b"/%zz", b"/\xff", b"http://other/v1/models", b""]
    targets += [b"/" + b"a" * size for size in (1_000, 9_000, 20_000)] + [b"/v1/models/" + b"%2e%2e/" * 40, b"/v1/ x"]
    targets += [b"/-/healthz", b"/-/routes", b"/v1/embeddings?" + b"a=b&" * 900, b"service:443", b"/docs", b"/readyz"]
    versions = [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2", b"HTTP/0.9", b"HTTP/9.9", b"HTTP/1.11", b"http/1.1", b"", b"\x00"]
    line = b" ".join((chance.choice(methods), chance.choice(targets), chance.choice(versions)))
    return joined(line, parts[1], parts[2])


def wrong_length(chance: Random, parts: Parts) -> bytes:
    """Content-length and transfer-encoding that are false, doubled, at odds with each other, or no numbers."""
    line, headers, body = parts
    size = len(body)
    lengths = [0, 1, size - 1, size + 1, size + 5_000, -1, 2**31, 2**32 + size, 2**63, 2**64 + size, 10**30]
    written = [b"%d" % length for length in lengths] + [
        b"",
        b"abc",
        b"0x10",
        b"+%d" % size,
        b"1e2",
        b"%d, %d" % (size, 1),
    ]
    codings = [
        b"chunked",
        b"chunked, chunked",
        b"gzip, chunked",
        b"chunked, identity",
        b"xchunked",
        b" chunked",
        b"\x0bchunked",
    ]
    kept = [each for each in headers if not each.startswith(b"content-length") or chance.random() < 0.3]
    added = [b"content-length: " + chance.choice(written) for _ in range(chance.randint(0, 2))]
    if chance.random() < 0.5:
        added.append(b"transfer-encoding: " + chance.choice(codings))
    return joined(line, kept + added, chance.choice([body, chunked(chance, body)]))


def chunked(chance: Random, body: bytes) -> bytes:
    """The body in chunks, most of whose sizes are true."""
    sent, place = b"", 0
    while place < len(body):
        piece = body[place : place + chance.choice([1, 10, 60, 500])]
        place += len(piece)
        size = chance.choice(
            [b"%x" % len(piece)] * 8 + [b"-1", b"g", b"", b"f" * 17, b"%X;a=b" % len(piece), b"ffffffff"]
        )
        sent += size + chance.choice([b"\r\n"] * 9 + [b"\n"]) + piece + chance.choice([b"\r\n"] * 9 + [b""])
    return sent + chance.choice([b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"0\r\n", b"", b"00000000000000000\r\n\r\n"])


def in_chunks(chance: Random, parts: Parts) -> bytes:
    line, headers, body = parts
    kept = [each for each in headers if not each.startswith(b"content-length")]
    return joined(line, [*kept, b"transfer-encoding: chunked"], chunked(chance, body))


def odd_headers(chance: Random, parts: Parts) -> bytes:
    """Headers too long, too many, doubled, or against their grammar."""
    line, headers, body = parts
    odd = [b"x: " + b"a" * size for size in (5_000, 15_000, 17_000, 200_000)]
    odd += [
        b"x" * 9_000 + b": 1",
        b"no colon",
        b": no name",
        b"sp ace: 1",
        b"x : 1",
        b"x: \x00",
        b"x: \x01\x7f\xff",
        b" fold",
    ]
    odd += [
        b"host: other",
        b"host: a b",
        b"connection: upgrade\r\nupgrade: websocket",
        b"expect: 100-continue",
        b"expect: x",
    ]
    odd += [
        b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: eHh4eHh4eHh4eHh4"
    ]
    odd += [b"connection: close, keep-alive", b"content-type: text/plain", b"\r\n" * 5, b"te: \xff", b"range: bytes=9-"]
    odd += [
        b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\nupgrade: h2c",
        b"authorization: Basic \xff",
        b"cookie: " + b"a=b;" * 900,
    ]
    added = [chance.choice(odd) for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.2:
        added += [b"x-%d: y" % number for number in range(chance.choice([90, 110, 900]))]
    mixed = headers + added
    chance.shuffle(mixed)
    return joined(line, mixed, body, chance.choice([b"\r\n"] * 6 + [b"\n", b"\r", b"\n\r"]))


def cut_off(chance: Random, parts: Parts) -> bytes:
    whole = joined(*parts)
    return whole[: chance.randrange(len(whole))]


def flipped(chance: Random, parts: Parts) -> bytes:
    """A few bytes changed, removed or added anywhere."""
    sent = bytearray(joined(*parts))
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(sent))
        sent[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
    return bytes(sent)


def pipelined(chance: Random, parts: Parts) -> bytes:
    """Several requests at once, right and wrong ones."""
    changes = [odd_headers, flipped, in_chunks, lambda _, parts: joined(*parts)]
    return b"".join(chance.choice(changes)(chance, parts) for _ in range(chance.randint(2, 5)))


def other_protocol(chance: Random, parts: Parts) -> bytes:
    """The first bytes of TLS, HTTP/2, PROXY, SSH and Redis clients."""
    greetings = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00",
    ]
    greetings += [
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c",
        b"SSH-2.0-x\r\n",
        b"*1\r\n$4\r\nPING\r\n",
    ]
    return chance.choice(greetings) + chance.choice([b"", joined(*parts)])


CHANGES: list[Change] = [
    *(noise, other_line, wrong_length, wrong_length, in_chunks, odd_headers, odd_headers, cut_off, flipped, flipped),
    *(pipelined, other_protocol),
]


async def exchange(service: Service, sent: bytes, pieces: int, chance: Random, patience_s: float) -> bytes:
    """Send in pieces, and read until the other side closes or says nothing more; then end it in one of three ways."""
    _, port = service.url.rsplit(":", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    came = b""
    with suppress(OSError, TimeoutError):  # the service may close at any byte
        size = max(1, -(-len(sent) // pieces))
        for place in range(0, len(sent), size):
            writer.write(sent[place : place + size])
            await writer.drain()
            if pieces > 1:
                await asyncio.sleep(0)
        if chance.random() < 0.3:
            writer.write_eof()
        while part := await asyncio.wait_for(reader.read(1 << 16), patience_s):
            came += part
    if chance.random() < 0.3:  # a reset instead of an orderly end
        linger = struct.pack("ii", 1, 0)
        with suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    return came


async def embedded(service: Service) -> np.ndarray:
    """The vector that a right request gets on a connection of its own."""
    line, headers, body = right()
    _, port = service.url.rsplit(":", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    async with asyncio.timeout(ANSWER_S):
        writer.write(joined(line, [*headers, b"connection: close"], body))
        head, _, content = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 "), head[:200]
    return np.array(json.loads(content)["data"][0]["embedding"], np.float32)


def held(service: Service) -> dict[int, tuple[str, float, int]]:
    """Role, memory of its own in MB and open files of each process on a request's way."""
    found = {}
    for process in tree(service.process.pid):
        with suppress(psutil.Error):
            role = ray_role(" ".join(process.cmdline()))
            if role in ("haproxy", "ingress", "tokenizer", "model"):
                found[process.pid] = (role, process.memory_full_info().uss / 1e6, process.num_fds())
    return found


async def test_broken_http_breaks_nothing(service: Service) -> None:
    seed = int(os.environ.get("BROKEN_SEED", SystemRandom().randrange(2**32)))
    print(f"seed {seed}")
    log_start = len(service.log.read_text())
    known = await embedded(service)
    seen = Counter[str]()
    faults: dict[str, bytes] = {}

    async def work(worker: str, count: int) -> None:
        chance = Random(f"{seed} {worker}")
        for number in range(count):
            if number % RIGHT_EVERY == 0:
                vector = await embedded(service)
                assert float(vector @ known) > 0.999, f"seed {seed}: a wrong vector"
                seen["right"] += 1
                continue
            change = chance.choice(CHANGES)
            sent = change(chance, right(chance.choice(["float", "base64"])))
            came = await exchange(service, sent, chance.choice([1, 1, 1, 2, 9]), chance, PATIENCE_S)
            for status in STATUS_LINE.findall(came) or [b"none"]:
                seen[status.decode()] += 1
                if status.startswith(b"5"):
                    faults.setdefault(f"{change.__name__} {status.decode()}", sent[:600] + b" -> " + came[:600])

    async def send(part: str, count: int) -> None:
        await asyncio.gather(*(work(f"{part} {worker}", count // TOGETHER) for worker in range(TOGETHER)))

    await send("before", max(TOGETHER, REQUESTS // 10))
    await asyncio.sleep(2)
    before = held(service)
    await send("then", REQUESTS)
    await asyncio.sleep(2)  # until all that was left open is closed
    after = held(service)
    print(dict(seen.most_common()))
    assert not faults, f"seed {seed}: {faults}"
    assert seen["200"] > 0 and seen["400"] > REQUESTS // 10, seen
    # HAProxy has another process after each change of what it routes to, and is held by the rest.
    lasting = {pid for pid, (role, _, _) in before.items() if role != "haproxy"}
    assert lasting <= after.keys(), f"seed {seed}: {before} are now {after}"
    for pid, (role, memory_mb, files) in after.items():
        if pid not in before:
            continue
        print(f"{role}: {before[pid][1]:.1f} MB then, {memory_mb:.1f} MB now; {before[pid][2]} files then, {files} now")
        assert memory_mb - before[pid][1] < GROWTH_MB, f"seed {seed}: the {role} holds more memory"
        assert files - before[pid][2] < GROWTH_FILES, f"seed {seed}: the {role} holds more files"
    log = service.log.read_text()[log_start:]
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
