"""What an answer has to be: as many vectors as texts, in their order, whole, of length 1, and those of these texts.

A reason names what was wrong and never holds a text.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

Vector = npt.NDArray[np.float32]

# Rounding to float32 moves a vector's length by less than 1e-6; what was not normalised is off by far more.
LENGTH_TOLERANCE = 1e-4
# Other batches, other precisions: a text's vector stays within this of itself, and no two texts' vectors come near it.
LOWEST_COSINE = 0.999

# The request failed, or the answer is not what was asked for.
REFUSED = ("connection", "status")
WRONG = ("body", "count", "order", "dimension", "norm", "vector")


class Fault(Exception):
    """What was wrong with one answer: one word of REFUSED or WRONG, and a detail."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(what, detail)
        self.what = what
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Answer:
    """`indexes` as the answer has them, a vector float32 [D] each, and the tokens that it says it counted."""

    indexes: list[int]
    vectors: list[Vector]
    tokens: int


def parse(body: bytes) -> Answer:
    """Read an answer; raises Fault."""
    try:
        answer = orjson.loads(body)
        items = answer["data"]
        return Answer(
            [item["index"] for item in items],
            [_vector(item["embedding"]) for item in items],
            int(answer["usage"]["prompt_tokens"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        # The error's own words may quote the body.
        raise Fault("body", f"not an embeddings answer ({type(error).__name__})") from None


def _vector(embedding: str | list[float]) -> Vector:
    """A vector as base64 of float32, or as numbers, which some services answer whatever they are asked for."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")
    return np.array(embedding, np.float32)


def check(answer: Answer, texts: Sequence[str], dimensions: int, known: Mapping[str, Vector]) -> Fault | None:
    """The first thing that is wrong with an answer, by its request and the vectors that are known; None if it is right.

    `known` holds vectors of length 1 by their text.
    """
    if len(answer.vectors) != len(texts):
        return Fault("count", f"{len(answer.vectors)} vectors for {len(texts)} texts")
    if answer.indexes != list(range(len(texts))):
        return Fault("order", "the indexes do not count up from 0")
    for vector in answer.vectors:
        if vector.shape != (dimensions,):
            return Fault("dimension", f"a vector of {vector.size} values instead of {dimensions}")
    vectors = np.stack(answer.vectors)
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    off = np.abs(lengths - 1)
    if not off.max() <= LENGTH_TOLERANCE:  # neither is it where one is NaN
        return Fault("norm", f"a vector of length {lengths[off.argmax()]:.3g} instead of 1")
    seen = [place for place, text in enumerate(texts) if text in known]
    if seen:
        before = np.stack([known[texts[place]] for place in seen])
        lowest = float(np.einsum("ij,ij->i", vectors[seen], before).min())
        if lowest < LOWEST_COSINE:
            return Fault("vector", f"not the one that its text had before (cosine {lowest:.2f})")
    return None
