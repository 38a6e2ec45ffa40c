"""The load: requests at a steady rate from two kinds of client, each answer held against its texts' known vectors.

Each request leaves when it is due, whatever became of those before: a service that stalls hides none of those that
would have come meanwhile. How late this process itself was is told apart, so that it is not taken for the service.
"""

import asyncio
import functools
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from types import TracebackType
from typing import Any

import httpx
import numpy as np
import openai
from openai.resources.embeddings import AsyncEmbeddings  # its first use would take half a second

from loadtest.chaos.tally import Client, Outcome, Record, is_refusal, words_of
from loadtest.traffic.checks import Answer, Fault, Vector, check, parse
from loadtest.traffic.kinds import QUERIES, of_words
from loadtest.weights import TOKENIZER, network
from loadtest.workload import MODEL, SEED
from serve_app.engines.sleep import SleepEngine
from serve_app.pipeline import NEW_CHARACTERS

# One request in so many is a pair of texts, one in so many a text that the ingress leaves to the tokenizers, and one in
# so many a list that goes to models as a long request.
PAIR_EVERY, LONG_EVERY, LIST_EVERY = 10, 40, 240
LIST = 48
LONG = [f"{text} naïve" for text in of_words(180, 200) if len(text) > NEW_CHARACTERS][:5]
# One in so many goes through OpenAI's client, with its default of two further tries.
OPENAI_EVERY = 4
# Over the service's own limit, so that its answer comes first.
ANSWER_TIMEOUT_S = 60.0

Result = tuple[Outcome, str]


@functools.cache
def known_vectors() -> dict[str, Vector]:
    """What the sleeping engine answers to each text of the load, computed here."""
    engine = SleepEngine(network())
    return {text: engine.embed(TOKENIZER.tokenize([text]).packed)[0] for text in (*QUERIES, *LONG)}


def texts_of(number: int, source: Random) -> list[str]:
    """The texts of one request."""
    if number % LIST_EVERY == LIST_EVERY - 2:
        return source.choices(QUERIES, k=LIST)
    if number % LONG_EVERY == LONG_EVERY - 1:
        return [source.choice(LONG)]
    return source.sample(QUERIES, 2 if number % PAIR_EVERY == 0 else 1)


class Load:
    """`with Load(url, rate):` sends so many requests a second while the block runs, and waits for the answers.

    From a thread of its own: whoever breaks the service meanwhile may block. That thread alone changes what is kept
    here; others only read it, each list and dictionary in one step.
    """

    def __init__(self, url: str, rate: float) -> None:
        self.records: list[Record] = []
        self.lag_s = 0.0  # the latest that a request left after it was due
        self._waiting: dict[asyncio.Task[None], float] = {}  # a request -> when it was sent
        self._known = known_vectors()
        self._url = url
        self._rate = rate
        self._is_over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._thread.join()

    def since(self, start_s: float) -> list[Record]:
        """The requests with an answer that were sent since then."""
        return [each for each in self.records.copy() if each.sent_s >= start_s]

    def waiting_s(self) -> list[float]:
        """For how long each of those without an answer has been waited for."""
        now = time.monotonic()
        return [now - sent_s for sent_s in list(self._waiting.values())]

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=ANSWER_TIMEOUT_S, limits=limits) as self._raw,
            openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none") as self._openai,
        ):
            self._embeddings: AsyncEmbeddings = self._openai.embeddings
            await self._send()
            await asyncio.gather(*self._waiting)

    async def _send(self) -> None:
        source = Random(SEED)
        begun = time.monotonic()
        for number in itertools.count():
            due_s = begun + number / self._rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if self._is_over:
                return
            client: Client = "openai" if number % OPENAI_EVERY == OPENAI_EVERY - 1 else "raw"
            sent_s = time.monotonic()
            self.lag_s = max(self.lag_s, sent_s - due_s)
            task = asyncio.create_task(self._ask(client, texts_of(number, source), sent_s))
            self._waiting[task] = sent_s
            task.add_done_callback(self._waiting.pop)

    async def _ask(self, client: Client, texts: list[str], sent_s: float) -> None:
        ask = self._ask_raw if client == "raw" else self._ask_openai
        outcome, detail = await _judged(ask, texts, self._known)
        self.records.append(Record(client, sent_s, time.monotonic() - sent_s, outcome, detail))

    async def _ask_raw(self, texts: list[str]) -> Answer | Result:
        sent: Any = texts if len(texts) > 1 else texts[0]
        try:
            answer = await self._raw.post(
                "/v1/embeddings", json={"model": MODEL, "input": sent, "encoding_format": "base64"}
            )
        except httpx.HTTPError as error:
            return "failed", f"{type(error).__name__}: {error}"
        if answer.status_code != 200:
            refused = is_refusal(answer.status_code, answer.headers, answer.content)
            return "refused" if refused else "failed", words_of(answer.status_code, answer.content)
        return parse(answer.content)

    async def _ask_openai(self, texts: list[str]) -> Answer | Result:
        try:
            answer = await self._embeddings.create(model=MODEL, input=texts)
        except openai.APIStatusError as error:
            refused = is_refusal(error.status_code, error.response.headers, error.response.content)
            return "refused" if refused else "failed", words_of(error.status_code, error.response.content)
        except openai.APIConnectionError as error:
            return "failed", type(error.__cause__ or error).__name__
        vectors = [np.array(each.embedding, np.float32) for each in answer.data]
        return Answer([each.index for each in answer.data], vectors, answer.usage.prompt_tokens)


async def _judged(
    ask: Callable[[list[str]], Awaitable[Answer | Result]], texts: Sequence[str], known: Mapping[str, Vector]
) -> Result:
    try:
        answer = await ask(list(texts))
        if not isinstance(answer, Answer):
            return answer
        fault = check(answer, texts, known[texts[0]].size, known)
    except Fault as error:
        fault = error
    except Exception as error:  # of a client itself: also an answer that nobody got
        return "failed", type(error).__name__
    return ("wrong", str(fault)) if fault else ("right", "")
