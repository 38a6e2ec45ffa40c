"""The stages of one model, as calls to the replicas that are found."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from serve_app.answers import Described, Embedded
from serve_app.autoscale import asked_of, waiting_for
from serve_app.discovery import choose
from serve_app.errors import DeadlineExceeded, ModelUnavailable
from serve_app.packing import Packed, Tokenized
from serve_app.pipeline import Pipeline
from serve_app.pool import Pool

logger = logging.getLogger("ray.serve")


class Found(Protocol):
    """Who knows the replicas of one deployment."""

    deployment: str

    @property
    def is_settled(self) -> bool:
        """Whether each that is there has said it."""
        ...

    async def describe(self, deadline: float) -> list[Any]:
        """What each replica says of itself."""
        ...

    async def are_asleep(self) -> bool:
        """Whether there are none because none is needed."""
        ...


class RemoteStages:
    """The stages of one model: calls go to replicas of one kind of weights, and of the tokenizer that fits them."""

    def __init__(self, name: str, tokenizers: Found, models: Found) -> None:
        self.deployments = (tokenizers.deployment, models.deployment)
        self._name = name
        self._found = (tokenizers, models)
        self._tokenizers, self._models = Pool(name, waits=False), Pool(name)
        self._described: Described | None = None
        self._weights = ""  # of the models that calls go to
        self._tokenizer: Any = None  # the tokenizers' own, once it was handed over
        self._digest = ""  # and its digest
        self._pooled = ""  # the digest of the tokenizers that calls go to
        self._thread = ThreadPoolExecutor(1)  # for texts that no tokenizer can be reached for

    @property
    def loads(self) -> tuple[int, int]:
        """The work that the tokenizers have, in characters, and the models, in tokens."""
        return self._tokenizers.load, self._models.load

    def is_settled(self) -> bool:
        """Whether all replicas that are there have said what they serve, and those that calls go to take them."""
        pools = (self._tokenizers, self._models)
        return all(found.is_settled for found in self._found) and not any(pool.missing for pool in pools)

    def report(self, pipeline: Pipeline) -> dict[str, float]:
        """For serve_app.autoscale, of each stage: all the work that was ever asked of it, and what is held here."""
        stats: dict[str, float] = {}
        for name, load, queues in zip(self.deployments, self.loads, pipeline.queues, strict=True):
            stats[asked_of(name)] = sum(queue.asked_cost for queue in queues)
            stats[waiting_for(name)] = max(0, sum(queue.unfinished_cost for queue in queues) - load)
        if pipeline.served is None:  # what a model serves is learnt from a replica of it, so one is needed
            stats[waiting_for(self.deployments[1])] += 1
        return stats

    async def describe(self, deadline: float) -> Described:
        """Ask all replicas what they serve, and keep to those that agree; raises ModelUnavailable while none do.

        Models that are scaled to zero serve what they served last.
        """
        tokenizers, models = await asyncio.gather(*(found.describe(deadline) for found in self._found))
        if not models and self._described and await self._found[1].are_asleep():
            await self._models.update(())
            return replace(self._described, models=0, tokens_per_s=0.0)
        if not models or not (tokenizers or self._described):
            raise ModelUnavailable(
                f"No replica of `{self._name}` is there: it is loading, or failed to load; the server's log says which."
            )
        # Without any tokenizer, as when the node with all of them is lost, the one that was handed over does for all.
        digests = {digest for digest, _ in tokenizers} or {self._digest}
        self._weights = choose([served for served, _, _ in models if served.tokenizer in digests], self._weights)
        if not self._weights:
            raise ModelUnavailable(f"The replicas of `{self._name}` are changing to another model; try again.")
        chosen = [model for model in models if model[0].weights == self._weights]
        served = chosen[0][0]
        fitting = [endpoint for digest, endpoint in tokenizers if digest == served.tokenizer]
        updates = [self._models.update(endpoint for _, endpoint, _ in chosen)]
        if fitting or self._pooled != served.tokenizer:  # else they may only be slow to say so
            self._pooled = served.tokenizer
            updates.append(self._tokenizers.update(fitting))
        await asyncio.gather(*updates)
        if self._digest != served.tokenizer:
            self._digest, self._tokenizer = await self._tokenizers.call("hand_over", None, 0, deadline)
        tokens_per_s = sum(rate for _, _, rate in chosen)
        self._described = Described(
            served, self._tokenizer.frame, len(fitting), len(chosen), tokens_per_s, self._tokenizer.tokenize_known
        )
        return self._described

    async def tokenize(self, texts: Sequence[str], deadline: float) -> Tokenized:
        """Ids of the texts, in order; where no tokenizer can be reached, by this process itself."""
        tokenized: Tokenized
        try:
            tokenized = await self._tokenizers.call("tokenize", texts, sum(map(len, texts)), deadline)
            return tokenized
        except ModelUnavailable as error:  # until there are others, which takes longer than this
            logger.warning(f"{len(texts)} texts are tokenized here: {error}")
        here = asyncio.get_running_loop().run_in_executor(self._thread, self._tokenizer.tokenize, texts)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                tokenized = await here
                return tokenized
        except TimeoutError:
            raise DeadlineExceeded("The texts could not be tokenized in time.") from None

    async def infer(self, packed: Packed, deadline: float, is_bulk: bool = False) -> Embedded:
        """Vectors of the sequences, in order; as a part of a long request, they let short ones pass."""
        method = "infer_bulk" if is_bulk else "infer"
        embedded: Embedded = await self._models.call(method, packed, packed.tokens, deadline)
        return embedded
