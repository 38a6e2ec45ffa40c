"""What a Tokenizer replica tells the autoscaler of itself."""

import math
import time
from collections.abc import Sequence

from serve_app import deployments
from serve_app.autoscale import RATE, WAITING
from serve_app.packing import Tokenized
from serve_app.pipeline import CALL_CHARACTERS
from serve_app.rate import Rate
from serve_app.threads import background
from tests.hand import tokenized

STARVED_S, TRIED_S = 0.5, 0.01
TEXTS = ["twelve chars"] * (CALL_CHARACTERS // 12)


class StarvedTokenizer:
    """Takes long by the clock and next to nothing of a core, as where models have all of them."""

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        time.sleep(STARVED_S)
        return tokenized(texts[:1])


class Replica(deployments.Tokenizer.func_or_class):  # type: ignore[name-defined,misc]
    """The deployment's own class around a tokenizer, without Serve, weights and a listener."""

    def __init__(self) -> None:
        self._tokenizer, self._cores, self._threads = StarvedTokenizer(), 1, background(1, 0.1)
        self._waiting_characters, self._rate, self._worked_s = 0, Rate(CALL_CHARACTERS), 0.0
        self._record(CALL_CHARACTERS, TRIED_S)

    def __del__(self) -> None:
        """Nothing to let go."""


async def test_its_rate_is_that_of_a_core_of_its_own() -> None:
    replica = Replica()
    await replica.tokenize(TEXTS, math.inf)
    stats = await replica.record_autoscaling_stats()
    assert stats[WAITING] == 0
    assert 10 * CALL_CHARACTERS / STARVED_S < stats[RATE] < 2 * CALL_CHARACTERS / TRIED_S
