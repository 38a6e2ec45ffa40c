"""Narrows an engine's faults down: one bad sequence, or too little memory, does not fail what shares its batch."""

import logging
import math
import time
from collections.abc import Callable

import numpy as np

from serve_app.engines import Engine
from serve_app.errors import EngineBroken
from serve_app.packing import Float32, Packed, split

logger = logging.getLogger("ray.serve")

# What every engine can do that can do anything: three tokens, which are in every vocabulary.
PROBE = Packed(np.ones(3, np.int32), np.array([3], np.int32))
# For how long batches are cut after memory was short: another process on the device may have had it.
SHORT_S = 60.0


class Guard:
    """An engine that answers every batch, with NaN in the rows that it can't compute; as safe for threads as its own.

    A batch that fails is halved until what fails is one row. Where it was memory that was short, those after it are cut
    to as little, for a while.
    """

    def __init__(self, engine: Engine, dimensions: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self._dimensions = dimensions
        self._clock = clock
        # Half of the last batch for which memory was short, and when that was.
        self._most_tokens, self._short_at = 0, -math.inf

    @property
    def most_tokens(self) -> int | None:
        """In one batch, for a while after memory was short."""
        return self._most_tokens if self._clock() - self._short_at < SHORT_S else None

    def embed(self, packed: Packed) -> Float32:
        """Vectors, float32 [B, D], in the order of the rows; raises EngineBroken if not even a probe succeeds."""
        if packed.rows > 1 and (limit := self.most_tokens) and packed.tokens > limit:
            return self._embed_parts(split(packed, limit))
        fault = ""
        try:
            vectors = self.engine.embed(packed)
            if np.isfinite(vectors).all():
                return vectors
        except MemoryError:
            if packed.lengths.max() <= packed.tokens // 2:  # else it may be one text alone that is too long
                self._most_tokens = min(self.most_tokens or packed.tokens, packed.tokens // 2)
                self._short_at = self._clock()
            fault = f"memory is too small for a batch of {packed.tokens} tokens"
        except Exception as error:  # whatever a backend raises; its words may hold the input's
            fault = type(error).__name__
        # Out here the error is gone, and with its traceback the tensors that it held.
        if not self._works():
            raise EngineBroken(f"the engine fails at everything: {fault or 'vectors are not finite'}")
        if not fault:
            logger.error("the engine gave vectors that are not finite for some sequences")
            return vectors
        if packed.rows == 1:
            logger.error(f"the engine failed at a sequence of {packed.tokens} tokens: {fault}")
            return np.full((1, self._dimensions), np.nan, np.float32)
        logger.warning(f"the engine failed at a batch of {packed.rows} sequences, which is halved: {fault}")
        return self._embed_parts(split(packed, -(-packed.tokens // 2), 2))

    def _embed_parts(self, parts: list[Packed]) -> Float32:
        return np.concatenate([self.embed(part) for part in parts])

    def _works(self) -> bool:
        try:
            return bool(np.isfinite(self.engine.embed(PROBE)).all())
        except Exception as error:
            logger.error(f"the engine failed at a probe: {type(error).__name__}")
            return False
