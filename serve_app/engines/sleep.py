"""A stand-in engine for tests of scale: it sleeps for as long as a slow engine would compute, and leaves the CPU free.

With it two cores can carry many replicas, so that routing, batching and autoscaling are what a test sees. Its vectors
are the mean of the tokens' word embeddings: they tell texts and orders apart, but are not the model's.
"""

import threading
import time

import numpy as np

from serve_app.engines import Precision
from serve_app.engines.bert import Bert
from serve_app.packing import Float32, Packed

# About 90 short queries a second, so that eight replicas are less than one ingress on a small machine can pass on.
LAUNCH_S = 0.005
TOKEN_S = 0.001


class SleepEngine:
    """Takes LAUNCH_S a batch and TOKEN_S a token."""

    name = "sleep"
    precision: Precision = "float32"
    device = "none"
    lanes = 1
    lane_tokens = 1
    brief_tokens = 0

    def __init__(self, bert: Bert) -> None:
        self._words = bert.words
        self._normalize = bert.normalize
        self._busy = threading.Lock()  # with one batch at a time

    def embed(self, packed: Packed) -> Float32:
        """Vectors, float32 [B, D], in the order of the rows."""
        seconds = LAUNCH_S + TOKEN_S * packed.tokens
        starts = np.cumsum(packed.lengths) - packed.lengths
        vectors: Float32 = np.add.reduceat(self._words[packed.ids], starts, axis=0)
        vectors /= packed.lengths[:, None]
        if self._normalize:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        with self._busy:
            time.sleep(seconds)
        return vectors
