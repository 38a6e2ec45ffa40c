"""One request's way from inputs to vectors: tokenize, infer, and back; what the ingress does besides HTTP.

A pipeline serves one model through two remote stages, which it is given as plain async functions. Requests that arrive
while calls are in flight leave together in the next call, and a long list is cut into calls of a budget's size, so that
every replica can work on it and no short text waits behind all of it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidInput, ModelUnavailable, TooManyTokens
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

# Characters of a request's texts up to which it is tokenized here: about 0.4 ms of work, less than a call costs.
SHORT_CHARACTERS = 1_000
# Characters of text in one call to a tokenizer: about 10 ms of its work.
CALL_CHARACTERS = 32_768
# Calls that are on their way to a stage at once, beyond one for each that its replicas can work on: none, so that all
# that arrives meanwhile leaves together, in one large batch, when one comes back. On two cores one in flight gave 317
# requests/s at 8 connections and two gave 244. Full calls gain nothing by waiting, so one more may go ahead of each
# that a model works on, which so never idles; all else stays here, where a new replica can take it. Calls to tokenizers
# are soon over.
FULL_CALLS_A_LANE = 2
FULL_CALLS_TO_TOKENIZERS = 64
# How long replicas may take to say what they serve.
DISCOVERY_TIMEOUT_S = 5.0
# Times that a request is computed again while replicas of new weights take the place of old ones.
ROLLOUT_TRIES = 3


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a model replica answers: vectors float32 [B, D], by which weights and engine, and its own time."""

    vectors: Float32
    weights: str
    fingerprint: str
    infer_ms: float


@dataclass(frozen=True, slots=True)
class Served:
    """What a model's replicas say of themselves: the model that is really there, and how it is computed."""

    id: str
    created: int  # Unix time in seconds
    origin: str
    engine: str
    precision: str
    device: str
    lanes: int  # batches that one replica's engine runs at once
    dimensions: int
    normalize: bool
    max_tokens: int
    weights: str  # digest of all that decides the vectors but engine and precision
    fingerprint: str
    tokenizer: str  # digest of all that decides the token ids


@dataclass(frozen=True, slots=True)
class Described:
    """A model's replicas at one moment: what they serve, how many there are, and what of it can be done here."""

    served: Served
    frame: Frame
    tokenizers: int
    models: int  # 0 while they are scaled to zero
    tokenize: Callable[[Sequence[str]], Tokenized]  # the tokenizers' own tokenizer, in this process


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

    async def infer(self, packed: Packed, deadline: float) -> Embedded: ...


class Pipeline:
    """Embeds inputs with one model."""

    def __init__(self, settings: ModelSettings, stages: Stages, max_request_tokens: int) -> None:
        self.settings = settings
        self._described: Described | None = None  # what the replicas said last
        self._discovery: asyncio.Task[Described] | None = None
        self._stages = stages
        self._max_request_tokens = max_request_tokens
        self._tokenizing: Scheduler[Sequence[str], Tokenized] = Scheduler(
            self._tokenize_together, CALL_CHARACTERS, full_concurrency=FULL_CALLS_TO_TOKENIZERS
        )
        self._inferring: Scheduler[Packed, Embedded] = Scheduler(self._infer_together, settings.batch_tokens)

    @property
    def served(self) -> Served | None:
        """What the replicas said last that they serve; None until they did."""
        return self._described.served if self._described else None

    @property
    def is_asleep(self) -> bool:
        """Whether the model has no replica because it needs none; the next request starts one."""
        return self._described is not None and not self._described.models

    @property
    def has_backlog(self) -> bool:
        """Whether more waits for the models than one call carries, so that more of them would help."""
        return self._inferring.waiting_cost >= self._inferring.slots.budget

    @property
    def schedulers(self) -> tuple[Scheduler[Any, Any], Scheduler[Any, Any]]:
        """What waits for the tokenizers, in characters, and for the models, in tokens."""
        return self._tokenizing, self._inferring

    async def discover(self, deadline: float) -> Described:
        """Ask the replicas what they serve; raises ModelUnavailable while none can say. All who ask at once share."""
        if self._discovery is None or self._discovery.done():
            # In a context of its own, and shielded: it outlives the request that began it.
            self._discovery = asyncio.get_running_loop().create_task(self._discover(), context=Context())
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.shield(self._discovery)
        except TimeoutError:
            raise ModelUnavailable(f"The replicas of `{self.settings.id}` did not answer in time.") from None

    async def _discover(self) -> Described:
        self._described = found = await self._stages.describe(time.monotonic() + DISCOVERY_TIMEOUT_S)
        self._tokenizing.slots.workers = found.tokenizers
        workers, lanes = max(1, found.models), found.served.lanes
        self._inferring.slots = Slots(self.settings.batch_tokens, workers, lanes, workers * lanes * FULL_CALLS_A_LANE)
        return found

    async def embed(
        self,
        inputs: Sequence[str] | ClientIds,
        deadline: float,
        refuse_truncation: bool = False,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Vectors of the inputs, in their order; `deadline` in `time.monotonic()` seconds.

        Raises InvalidInput for what this model can't take, TooManyTokens, DeadlineExceeded, CallerGone, or the stages'
        own faults.
        """
        described = self._described or await self.discover(deadline)
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

    async def try_out(self, deadline: float) -> None:
        """Embed a short text that is not counted as work, unless that would wake the model; raises as `embed` does."""
        described = self._described or await self.discover(deadline)
        if not self.is_asleep:
            await self._stages.infer(described.tokenize(["ready?"]).packed, deadline)

    def _hold_limits(self, tokenized: Tokenized, frame: Frame, refuse_truncation: bool) -> None:
        if refuse_truncation and tokenized.truncated:
            row = int(np.argmax(tokenized.full_lengths > tokenized.packed.lengths))
            raise InvalidInput(
                f"This model's maximum context length is {frame.max_tokens} tokens, however input {row} has at least "
                f"{int(tokenized.full_lengths[row])}. Shorten it, or leave out 'truncate' to have it cut.",
                "input",
            )
        if tokenized.packed.tokens > self._max_request_tokens:
            raise TooManyTokens(
                f"Requested {tokenized.packed.tokens} tokens, max {self._max_request_tokens} tokens per request",
                "input",
            )

    async def _tokenize(
        self, texts: Sequence[str], described: Described, deadline: float, is_gone: Callable[[], bool]
    ) -> Tokenized:
        sizes = list(map(len, texts))
        if sum(sizes) <= SHORT_CHARACTERS:
            return described.tokenize(texts)
        edges = cuts(sizes, CALL_CHARACTERS)
        jobs = [
            self._tokenizing.submit(texts[start:stop], sum(sizes[start:stop]), deadline, is_gone)
            for start, stop in pairwise(edges)
        ]
        return join(await _all(jobs))

    async def _infer(self, packed: Packed, served: Served, deadline: float, is_gone: Callable[[], bool]) -> Embedded:
        """All rows by the same weights: those that were known when the request's model was looked up, or others of the
        same model and tokenizer that have taken their place."""
        # A piece for each batch that the replicas can run at once, with rows of like length together.
        order = np.argsort(-packed.lengths, kind="stable")
        ordered = packed if packed.rows == 1 else reorder(packed, order)
        pieces = split(ordered, self.settings.batch_tokens, self._inferring.slots.pieces(packed.tokens))
        name, tokenizer = served.id, served.tokenizer
        for _ in range(ROLLOUT_TRIES):
            parts = await _all([self._inferring.submit(piece, piece.tokens, deadline, is_gone) for piece in pieces])
            if {part.weights for part in parts} == {served.weights}:
                return assemble(parts, order)
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

    async def _infer_together(self, entries: Sequence[Entry[Packed, Embedded]]) -> list[Embedded]:
        jobs = [entry.job for entry in entries]
        return deal(await self._stages.infer(concat(jobs), max(entry.deadline for entry in entries)), jobs)


def deal(whole: Embedded, jobs: Sequence[Packed]) -> list[Embedded]:
    """To each job its own rows of the vectors that were computed for all of them together, in order."""
    if len(jobs) == 1:
        return [whole]
    ends = np.cumsum([job.rows for job in jobs]).tolist()
    return [replace(whole, vectors=whole.vectors[end - job.rows : end]) for job, end in zip(jobs, ends, strict=True)]


def assemble(parts: Sequence[Embedded], order: NDArray[np.intp]) -> Embedded:
    """One answer of several: row i of all parts together is that of input `order[i]`."""
    if len(parts) == len(order) == 1:
        return parts[0]
    vectors = np.empty((len(order), parts[0].vectors.shape[1]), np.float32)
    vectors[order] = np.concatenate([part.vectors for part in parts])
    fingerprint = ",".join(sorted({part.fingerprint for part in parts}))
    infer_ms = max(part.infer_ms for part in parts)  # they run side by side
    return replace(parts[0], vectors=vectors, fingerprint=fingerprint, infer_ms=infer_ms)


async def _all(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Await all; on the first failure the others are cancelled, so that nothing computes what nobody will read."""
    if len(jobs) == 1:
        return [await jobs[0]]
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
