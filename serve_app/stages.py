"""The stages of one model, as calls to the replicas that are found."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from serve_app.discovery import choose
from serve_app.errors import ModelUnavailable
from serve_app.packing import Packed, Tokenized
from serve_app.pipeline import Described, Embedded
from serve_app.pool import Pool


class Found(Protocol):
    """Who knows the replicas of one deployment."""

    deployment: str

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
        self._tokenizers, self._models = Pool(name), Pool(name)
        self._described: Described | None = None
        self._weights = ""  # of the models that calls go to
        self._tokenizer: Any = None  # the tokenizers' own, once it was handed over
        self._digest = ""  # and its digest

    @property
    def loads(self) -> tuple[int, int]:
        """The work that the tokenizers have, in characters, and the models, in tokens."""
        return self._tokenizers.load, self._models.load

    async def describe(self, deadline: float) -> Described:
        """Ask all replicas what they serve, and keep to those that agree; raises ModelUnavailable while none do.

        Models that are scaled to zero serve what they served last.
        """
        tokenizers, models = await asyncio.gather(*(found.describe(deadline) for found in self._found))
        if not models and self._described and await self._found[1].are_asleep():
            return replace(self._described, models=0)
        if not tokenizers or not models:
            raise ModelUnavailable(
                f"No replica of `{self._name}` is there: it is loading, or failed to load; the server's log says which."
            )
        digests = {digest for digest, _, _ in tokenizers}
        self._weights = choose([served for served, _ in models if served.tokenizer in digests], self._weights)
        if not self._weights:
            raise ModelUnavailable(f"The replicas of `{self._name}` are changing to another model; try again.")
        chosen = [(served, endpoint) for served, endpoint in models if served.weights == self._weights]
        served = chosen[0][0]
        matching = [(frame, endpoint) for digest, frame, endpoint in tokenizers if digest == served.tokenizer]
        await asyncio.gather(
            self._models.update(endpoint for _, endpoint in chosen),
            self._tokenizers.update(endpoint for _, endpoint in matching),
        )
        if self._digest != served.tokenizer:
            self._digest, self._tokenizer = await self._tokenizers.call("hand_over", None, 0, deadline)
            if self._digest != served.tokenizer:
                raise ModelUnavailable(f"The replicas of `{self._name}` are changing to another model; try again.")
        self._described = Described(served, matching[0][0], len(matching), len(chosen), self._tokenizer.tokenize)
        return self._described

    async def tokenize(self, texts: Sequence[str], deadline: float) -> Tokenized:
        """Ids of the texts, in order."""
        tokenized: Tokenized = await self._tokenizers.call("tokenize", texts, sum(map(len, texts)), deadline)
        return tokenized

    async def infer(self, packed: Packed, deadline: float) -> Embedded:
        """Vectors of the sequences, in order."""
        embedded: Embedded = await self._models.call("infer", packed, packed.tokens, deadline)
        return embedded
