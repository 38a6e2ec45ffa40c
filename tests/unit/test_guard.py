"""What an engine's faults cost: the one sequence that it can't compute, and never what shares its batch."""

from collections.abc import Callable

import numpy as np
import pytest

from serve_app.engines.guard import PROBE, SHORT_S, Guard
from serve_app.errors import EngineBroken
from serve_app.packing import Float32, Packed

POISON = 666
DIMENSIONS = 4


class HandEngine:
    """A vector repeats the sum of its sequence's ids; `fault` is asked before each batch."""

    name, precision, device, lanes, lane_tokens, brief_tokens = "hand", "float32", "cpu", 1, 1, 0

    def __init__(self, fault: Callable[[Packed], None]) -> None:
        self._fault = fault
        self.batches: list[int] = []

    def embed(self, packed: Packed) -> Float32:
        self.batches.append(packed.tokens)
        self._fault(packed)
        sums = np.add.reduceat(packed.ids, np.cumsum(packed.lengths) - packed.lengths)
        return np.repeat(sums.astype(np.float32)[:, None], DIMENSIONS, axis=1)


def texts(*ids: int, length: int = 3) -> Packed:
    return Packed(np.repeat(np.array(ids, np.int32), length), np.full(len(ids), length, np.int32))


def fails_at_poison(packed: Packed) -> None:
    if POISON in packed.ids:
        raise RuntimeError("somebody's text")


def values(vectors: Float32) -> list[float]:
    return vectors[:, 0].tolist()


@pytest.mark.parametrize("place", range(7))
def test_a_poisoned_sequence_fails_alone(place: int, caplog: pytest.LogCaptureFixture) -> None:
    ids = list(range(1, 8))
    ids[place] = POISON
    vectors = Guard(HandEngine(fails_at_poison), DIMENSIONS).embed(texts(*ids))
    assert np.isnan(vectors[place]).all()
    assert values(np.delete(vectors, place, 0)) == [3.0 * id for id in ids if id != POISON]
    assert "RuntimeError" in caplog.text and "somebody's text" not in caplog.text


def test_what_is_well_costs_no_further_batch() -> None:
    engine = HandEngine(lambda packed: None)
    assert values(Guard(engine, DIMENSIONS).embed(texts(1, 2))) == [3.0, 6.0]
    assert engine.batches == [6]


def test_an_engine_that_fails_at_everything_is_broken_and_not_tried_for_each_sequence() -> None:
    def fails(packed: Packed) -> None:
        raise RuntimeError

    engine = HandEngine(fails)
    with pytest.raises(EngineBroken, match="fails at everything: RuntimeError"):
        Guard(engine, DIMENSIONS).embed(texts(*range(1, 100)))
    assert engine.batches == [297, PROBE.tokens]


def test_vectors_that_are_not_finite_are_one_sequences_or_all() -> None:
    class Nan(HandEngine):
        def embed(self, packed: Packed) -> Float32:
            vectors = super().embed(packed)
            vectors[np.isin(vectors[:, 0], self.bad)] = np.nan
            return vectors

    engine = Nan(lambda packed: None)
    engine.bad = [6.0]
    vectors = Guard(engine, DIMENSIONS).embed(texts(1, 2, 3))
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False]
    engine.bad.append(3.0)  # the probe's too
    with pytest.raises(EngineBroken, match="not finite"):
        Guard(engine, DIMENSIONS).embed(texts(1, 2, 3))


def test_a_batch_over_the_memory_is_halved_and_later_ones_are_cut_to_what_fitted() -> None:
    def is_small(packed: Packed) -> None:
        if packed.tokens > 10:
            raise MemoryError

    engine = HandEngine(is_small)
    guard = Guard(engine, DIMENSIONS)
    for _ in range(2):
        assert values(guard.embed(texts(*range(1, 9)))) == [3.0 * id for id in range(1, 9)]
        assert max(engine.batches[1:]) <= 12
    assert guard.most_tokens is not None and guard.most_tokens <= 10
    engine.batches.clear()
    guard.embed(texts(*range(1, 9)))
    assert max(engine.batches) <= 10, "a batch that can't fit was tried again"


def test_batches_are_whole_again_once_memory_was_short_for_long_enough() -> None:
    now = 0.0
    most = 10

    def is_small(packed: Packed) -> None:
        if packed.tokens > most:
            raise MemoryError

    engine = HandEngine(is_small)
    guard = Guard(engine, DIMENSIONS, clock=lambda: now)
    guard.embed(texts(*range(1, 9)))
    most = 1000
    now = SHORT_S - 1
    engine.batches.clear()
    guard.embed(texts(*range(1, 9)))
    assert max(engine.batches) <= 10
    now = SHORT_S
    guard.embed(texts(*range(1, 9)))
    assert max(engine.batches) == 24


def test_a_sequence_that_alone_is_over_the_memory_leaves_batches_as_they_are() -> None:
    def is_long(packed: Packed) -> None:
        if packed.lengths.max() > 8:
            raise MemoryError

    guard = Guard(HandEngine(is_long), DIMENSIONS)
    for lengths in ([9], [3, 9]):
        guard.embed(Packed(np.full(sum(lengths), 7, np.int32), np.array(lengths, np.int32)))
        assert guard.most_tokens is None


def test_one_sequence_over_the_memory_has_no_vector() -> None:
    def is_small(packed: Packed) -> None:
        if packed.tokens > 10:
            raise MemoryError

    guard = Guard(HandEngine(is_small), DIMENSIONS)
    ids, lengths = np.ones(23, np.int32), np.array([20, 3], np.int32)
    vectors = guard.embed(Packed(ids, lengths))
    assert np.isnan(vectors[0]).all() and values(vectors[1:]) == [3.0]
