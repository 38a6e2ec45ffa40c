"""What the replicas of a model answer: what they serve, and vectors, to be dealt out or put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serve_app.packing import Float32, Frame, Packed, Tokenized


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a model replica answers: vectors float32 [B, D], by which weights and engine, and its own time."""

    vectors: Float32
    weights: str
    fingerprint: str
    infer_ms: float


@dataclass(frozen=True)
class Served:
    """What a model's replicas say of themselves: the model that is really there, and how it is computed.

    Without slots, whose pickle is a list by position: replicas of other code, in an update, may know other fields.
    """

    id: str
    created: int  # Unix time in seconds
    origin: str
    engine: str
    precision: str
    device: str
    lanes: int  # batches that one replica's engine runs at once
    dimensions: int
    normalize: bool
    max_tokens: int
    weights: str  # digest of all that decides the vectors but engine and precision
    fingerprint: str
    tokenizer: str  # digest of all that decides the token ids
    lane_tokens: int = 1  # least tokens of a batch that runs beside another


@dataclass(frozen=True, slots=True)
class Described:
    """A model's replicas at one moment: what they serve, how many there are, and what of it can be done here."""

    served: Served
    frame: Frame
    tokenizers: int  # 0 while none answers
    models: int  # 0 while they are scaled to zero
    tokens_per_s: float  # that the models do for this caller; 0.0 while none is known
    # The tokenizers' own tokenizer, in this process; None where more characters than that are new to it.
    tokenize: Callable[[Sequence[str], int], Tokenized | None]


def deal(whole: Embedded, jobs: Sequence[Packed]) -> list[Embedded]:
    """To each job its own rows of the vectors that were computed for all of them together, in order."""
    if len(jobs) == 1:
        return [whole]
    ends = np.cumsum([job.rows for job in jobs]).tolist()
    return [replace(whole, vectors=whole.vectors[end - job.rows : end]) for job, end in zip(jobs, ends, strict=True)]


def assemble(parts: Sequence[Embedded], order: NDArray[np.intp]) -> Embedded:
    """One answer of several: row i of all parts together is that of input `order[i]`."""
    if len(parts) == len(order) == 1:
        return parts[0]
    vectors = np.empty((len(order), parts[0].vectors.shape[1]), np.float32)
    vectors[order] = np.concatenate([part.vectors for part in parts])
    fingerprint = ",".join(sorted({part.fingerprint for part in parts}))
    infer_ms = max(part.infer_ms for part in parts)  # they run side by side
    return replace(parts[0], vectors=vectors, fingerprint=fingerprint, infer_ms=infer_ms)
