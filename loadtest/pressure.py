"""`python -m loadtest.pressure`: what a few users notice of many: long lists, ten times too much, a thousand slow ones.

lists      people who type, beside indexers whose lists hold 2,048 texts
overload   ten times what the service can do, each request with two seconds' time; the engine sleeps, so that the
           cores are left to those who ask and refuse
slow       people who type, beside a thousand connections that never finish their request
"""

import argparse
import asyncio
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml

from loadtest.endurance import memory_by_role
from loadtest.growth import config
from loadtest.systems import systems
from loadtest.workload import CELLS, body, requests

HOST, PORT = "127.0.0.1", 8000
HEAD = "POST /v1/embeddings HTTP/1.1\r\nhost: service\r\ncontent-type: application/json\r\n"
TYPISTS, KEYSTROKE_S = 8, 0.2
INDEXERS = 2
ROUNDS = 3
OVERLOAD = 10
DEADLINE_MS = 2_000
SLEEPING_BATCH_TOKENS = 128  # take it 0.13 s, nearly as long as 1,280 take one core
SLOW = 1_000
TRICKLE_S = 5.0
# What counts as recovered: an answer within this many times the median of the idle service.
RECOVERED, RECOVERY_TIMEOUT_S = 2.0, 60.0


@dataclass
class Answers:
    """What came of requests: seconds of those that were answered with vectors, and of all others by status."""

    right_s: list[float] = field(default_factory=list)
    other_s: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        (self.right_s if status == 200 else self.other_s.setdefault(status, [])).append(seconds)


class Connection:
    """Sends one request at a time over one connection; status 0 is a connection that broke."""

    def __init__(self) -> None:
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, sent: bytes, headers: str = "") -> int:
        try:
            # Closed while it was idle, as when HAProxy is given other replicas: every client opens another one then.
            if self._streams is None or self._streams[0].at_eof():
                self._streams = await asyncio.open_connection(HOST, PORT)
            reader, writer = self._streams
            writer.write(f"{HEAD}{headers}content-length: {len(sent)}\r\n\r\n".encode() + sent)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            await reader.readexactly(size)
            return int(head[9:12])
        except (OSError, ValueError, asyncio.IncompleteReadError):
            self.close()
            return 0

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def bodies(shape: str) -> list[bytes]:
    cell = next(cell for cell in CELLS if cell.shape == shape)
    return [body(texts, "base64").encode() for texts in requests(cell)]


async def closed(sent: Sequence[bytes], users: int, seconds: float, pause_s: float = 0.0) -> Answers:
    """Users who ask, wait for the answer and then, where there is a pause, for some time of about that length."""
    answers, until = Answers(), time.perf_counter() + seconds

    async def user(number: int) -> None:
        connection, chance = Connection(), random.Random(number)
        while True:
            if pause_s:
                await asyncio.sleep(chance.expovariate(1 / pause_s))
            started = time.perf_counter()
            if started >= until:
                break
            answers.add(await connection.ask(chance.choice(sent)), time.perf_counter() - started)
        connection.close()

    await asyncio.gather(*map(user, range(users)))
    return answers


async def opened(sent: Sequence[bytes], per_s: float, seconds: float) -> Answers:
    """Requests that come at a rate, whatever becomes of those before, each with its deadline."""
    answers, chance = Answers(), random.Random(0)
    idle: list[Connection] = []
    started = time.perf_counter()
    headers = f"x-deadline-ms: {DEADLINE_MS}\r\n"

    async def ask(due: float) -> None:
        connection = idle.pop() if idle else Connection()
        answers.add(await connection.ask(chance.choice(sent), headers), time.perf_counter() - due)
        idle.append(connection)

    due = started
    async with asyncio.TaskGroup() as asking:
        while (due := due + chance.expovariate(per_s)) < started + seconds:
            if (left_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(left_s)
            asking.create_task(ask(due))
    for connection in idle:
        connection.close()
    return answers


def p(share: float, seconds: Sequence[float]) -> float:
    """A percentile in milliseconds."""
    return float(np.percentile(seconds, share)) * 1e3 if seconds else float("nan")


def typing(sent: Sequence[bytes], seconds: float) -> Awaitable[Answers]:
    return closed(sent, TYPISTS, seconds, KEYSTROKE_S)


def index(seconds: float) -> float:
    """Lists/s of the indexers; blocks."""
    began = time.perf_counter()
    answers = asyncio.run(closed(bodies("2048x16w"), INDEXERS, seconds))
    assert not answers.other_s, answers.other_s.keys()
    return len(answers.right_s) / (time.perf_counter() - began)


async def beside_lists(seconds: float) -> None:
    # In a process of their own: an answer of 4 MB would keep the clock of those who type from being read.
    with ProcessPoolExecutor(1, get_context("spawn")) as indexers:
        await _beside_lists(seconds, partial(asyncio.get_running_loop().run_in_executor, indexers, index))


async def _beside_lists(seconds: float, indexing: Callable[[float], Awaitable[float]]) -> None:
    short = bodies("9w")
    await asyncio.gather(typing(short, 3), indexing(3))
    print("| round | typists alone p50, p99 ms | beside lists p50, p99 ms | lists/s alone | beside typists |")
    print("|---|---|---|---|---|")
    ratios, kept = [], []
    for number in range(1, ROUNDS + 1):
        alone = await typing(short, seconds)
        alone_per_s = await indexing(seconds)
        typed, beside_per_s = await asyncio.gather(typing(short, seconds), indexing(seconds))
        for answers in (alone, typed):
            assert not answers.other_s, answers.other_s.keys()
        ratios.append(p(99, typed.right_s) / p(99, alone.right_s))
        kept.append(beside_per_s / alone_per_s)
        shown = [f"{p(50, each.right_s):.1f}, {p(99, each.right_s):.1f}" for each in (alone, typed)]
        print(f"| {number} | {shown[0]} | {shown[1]} | {alone_per_s:.2f} | {beside_per_s:.2f} |", flush=True)
    print(
        f"\nMedians: p99 of typing {statistics.median(ratios):.2f} times that alone; lists keep "
        f"{statistics.median(kept):.0%} of their throughput.\n"
    )


async def overload(seconds: float, root: int) -> None:
    sent = bodies("9w")
    idle = await closed(sent, 1, 5)
    full = await closed(sent, 64, 10)
    capacity = len(full.right_s) / 10
    before = sum(memory_by_role(root).values())
    answers = await opened(sent, OVERLOAD * capacity, seconds)
    after = sum(memory_by_role(root).values())
    ended = time.perf_counter()
    connection = Connection()
    while True:  # as many answers in a row as tell that it is no luck
        started = time.perf_counter()
        statuses = [await connection.ask(sent[0]) for _ in range(5)]
        if statuses == [200] * 5 and (time.perf_counter() - started) / 5 < RECOVERED * p(50, idle.right_s) / 1e3:
            break
        if started - ended > RECOVERY_TIMEOUT_S:
            raise SystemExit(f"pressure: {RECOVERY_TIMEOUT_S:.0f} s after the overload the service is not as before")
    connection.close()
    others = ", ".join(
        f"{len(took)} x {status} (p50 {p(50, took):.0f}, p99 {p(99, took):.0f} ms)"
        for status, took in sorted(answers.other_s.items())
    )
    late = sum(took > DEADLINE_MS / 1e3 for took in answers.right_s)
    per_s = len(answers.right_s) / seconds
    print(f"- capacity: {capacity:.1f} requests/s at 64 connections; {OVERLOAD} times that came for {seconds:.0f} s")
    print(f"- answered: {per_s:.1f} a second, {per_s / capacity:.0%} of it, {late} of them after {DEADLINE_MS} ms;")
    print(f"  p50 {p(50, answers.right_s):.0f} ms, p99 {p(99, answers.right_s):.0f} ms")
    print(f"- not answered: {others or 'none'}")
    print(f"- memory of all processes: {before:.0f} MB before, {after:.0f} MB at the end")
    print(f"- recovered {started - ended:.2f} s after the end\n")


async def beside_slow(seconds: float) -> None:
    short = bodies("9w")
    await typing(short, 3)
    alone = await typing(short, seconds)
    writers: list[asyncio.StreamWriter] = []
    all_hang = asyncio.Event()

    async def hang(number: int) -> None:
        """A request that is never finished: half of its head, its head alone, or a byte of its body now and then."""
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, PORT)
            writers.append(writer)
            if len(writers) == SLOW:
                all_hang.set()
            writer.write(f"{HEAD}content-length: 1000\r\n".encode()[: 40 if number % 3 == 0 else None])
            if number % 3:
                writer.write(b"\r\n")
            while number % 3 == 2:
                await asyncio.sleep(TRICKLE_S)
                writer.write(b"{")
            await reader.read()

    hanging = [asyncio.create_task(hang(number)) for number in range(SLOW)]
    await all_hang.wait()
    beside = await typing(short, seconds)
    open_still = sum(not task.done() for task in hanging)
    for task in hanging:
        task.cancel()
    for writer in writers:
        writer.close()
    assert not alone.other_s and not beside.other_s, (alone.other_s.keys(), beside.other_s.keys())
    print(f"- alone: p50 {p(50, alone.right_s):.1f} ms, p99 {p(99, alone.right_s):.1f} ms")
    print(f"- beside {SLOW} slow connections: p50 {p(50, beside.right_s):.1f} ms, p99 {p(99, beside.right_s):.1f} ms")
    ratio = p(99, beside.right_s) / p(99, alone.right_s)
    print(f"- p99 {ratio:.2f} times that alone; {open_still} of the connections were still open at the end\n")


def main() -> None:
    """Run what is asked for, and print Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.pressure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=("lists", "overload", "slow"), default=["lists", "overload", "slow"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part of a round")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the slow connections are files of this process
    print(f"`python -m loadtest.pressure {' '.join(options.what)}`\n")
    with tempfile.TemporaryDirectory(prefix="pressure-") as scratch:
        folder = Path(scratch)
        ours = systems(folder)["ours"]
        asleep = folder / "sleep.yaml"
        sleeping = config(replicas=1)
        sleeping["applications"][0]["args"]["models"][0]["batch_tokens"] = SLEEPING_BATCH_TOKENS
        asleep.write_text(yaml.safe_dump(sleeping))
        for what in options.what:
            system = replace(ours, command=(*ours.command[:-1], str(asleep))) if what == "overload" else ours
            print(f"## {what}\n")
            with system.running(folder) as root:
                if what == "lists":
                    asyncio.run(beside_lists(options.seconds))
                elif what == "overload":
                    asyncio.run(overload(options.overload_seconds, root))
                else:
                    asyncio.run(beside_slow(options.seconds))


if __name__ == "__main__":
    main()
