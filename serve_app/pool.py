"""The replicas of one deployment, as those who call them see them: which has the least work, and which have gone."""

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from contextvars import Context
from typing import Any

from serve_app.channel import Channel, Endpoint, PeerLost
from serve_app.errors import DeadlineExceeded, EngineBroken, ModelUnavailable

logger = logging.getLogger("ray.serve")

CONNECT_TIMEOUT_S = 3.0
# Times that a call is made at most. Embedding twice is harmless, so what a dying replica had accepted is sent again.
ATTEMPTS = 3
# Repeats that may be made at once, and the share of all calls that may be in the long run: where every replica fails,
# repeats would only double the load.
REPEATS = 100
REPEATS_SHARE = 0.1
# After this long without a sign of life a replica that has calls is asked for one, and given as long to answer.
SILENT_S = 1.0


class Pool:
    """The replicas of one deployment: a call goes to the one with the least work, and to another if that one dies."""

    def __init__(self, name: str, waits: bool = True) -> None:
        """`name`: what errors call the replicas' model; `waits`: a call waits for a replica where there is none."""
        self._name = name
        self._waits = waits
        self._channels: dict[Endpoint, Channel] = {}
        self._wanted: set[Endpoint] = set()
        self._changed = asyncio.Event()
        self._repeats = float(REPEATS)  # that may still be made
        self._watching: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        """Cost of the calls that these replicas have."""
        return sum(channel.load for channel in self._channels.values())

    @property
    def missing(self) -> list[Endpoint]:
        """Of those that were named last, the ones that take no calls."""
        return [each for each in self._wanted if each not in self._channels or not self._channels[each].takes_calls]

    async def update(self, endpoints: Iterable[Endpoint]) -> None:
        """Connect to those of these that are new, and send no more calls to those that are not among them.

        One update at a time.
        """
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), context=Context())
        self._wanted = set(endpoints)
        for endpoint in self._channels.keys() - self._wanted:
            self._channels.pop(endpoint).retire()
        await asyncio.gather(*map(self._add, self.missing))

    async def _add(self, endpoint: Endpoint) -> None:
        if channel := await _connect(endpoint):
            self._channels[endpoint] = channel
            self._changed.set()

    async def _watch(self) -> None:
        """Drop replicas that are there and do nothing, as a stopped process or a host that was cut off: their calls are
        made again at others. Where no other is known to live, they are waited for, if this pool waits."""
        while True:
            await asyncio.sleep(SILENT_S / 2)
            silent = [channel for channel in self._channels.values() if channel.silent_s > SILENT_S]
            alive = await asyncio.gather(*(channel.is_alive(SILENT_S) for channel in silent))
            dead = [channel for channel, lives in zip(silent, alive, strict=True) if not lives]
            if not self._waits or any(
                each.takes_calls and each.silent_s <= SILENT_S for each in self._channels.values()
            ):
                for channel in dead:
                    logger.warning(f"a replica of {self._name} has been silent for {channel.silent_s:.1f} s")
                    channel.transport.abort()

    async def call(self, method: str, job: Any, cost: int, deadline: float) -> Any:
        """The answer of a replica; raises DeadlineExceeded, ModelUnavailable, or the replica's own EmbeddingError."""
        lost: list[Channel] = []
        self._repeats = min(REPEATS, self._repeats + REPEATS_SHARE)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while len(lost) < ATTEMPTS:
                    channel = await self._least_loaded(lost)
                    try:
                        return await channel.call(method, job, cost, deadline - time.monotonic())
                    except (PeerLost, EngineBroken) as error:
                        logger.warning(f"a replica of {self._name} was lost with a call in flight: {error}")
                        if channel.takes_calls:  # it fails at once: it would always be the one with the least work
                            channel.retire()
                        lost.append(channel)
                        if self._repeats < 1:
                            raise ModelUnavailable(f"The model `{self._name}` loses too many replicas.") from None
                        self._repeats -= 1
        except TimeoutError:
            raise DeadlineExceeded(f"No replica of `{self._name}` answered in time.") from None
        raise ModelUnavailable(f"The model `{self._name}` lost {ATTEMPTS} replicas in a row; try again.")

    async def _least_loaded(self, lost: list[Channel]) -> Channel:
        while True:
            candidates = [each for each in self._channels.values() if each.takes_calls and each not in lost]
            if candidates:
                return min(candidates, key=lambda channel: (channel.load, random.random()))
            if not self._waits:
                raise ModelUnavailable(f"No replica of `{self._name}` can be reached; try again.")
            self._changed.clear()
            await self._changed.wait()


async def _connect(endpoint: Endpoint) -> Channel | None:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, channel = await asyncio.get_running_loop().create_connection(
                lambda: Channel(endpoint), endpoint.host, endpoint.port
            )
            return channel
    except (OSError, TimeoutError) as error:
        logger.warning(f"{endpoint} can't be reached: {type(error).__name__}")
        return None
