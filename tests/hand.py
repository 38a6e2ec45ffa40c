"""Stages that one can compute by hand: a text's tokens are its characters, a vector holds the ids' sum and count."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from serve_app.answers import Described, Embedded, Served
from serve_app.packing import Frame, Packed, Tokenized, enclose

FRAME = Frame(start_id=101, end_id=102, vocabulary=1000, max_tokens=16)


def served(model: str = "Mihaiii/Ivysaur") -> Served:
    return Served(
        id=model,
        created=1_700_000_000,
        origin="hand",
        engine="hand",
        precision="float32",
        device="cpu",
        lanes=1,
        lane_tokens=1,
        dimensions=4,
        normalize=True,
        max_tokens=FRAME.max_tokens,
        weights="w8s",
        fingerprint="f1ve",
        tokenizer="t0k",
    )


def vector(text: str) -> list[float]:
    """The vector of one text, by hand."""
    ids = [101, *map(ord, text[: FRAME.max_tokens - 2]), 102]
    raw = np.array([sum(ids), len(ids), 0, 1], np.float32)
    return (raw / np.linalg.norm(raw)).tolist()


def tokenized(texts: Sequence[str]) -> Tokenized:
    lengths = np.array([len(text) for text in texts], np.int32)
    return enclose(np.array([ord(c) for text in texts for c in text], np.int64), lengths, FRAME)


def known(texts: Sequence[str], most_new_characters: int) -> Tokenized | None:
    """Here each text is new that is not ASCII."""
    return tokenized(texts) if sum(len(text) for text in texts if not text.isascii()) <= most_new_characters else None


class HandStages:
    """Counts its calls; raises `failure` where one is set."""

    def __init__(self, model: str = "Mihaiii/Ivysaur") -> None:
        self.model = model
        self.failure: Exception | None = None
        self.texts_by_call: list[int] = []
        self.tokens_by_call: list[int] = []
        self.tokenizer = "t0k"
        self.descriptions = 0
        self.models = 1
        self.tokens_per_s = 0.0
        self.weights: list[str] = []  # of the next calls' replicas, where they are not those described

    async def describe(self, deadline: float) -> Described:
        if self.failure is not None:
            raise self.failure
        self.descriptions += 1
        described = replace(served(self.model), tokenizer=self.tokenizer)
        return Described(described, FRAME, 1, self.models, tokens_per_s=self.tokens_per_s, tokenize=known)

    async def tokenize(self, texts: Sequence[str], deadline: float) -> Tokenized:
        self.texts_by_call.append(len(texts))
        return tokenized(texts)

    async def infer(self, packed: Packed, deadline: float, is_bulk: bool = False) -> Embedded:
        if self.failure is not None:
            raise self.failure
        self.tokens_by_call.append(packed.tokens)
        ends = np.cumsum(packed.lengths)
        sums = [packed.ids[end - length : end].sum() for end, length in zip(ends, packed.lengths.tolist(), strict=True)]
        raw = np.stack([sums, packed.lengths, np.zeros(packed.rows), np.ones(packed.rows)], axis=1)
        vectors = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
        return Embedded(vectors, self.weights.pop(0) if self.weights else "w8s", "f1ve", 1.0)
