"""Which replicas are there, asked again and again, and which of them to keep to."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from serve_app.answers import Served
from serve_app.errors import EmbeddingError
from serve_app.pipeline import DISCOVERY_TIMEOUT_S, Pipeline

logger = logging.getLogger("ray.serve")

# How often the ingress asks which replicas there are, how much of its time it may spend on that, and how seldom it may
# get; and how often while none has answered yet.
REFRESH_PERIOD_S = 1.0
REFRESH_SHARE = 0.02
REFRESH_LONGEST_S = 5.0
DISCOVERY_PERIOD_S = 0.5


def choose(models: Sequence[Served], current: str) -> str:
    """The weights that most of the replicas serve, and of two with as many the current ones; "" if there are none."""
    replicas = Counter(served.weights for served in models)
    return max(replicas, key=lambda found: (replicas[found], found == current), default="")


async def refresh(pipeline: Pipeline) -> None:
    """Keep asking who is there: a model may take minutes to load and must not keep the others waiting, and replicas
    come and go."""
    known = None
    while True:
        started = time.monotonic()
        pause_s = REFRESH_PERIOD_S if known else DISCOVERY_PERIOD_S
        try:
            served = (await pipeline.discover(started + DISCOVERY_TIMEOUT_S)).served
        except Exception as error:  # whatever it is, it must not end the asking
            if not isinstance(error, EmbeddingError):
                logger.exception(f"asking what {pipeline.settings.id} serves failed")
        else:
            if not pipeline.has_backlog:  # else a new replica is worth the asking
                pause_s = min(REFRESH_LONGEST_S, max(pause_s, (time.monotonic() - started) / REFRESH_SHARE))
            if known != served.fingerprint:
                known = served.fingerprint
                if served.id == pipeline.settings.id:
                    logger.info(f"{served.id} is served, fingerprint {known}")
                else:
                    logger.warning(f"{served.id} is served in place of {pipeline.settings.id}, fingerprint {known}")
        await asyncio.sleep(pause_s)
