"""One request's way from inputs to vectors: tokenize, infer, and back; what the ingress does besides HTTP.

A pipeline serves one model through two remote stages, which it is given as plain async functions. Requests that arrive
while calls are in flight leave together in the next call, and a long list is cut into calls of a budget's size, so that
every replica can work on it and no short text waits behind all of it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from serve_app.answers import Described, Embedded, Served, assemble, deal
from serve_app.errors import EngineError, InvalidInput, ModelUnavailable, Overloaded, TooManyTokens
from serve_app.packing import (
    ClientIds,
    Float32,
    Frame,
    Packed,
    Tokenized,
    accept_ids,
    concat,
    cuts,
    join,
    reorder,
    split,
)
from serve_app.scheduler import Entry, Scheduler, Slots
from serve_app.settings import ModelSettings

T = TypeVar("T")

# Characters of a request's texts up to which it is tokenized here, by 0.7 ms of looking words up: a call costs this
# replica and a tokenizer as much. And how many of them may be new, at 1 to 3 ms.
SHORT_CHARACTERS, NEW_CHARACTERS = 16_384, 1_024
# Characters of text in one call to a tokenizer: 2 ms of its work where it knows the words, else some 10.
CALL_CHARACTERS = 32_768
# Calls that are on their way to a stage at once, beyond one for each that its replicas can work on: none, so that all
# that arrives meanwhile leaves together, in one large batch, when one comes back. On two cores one in flight gave 317
# requests/s at 8 connections and two gave 244. Full calls gain nothing by waiting, so one more may go ahead of each
# that a model works on, which so never idles; all else stays here, where a new replica can take it. Calls to tokenizers
# are soon over.
FULL_CALLS_A_LANE = 2
FULL_CALLS_TO_TOKENIZERS = 64
# Turns of the event loop between the answer of the only call and the next call: in one the answers are rendered, in the
# next what came meanwhile is read, then it is parsed, then it leaves. Else those who were answered and those who waited
# stay apart and take turns: with 8 connections calls of two texts and of six, and 13 % fewer answers. 1 and 2 turns
# gained nothing there, 4 to 64 the same.
TURNS = 4
# Most tokens that are held for a model, in 64 MB: while it sleeps or starts, nobody can tell how long it will take.
MAX_HELD_TOKENS = 16_000_000
HELD_RETRY_S = 10.0
# Share of the time until its deadline that a request may be expected to wait: some wait longer than most.
HEADROOM = 0.75
# Of English text, by which a request is judged before it is tokenized.
CHARACTERS_A_TOKEN = 4
# How long replicas may take to say what they serve, and to embed a text on trial.
DISCOVERY_TIMEOUT_S = 5.0
# Times that a request is computed again while replicas of new weights take the place of old ones.
ROLLOUT_TRIES = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """Vectors in the order of the inputs, with all that the response says of them; times in milliseconds."""

    vectors: Float32
    tokens: int
    truncated: int
    fingerprint: str
    tokenize_ms: float
    queue_ms: float
    infer_ms: float


class Stages(Protocol):
    """The remote stages of one model; each raises an EmbeddingError, and never waits past its deadline."""

    async def describe(self, deadline: float) -> Described: ...

    async def tokenize(self, texts: Sequence[str], deadline: float) -> Tokenized: ...

    async def infer(self, packed: Packed, deadline: float, is_bulk: bool = False) -> Embedded: ...


class Pipeline:
    """Embeds inputs with one model."""

    def __init__(self, settings: ModelSettings, stages: Stages, max_request_tokens: int) -> None:
        self.settings = settings
        self._described: Described | None = None  # what the replicas said last
        self.is_described = asyncio.Event()  # whether they said anything yet
        self._discovery: asyncio.Task[Described] | None = None
        self._trial: asyncio.Task[None] | None = None
        self._stages = stages
        self._max_request_tokens = max_request_tokens
        self._tokenizing: Scheduler[Sequence[str], Tokenized] = Scheduler(
            self._tokenize_together, CALL_CHARACTERS, full_concurrency=FULL_CALLS_TO_TOKENIZERS
        )
        # Requests of no more tokens than one text may have, and longer ones.
        self._short, self._long = (
            Scheduler[Packed, Embedded](partial(self._infer_together, is_bulk), settings.batch_tokens, turns=TURNS)
            for is_bulk in (False, True)
        )

    @property
    def served(self) -> Served | None:
        """What the replicas said last that they serve; None until they did."""
        return self._described.served if self._described else None

    @property
    def is_asleep(self) -> bool:
        """Whether the model has no replica because it needs none; the next request starts one."""
        return self._described is not None and not self._described.models

    @property
    def queues(self) -> tuple[Sequence[Scheduler[Any, Any]], Sequence[Scheduler[Any, Any]]]:
        """What waits for the tokenizers, in characters, and for the models, in tokens."""
        return (self._tokenizing,), (self._short, self._long)

    async def discover(self, deadline: float) -> Described:
        """Ask the replicas what they serve; raises ModelUnavailable while none can say. All who ask at once share."""
        self._discovery = _shared(self._discovery, self._discover)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.shield(self._discovery)
        except TimeoutError:
            raise ModelUnavailable(f"The replicas of `{self.settings.id}` did not answer in time.") from None

    async def _discover(self) -> Described:
        self._described = found = await self._stages.describe(time.monotonic() + DISCOVERY_TIMEOUT_S)
        self.is_described.set()
        self._tokenizing.slots.workers = max(1, found.tokenizers)
        workers, lanes, least = max(1, found.models), found.served.lanes, found.served.lane_tokens
        for queue in (self._short, self._long):
            queue.slots = Slots(self.settings.batch_tokens, workers, lanes, least, workers * lanes * FULL_CALLS_A_LANE)
            queue.pace.told = found.tokens_per_s
        return found

    async def embed(
        self,
        inputs: Sequence[str] | ClientIds,
        deadline: float,
        refuse_truncation: bool = False,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Vectors of the inputs, in their order; `deadline` in `time.monotonic()` seconds.

        Raises InvalidInput for what this model can't take, TooManyTokens, Overloaded, DeadlineExceeded, CallerGone, or
        the stages' own faults.
        """
        described = self._described or await self.discover(deadline)
        self._admit(inputs, described.served.max_tokens, deadline)
        started = time.perf_counter()
        if isinstance(inputs, ClientIds):
            tokenized = accept_ids(inputs, described.frame)
        else:
            tokenized = await self._tokenize(inputs, described, deadline, is_gone)
        self._hold_limits(tokenized, described.frame, refuse_truncation)
        tokenize_ms = (time.perf_counter() - started) * 1e3
        started = time.perf_counter()
        whole = await self._infer(tokenized.packed, described.served, deadline, is_gone)
        return Answer(
            vectors=whole.vectors,
            tokens=tokenized.packed.tokens,
            truncated=tokenized.truncated,
            fingerprint=whole.fingerprint,
            tokenize_ms=tokenize_ms,
            queue_ms=max(0.0, (time.perf_counter() - started) * 1e3 - whole.infer_ms),
            infer_ms=whole.infer_ms,
        )

    async def try_out(self) -> None:
        """Embed a short text that is not counted as work, unless that would wake the model; raises as `embed` does. All
        who ask at once share, so that however many they are they take no more than one connection's work."""
        self._trial = _shared(self._trial, self._try_out)
        await asyncio.shield(self._trial)

    async def _try_out(self) -> None:
        deadline = time.monotonic() + DISCOVERY_TIMEOUT_S
        described = self._described or await self.discover(deadline)
        if not self.is_asleep:
            text = await self._tokenize(["ready?"], described, deadline, lambda: False)
            await self._stages.infer(text.packed, deadline)

    def _admit(self, inputs: Sequence[str] | ClientIds, max_tokens: int, deadline: float) -> None:
        """Before any work is done on them: raises Overloaded for inputs whose answer would come too late."""
        held = self._short.unfinished_cost + self._long.unfinished_cost
        if held > MAX_HELD_TOKENS:
            raise Overloaded(f"{held} tokens wait, the limit is {MAX_HELD_TOKENS}; try again later.", HELD_RETRY_S)
        if isinstance(inputs, ClientIds):
            tokens = float(np.minimum(inputs.lengths, max_tokens).sum())
        else:
            tokens = sum(min(len(text) / CHARACTERS_A_TOKEN, max_tokens) for text in inputs)
        queue = self._short if tokens <= max_tokens else self._long
        wait_s = self._tokenizing.wait_s + queue.wait_s
        left_s = max(0.0, deadline - time.monotonic())
        if wait_s > left_s * HEADROOM:
            raise Overloaded(
                f"What waits before this request takes about {wait_s:.1f} s, too long to answer it within "
                f"{left_s:.1f} s; try again later.",
                wait_s - left_s * HEADROOM,
            )

    def _hold_limits(self, tokenized: Tokenized, frame: Frame, refuse_truncation: bool) -> None:
        if refuse_truncation and tokenized.truncated:
            row = int(np.argmax(tokenized.full_lengths > tokenized.packed.lengths))
            raise InvalidInput(
                f"This model's maximum context length is {frame.max_tokens} tokens, however input {row} has at least "
                f"{int(tokenized.full_lengths[row])}. Shorten it, or leave out 'truncate' to have it cut.",
                "input",
            )
        if tokenized.packed.tokens > self._max_request_tokens:
            raise TooManyTokens(tokenized.packed.tokens, self._max_request_tokens)

    async def _tokenize(
        self, texts: Sequence[str], described: Described, deadline: float, is_gone: Callable[[], bool]
    ) -> Tokenized:
        sizes = list(map(len, texts))
        if sum(sizes) <= SHORT_CHARACTERS:
            tokenized = described.tokenize(texts, NEW_CHARACTERS)
            if tokenized is not None:
                return tokenized
        edges = cuts(sizes, CALL_CHARACTERS)
        jobs = [
            self._tokenizing.submit(texts[start:stop], sum(sizes[start:stop]), deadline, is_gone)
            for start, stop in pairwise(edges)
        ]
        return join(await _all(jobs))

    async def _infer(self, packed: Packed, served: Served, deadline: float, is_gone: Callable[[], bool]) -> Embedded:
        """All rows by the same weights: those that were known when the request's model was looked up, or others of the
        same model and tokenizer that have taken their place."""
        queue = self._short if packed.tokens <= served.max_tokens else self._long
        # A piece for each batch that the replicas can run at once, with rows of like length together.
        order = np.argsort(-packed.lengths, kind="stable")
        ordered = packed if packed.rows == 1 else reorder(packed, order)
        pieces = split(ordered, self.settings.batch_tokens, queue.slots.pieces(packed.tokens))
        name, tokenizer = served.id, served.tokenizer
        for _ in range(ROLLOUT_TRIES):
            parts = await _all([queue.submit(piece, piece.tokens, deadline, is_gone) for piece in pieces])
            if {part.weights for part in parts} == {served.weights}:
                whole = assemble(parts, order)
                if not np.isfinite(whole.vectors).all():
                    raise EngineError("the engine has no vector for some of the inputs")
                return whole
            served = (await self.discover(deadline)).served  # replicas were replaced
            if (served.id, served.tokenizer) != (name, tokenizer):
                break
        raise ModelUnavailable(f"The replicas of `{name}` are changing to other weights; try again.")

    async def _tokenize_together(self, entries: Sequence[Entry[Sequence[str], Tokenized]]) -> list[Tokenized]:
        texts = [text for entry in entries for text in entry.job]
        whole = await self._stages.tokenize(texts, max(entry.deadline for entry in entries))
        token_ends = np.cumsum(whole.packed.lengths)
        answers, row, token = [], 0, 0
        for entry in entries:
            stop = row + len(entry.job)
            token_stop = int(token_ends[stop - 1])
            packed = Packed(whole.packed.ids[token:token_stop], whole.packed.lengths[row:stop])
            answers.append(Tokenized(packed, whole.full_lengths[row:stop]))
            row, token = stop, token_stop
        return answers

    async def _infer_together(self, is_bulk: bool, entries: Sequence[Entry[Packed, Embedded]]) -> list[Embedded]:
        jobs = [entry.job for entry in entries]
        return deal(await self._stages.infer(concat(jobs), max(entry.deadline for entry in entries), is_bulk), jobs)


def _shared(asking: asyncio.Task[T] | None, ask: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
    """The task that is asking, or a new one; in a context of its own, and to be shielded: it outlives who began it."""
    if asking is None or asking.done():
        asking = asyncio.get_running_loop().create_task(ask(), context=Context())
    return asking


async def _all(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Await all; on the first failure the others are cancelled, so that nothing computes what nobody will read."""
    if len(jobs) == 1:
        return [await jobs[0]]
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        while tasks:  # emptied, since the error's traceback holds the list, and one of these the error
            tasks.pop().cancel()
        raise
