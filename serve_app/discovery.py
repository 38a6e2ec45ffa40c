"""Which replicas are there, asked again and again, and which of them to keep to."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from serve_app.answers import Served
from serve_app.errors import EmbeddingError
from serve_app.pipeline import DISCOVERY_TIMEOUT_S, Pipeline

logger = logging.getLogger("ray.serve")

# How long the ingress waits until it asks again which replicas there are: at least, for each that answered, at most and
# while none has come or gone. An answer costs it 1.5 ms, so up to 66 replicas take a fiftieth of its time.
REFRESH_PERIOD_S = 0.5
REFRESH_A_REPLICA_S = 0.075
REFRESH_LONGEST_S = 5.0


def choose(models: Sequence[Served], current: str) -> str:
    """The weights that most of the replicas serve, and of two with as many the current ones; "" if there are none."""
    replicas = Counter(served.weights for served in models)
    return max(replicas, key=lambda found: (replicas[found], found == current), default="")


async def refresh(pipeline: Pipeline, is_settled: Callable[[], bool]) -> None:
    """Keep asking who is there: a model may take minutes to load and must not keep the others waiting, and replicas
    come and go. `is_settled`: whether all that are there are known, which is looked at more often than they are asked.
    """
    known, pause_s = None, REFRESH_PERIOD_S
    while True:
        try:
            found = await pipeline.discover(time.monotonic() + DISCOVERY_TIMEOUT_S)
            served, replicas = found.served, found.tokenizers + found.models
            if known != served.fingerprint:
                known = served.fingerprint
                if served.id == pipeline.settings.id:
                    logger.info(f"{served.id} is served, fingerprint {known}")
                else:
                    logger.warning(f"{served.id} is served in place of {pipeline.settings.id}, fingerprint {known}")
            pause_s = min(REFRESH_LONGEST_S, max(REFRESH_PERIOD_S, replicas * REFRESH_A_REPLICA_S))
            await asyncio.sleep(pause_s)
            for _ in range(round((REFRESH_LONGEST_S - pause_s) / REFRESH_PERIOD_S)):
                if not is_settled():
                    break
                await asyncio.sleep(REFRESH_PERIOD_S)
        except Exception as error:  # whatever it is, it must not end the asking
            if not isinstance(error, EmbeddingError):
                logger.exception(f"asking what {pipeline.settings.id} serves failed")
            await asyncio.sleep(pause_s)
