"""The model that every system serves: the all-MiniLM-L6-v2 of a package, and what it answers by its definition."""

from collections.abc import Sequence

import numpy as np

from loadtest.workload import MODEL, Cell, requests
from serve_app import weights
from serve_app.engines import bert
from serve_app.packing import Float32, Packed, concat
from serve_app.settings import ModelSettings
from serve_app.tokens import Tokenizer

FOUND = weights.resolve(ModelSettings(id=MODEL, sources=("embedded",)))
TOKENIZER = Tokenizer(FOUND.folder, FOUND.max_tokens, FOUND.lowercase)


def network() -> bert.Bert:
    """The weights, as the service loads them."""
    return bert.load(FOUND.folder, FOUND.pooling, FOUND.normalize)


def packed(cell: Cell) -> list[Packed]:
    """The token ids of each request of a cell, cut to the model's limit."""
    return [TOKENIZER.tokenize(texts).packed for texts in requests(cell)]


def tokens(cell: Cell) -> float:
    """Tokens of a request that the model computes, averaged over the cell's bodies."""
    return float(np.mean([request.tokens for request in packed(cell)]))


def reference(texts: Sequence[str]) -> Float32:
    """The vectors by definition, float32 [B, D]: what every system has to answer; about a second a long text."""
    return bert.reference(network(), concat([TOKENIZER.tokenize([text]).packed for text in texts]))


def agreement(got: Float32, want: Float32) -> float:
    """The lowest cosine between rows, of vectors of whatever length."""
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    return float(((got * want).sum(1) / lengths).min())
